"""Runs a shadow beside the default: the server tower of either, on what the server knows of a live batch anyway.

A device's part is no use to it: an embedding of the default's device tower means nothing to another version's head. So
the head, where the server merges, is given the embedding that was learned for a missing device. All that is counted is
computed from the feature store's rows and the request's features, which are the server's already: no person's device
says anything for it, and no privacy is spent.

Both run again, without a cache, one after the other, so that their seconds can be compared; once the batch was
answered, in a thread of its own, one batch at a time. What comes meanwhile is dropped, and counted.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Self

import numpy as np

from hybrid.deployment import Deployment
from hybrid.errors import Unavailable
from hybrid.protocol import OK
from serving.merge import Batch, Joined
from serving.telemetry import Telemetry
from serving.triton import Float32, Models

log = logging.getLogger(__name__)

DROPPED, NOT_FINITE = "dropped", "not_finite"  # beside "ok", and "unavailable" where Triton failed


class Shadows:
    """The shadows of one worker.

    Args:
        models: the networks, without a cache.
        telemetry: counts what comes of them.
        threads: runs one batch at a time; closed with it.
        draw: -> a number in [0, 1), for each batch; below the share the shadow runs on it.
    """

    def __init__(
        self,
        models: Models,
        telemetry: Telemetry,
        *,
        threads: Executor | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._models, self._telemetry, self._draw = models, telemetry, draw
        self._threads = threads or ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._free = threading.Semaphore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def offer(self, batch: Batch, joined: Joined, shadow: Deployment, share: float) -> None:
        """Runs a shadow on a batch that was answered by the default, if it is drawn; returns at once.

        Args:
            batch: rows.
            joined: the server's side of them.
            shadow: which; it reads the same features.
            share: of batches, see `hybrid.deployment.Shadow`.
        """
        slots = joined.slots[joined.with_server]
        if not len(slots) or self._draw() >= share:
            return
        if not self._free.acquire(blocking=False):
            self._telemetry.shadowed(shadow, len(slots), DROPPED)
            return
        self._threads.submit(self._run, slots, batch.deployment, shadow)

    def _run(self, slots: Float32, default: Deployment, shadow: Deployment) -> None:
        compared = bool(default.missing_device and shadow.missing_device)
        try:
            for deployment in (default, shadow):
                begun = time.perf_counter()
                code, prediction = self._forward(slots, deployment)
                seconds = time.perf_counter() - begun
                self._telemetry.shadowed(deployment, len(slots), code, seconds, prediction if compared else None)
        except Exception as error:
            log.error("a shadow failed: %s", type(error).__name__)
        finally:
            self._free.release()

    def _forward(self, slots: Float32, deployment: Deployment) -> tuple[str, Float32 | None]:
        """What became of it, and (n,) predictions where the server merges and all of them are numbers."""
        version = deployment.version
        try:
            server = self._models.infer(deployment.server_tower, version, {"slots": slots}, "embedding")
            if not np.isfinite(server).all():
                return NOT_FINITE, None
            if deployment.merge == "device":
                return OK, None
            # Without a learned one, zeros: whether the head is there and how long it takes can be seen of them too.
            learned = np.array(deployment.missing_device or np.zeros(deployment.device_embedding), np.float32)
            both = {"server": server, "device": np.tile(learned, (len(slots), 1))}
            prediction = self._models.infer(deployment.head, version, both, "prediction").reshape(-1)
        except Unavailable as error:
            return error.code, None
        return (OK, prediction) if np.isfinite(prediction).all() else (NOT_FINITE, None)
