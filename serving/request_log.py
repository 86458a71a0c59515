"""Keeps a share of the rows that were predicted, so that `hybrid skew` can compare them with the offline store."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.protocol import NONE, OK
from hybrid.request_log import SUFFIX
from serving.merge import Batch, Joined

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20


def _name() -> str:
    """In containers every process may have the same id, and all of them one folder."""
    return f"{socket.gethostname()}-{os.getpid()}{SUFFIX}"


class RequestLog:
    """Appends to a file of this process, its owner's alone; see `hybrid.request_log`. Threads may share it.

    What cannot be written is not: it is said once, and serving goes on.

    Args:
        folder: of the log.
        share: of the rows, in [0, 1]; each is drawn by itself.
        max_bytes: of the file; then no more is kept.
        random: draws.

    Raises:
        ConfigError: `share` is not one.
    """

    def __init__(
        self,
        folder: Path,
        share: float,
        *,
        max_bytes: int = MAX_BYTES,
        random: np.random.Generator | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"--log-sample must be in [0, 1], got {share}")
        self._file, self._share, self._left = folder / _name(), share, max_bytes
        self._random, self._lock = random or np.random.default_rng(), Lock()

    def sample(self, batch: Batch, joined: Joined, prediction: NDArray[np.float32], now_ms: int) -> None:
        """Keeps its share of the rows of which neither side is missing."""
        if not self._share:
            return
        with self._lock:
            drawn = self._random.random(len(batch)) < self._share
            predicted = np.isfinite(prediction) | batch.on_device  # there the prediction stays on the device
            merged = (joined.status == OK) & (joined.fallback == NONE) & predicted
            chosen = np.flatnonzero(drawn & merged)
            self._write(b"".join(_line(batch, joined, prediction, now_ms, row) for row in chosen.tolist()))

    def _write(self, lines: bytes) -> None:
        if not lines or not self._left:
            return
        if len(lines) > self._left:
            log.warning("the request log is full: no more requests are kept")
            self._left = 0
            return
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
                file.write(lines)
        except OSError as error:
            log.error("the request log cannot be written, no more requests are kept: %s", error.strerror)
            self._left = 0
        self._left = max(self._left - len(lines), 0)


def _line(batch: Batch, joined: Joined, prediction: NDArray[np.float32], now_ms: int, row: int) -> bytes:
    served, slots = batch.deployment, joined.slots[row].tolist()
    document: dict[str, Any] = {
        "request_id": batch.request_id[row].tobytes().hex(),
        "model": served.model,
        "version": served.version,
        "definition_hash": served.definition_hash,
        "entity": batch.entity[row],
        "merged_ms": now_ms,
        "feature_ms": now_ms - int(joined.age_ms[row]),
        "server": slots[: len(served.server)],
        "request": slots[len(served.server) :],
        "score": None if batch.on_device else float(prediction[row]),
    }
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)  # NaN becomes null
