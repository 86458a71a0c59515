"""Answers on their way into the device's store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from device_runtime.answers import Answer, slots_of
from device_runtime.store import Served, Store
from hybrid.bundle import Manifest
from hybrid.protocol import CACHED, NONE

GENUINE = frozenset({NONE, CACHED})  # whose server side is the entity's own; what a fallback stands in for is not


class Recording(AbstractContextManager["Recording"]):
    """Notes answers about stored events, many in one transaction; all that were added, once the context ends.

    An answer without a prediction leaves the event as it is. Of one that a fallback gave, the prediction is
    kept and no contribution: the learned embedding of a missing side is no example of what the server knows.
    Where devices train the server tower too, its slots are kept, and never its embedding in their place.

    Args:
        store: that holds the events.
        manifest: of the bundle that asked.
        batch: answers in a transaction.
        now_ms: Unix time in milliseconds, UTC, which an inference is taken to have.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        batch: int = 256,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._store, self._batch, self._now_ms = store, batch, now_ms
        self._keeps_slots = slots_of(manifest) > 0
        self._waiting: list[tuple[int, int, Served]] = []

    def add(self, answer: Answer) -> None:
        """Takes one answer.

        Raises:
            StoreError: the store cannot be written; what was added since it last was is lost.
        """
        if math.isnan(answer.prediction):
            return
        contributed = answer.server_slots if self._keeps_slots else answer.server_embedding
        server = contributed if answer.fallback in GENUINE else ()
        served = Served(self._now_ms(), answer.version, answer.prediction, server, answer.feature_age_ms)
        self._waiting.append((answer.device, answer.row, served))
        if len(self._waiting) >= self._batch:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._store.answered(waiting)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._flush()
