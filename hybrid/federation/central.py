"""Training on pooled data, without privacy: the server's own tower, and the reference for federated training.

What is fitted is the probability: where the network has a correction, the head learns the logits before it. Examples
are taken as they come: label balancing is for rounds on devices, and its reference is without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hybrid.errors import ConfigError
from hybrid.federation.optimizers import step, without_compiler
from hybrid.federation.population import Examples
from hybrid.network import Network

OnEpoch = Callable[[int], None]


@dataclass(frozen=True)
class Fitting:
    """How to fit on pooled data: AdamW on mini-batches until users set aside are predicted no better.

    Attributes:
        lr, weight_decay: of AdamW.
        batch: examples a step.
        epochs: at most so many.
        patience: epochs without a better validation loss before it stops.
        validation: share of the training users set aside.
    """

    lr: float = 3e-3
    weight_decay: float = 1e-2
    batch: int = 256
    epochs: int = 200
    patience: int = 10
    validation: float = 1 / 6


def fit_server_side(
    network: Network, examples: Examples, *, seed: int, fitting: Fitting | None = None, on_epoch: OnEpoch | None = None
) -> int:
    """Fits server tower and head on the label, with the device embedding at zero, to early stopping.

    For a head that adds a linear score of each embedding this is the server
    tower and a linear head: the best that can be done without devices. The
    device tower is left alone.

    Args:
        network: changed in place; left in evaluation mode with its best weights.
        examples: what the server sees of them is used alone.
        seed: of the split, the batches and dropout.
        fitting: how.
        on_epoch: called after each epoch with its number, from 1.

    Returns:
        The epoch whose weights are kept.

    Raises:
        ConfigError: there are too few users to set some aside.
    """
    server = torch.from_numpy(examples.server)
    absent = torch.zeros(1, network.device_embedding)

    def logits(rows: Tensor) -> Tensor:
        return network.correction.corrected(
            network.head(network.server_tower(server[rows]), absent.expand(len(rows), -1))
        )

    modules = nn.ModuleList([network.server_tower, network.head])
    return _fit(modules, logits, examples, seed=seed, fitting=fitting or Fitting(), on_epoch=on_epoch)


def fit_everything(
    network: Network,
    examples: Examples,
    *,
    seed: int,
    fitting: Fitting | None = None,
    tower_dropout: float = 0.0,
    on_epoch: OnEpoch | None = None,
) -> int:
    """Fits both towers and the head together on pooled rows: what could be had if nothing were private.

    Args:
        network: changed in place; left in evaluation mode with its best weights.
        examples: pooled.
        seed: of the split, the batches and dropout.
        fitting: how.
        tower_dropout: share of rows that lack the server's embedding, and of those that lack the device's, in
            [0, 0.5); the embeddings that stand for them are fitted too.
        on_epoch: called after each epoch with its number, from 1.

    Returns:
        The epoch whose weights are kept.

    Raises:
        ConfigError: there are too few users to set some aside.
    """
    server, device = torch.from_numpy(examples.server), torch.from_numpy(examples.device)

    def logits(rows: Tensor) -> Tensor:
        embeddings = network.server_tower(server[rows]), network.device_tower(device[rows])
        if tower_dropout and network.head.training:
            draw = torch.rand(len(rows), 1)
            gone = {"server": draw < tower_dropout, "device": draw > 1 - tower_dropout}
            missing = (network.missing_embedding(side, len(rows)) for side in gone)
            embeddings = tuple(map(torch.where, gone.values(), missing, embeddings))  # type: ignore[assignment]
        return network.correction.corrected(network.head(*embeddings))

    modules = nn.ModuleList([*network.parts.values(), *([network.missing] if tower_dropout else [])])
    return _fit(modules, logits, examples, seed=seed, fitting=fitting or Fitting(), on_epoch=on_epoch)


def _fit(
    modules: nn.ModuleList,
    logits: Callable[[Tensor], Tensor],
    examples: Examples,
    *,
    seed: int,
    fitting: Fitting,
    on_epoch: OnEpoch | None,
) -> int:
    train, validation = _split(examples, fitting.validation, seed)
    labels = torch.from_numpy(examples.labels)
    without_compiler()
    optimizer = torch.optim.AdamW(modules.parameters(), lr=fitting.lr, weight_decay=fitting.weight_decay)
    best, best_epoch, kept = np.inf, 0, deepcopy(modules.state_dict())
    with _seeded(seed):
        for epoch in range(1, fitting.epochs + 1):
            modules.train()
            for rows in torch.split(train[torch.randperm(len(train))], fitting.batch):
                optimizer.zero_grad()
                binary_cross_entropy_with_logits(logits(rows), labels[rows]).backward()  # type: ignore[no-untyped-call]
                step(optimizer)
            modules.eval()
            with torch.no_grad():
                loss = float(binary_cross_entropy_with_logits(logits(validation), labels[validation]))
            if on_epoch:
                on_epoch(epoch)
            if loss < best:
                best, best_epoch, kept = loss, epoch, deepcopy(modules.state_dict())
            elif epoch - best_epoch >= fitting.patience:
                break
    modules.load_state_dict(kept)
    return best_epoch


def _split(examples: Examples, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of the users to train on, and of those to stop by."""
    aside = np.random.default_rng(seed).random(examples.users) < share
    held = aside[examples.user_of_row]
    if held.all() or not held.any():
        raise ConfigError(f"training must have enough users to set some aside, got {examples.users}")
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's global generator, which dropout draws from, under a seed and put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
