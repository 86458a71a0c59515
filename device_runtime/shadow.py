"""Asks about a row a second time, with the bundle of a shadow, once the default's answer is there.

What gateway and worker count of the shadow's requests is all that it is for: its answers are thrown away. Nobody waits
for it: it has a thread of its own, which asks about one row at a time; a row that comes meanwhile is dropped. Where
the server merges, the row's embedding is released a second time, by the shadow's tower and as its signed manifest
declares; so a shadow is here only where the host app lets it, and one that is served no more is asked no more.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Self

from device_runtime.answers import Answer
from device_runtime.client import InferenceClient
from device_runtime.rows import Rows
from hybrid.errors import HybridError, UpdateRequired

BUSY = 429  # and above: the gateway has too much to do, or something fails, and is not asked twice
LEAVE_S = 1.0  # for the row that it is at, when the context ends


class Shadow:
    """Asks about rows again, and tells nobody what comes of it.

    Args:
        client: -> one of the shadow's bundle. Called in the thread, which may take long or fail.
    """

    def __init__(self, client: Callable[[], InferenceClient]) -> None:
        self._client, self._offered, self._free = client, SimpleQueue[Rows | None](), threading.Semaphore()
        # A daemon: a shadow that hangs keeps no process from its end.
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()), name="shadow", daemon=True)

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._offered.put(None)
        await asyncio.to_thread(self._thread.join, LEAVE_S)

    def offer(self, row: Rows, answer: Answer) -> None:
        """Asks about a row, if it is free; returns at once.

        Args:
            row: one.
            answer: of the default.
        """
        if 0 < answer.http_status < BUSY and self._free.acquire(blocking=False):
            self._offered.put(row)

    async def _work(self) -> None:
        gone = False

        def look(answer: Answer) -> None:  # at nothing but this
            nonlocal gone
            gone = answer.http_status == UpdateRequired.status

        with suppress(HybridError):  # without a client nothing is asked
            async with self._client() as client:
                # The loop is this thread's own, and has nothing else to do while it waits for a row.
                while not gone and (row := self._offered.get()) is not None:
                    with suppress(Exception):  # the server has counted it
                        await client.run(iter([row]), look, concurrency=1)
                    self._free.release()
