"""The check every export passes before anyone may use it: the same outputs as torch, edge values included."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybrid.errors import ConfigError
from hybrid.features import Features

TOLERANCE = 1e-5  # against torch in float32; absolute, and as much relative to the largest output of the row
ROWS = 64
EXTREMES = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-38, -1e30, 3.4e38, 1.0, 60.0)


def input_probes(features: Features) -> Tensor:
    """(n, features) inputs as a device may meet them: random ones, each index, then one row of each extreme number."""
    random = np.random.default_rng(0)
    rows = ROWS + len(EXTREMES)
    columns = [
        random.integers(0, transform.cardinality, rows)
        if transform.text
        else np.r_[random.normal(0, 100, ROWS), EXTREMES]
        for transform in features.transforms.values()
    ]
    return torch.tensor(np.stack(columns, axis=1), dtype=torch.float32)


def slot_probes(features: Features) -> Tensor:
    """(n, features) slots: those of `input_probes`, and missing or out-of-range ones as they might be stored."""
    slots = features.slots(input_probes(features).numpy())
    stored = np.repeat(np.array([[np.nan], [-1.0], [1e6]], np.float32), len(features), axis=1)
    return torch.from_numpy(np.concatenate([slots, stored]))


def embedding_probes(*sizes: int) -> tuple[Tensor, ...]:
    """(n, size) embeddings for each size: random ones, zeros, and large ones."""
    random = np.random.default_rng(0)
    scale = np.r_[np.ones(ROWS), 0.0, 100.0, -100.0][:, None]
    return tuple(torch.tensor(random.normal(size=(len(scale), n)) * scale, dtype=torch.float32) for n in sizes)


def check(
    part: str, program: nn.Module, exported: Callable[..., NDArray[np.float32]], probes: Sequence[Tensor]
) -> None:
    """Compares `exported` with `program` on the same rows.

    Args:
        part: name for the message.
        program: in evaluation mode.
        exported: takes what `program` takes, as float32 arrays.
        probes: (n, width) each.

    Raises:
        ConfigError: any output differs by more than `TOLERANCE`.
    """
    with torch.no_grad():
        expected = program(*probes).numpy()
    got = exported(*(probe.numpy() for probe in probes))
    if got.shape != expected.shape:
        raise ConfigError(f"{part}: the export returns shape {got.shape}, torch {expected.shape}")
    # One row's numbers are sums over the same inputs: where these are large, a small sum of them is as inexact.
    largest = np.abs(np.where(np.isfinite(expected), expected, 0)).reshape(len(expected), -1).max(axis=1, initial=0)
    allowed = TOLERANCE + TOLERANCE * largest.reshape(-1, *[1] * (expected.ndim - 1))
    differ = ~np.isclose(got, expected, rtol=0, atol=allowed, equal_nan=True)
    if differ.any():
        raise ConfigError(
            f"{part}: the export differs from torch by more than {TOLERANCE} in {differ.sum()} of {differ.size} values"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' chatter off the terminal, what native code writes to stderr included; errors still raise."""
    disabled, stderr = logging.root.manager.disable, os.dup(2)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        logging.disable(disabled)
