"""Several processes of one kind under one parent: what dies is started again, a signal ends all in order.

Each child is started by its number, has a place of its own (the gateway's: a
reply partition), and ends by itself when its parent is gone, however that went.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType

log = logging.getLogger(__name__)

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 30.0  # between two starts of a child; doubles while it dies young
OLD_S = 60.0  # a child that lived as long starts again after the first delay


def supervise(start: Callable[[int], SpawnProcess], count: int, drain_s: float) -> None:
    """Keeps `count` children running until SIGTERM or SIGINT; then ends them and returns.

    Args:
        start: number of a child -> the child, started.
        count: how many; numbers are 0 to count - 1.
        drain_s: a child that is told to end has this long, then it is killed.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    stopping = threading.Event()

    def stop(_: int, __: FrameType | None) -> None:
        stopping.set()
        with suppress(BlockingIOError):
            os.write(write, b"\0")  # wakes the wait below

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    children = [_Child(start, number) for number in range(count)]
    try:
        while not stopping.is_set():
            for child in children:
                child.keep()
            due_s = min((child.due_s for child in children), default=LONGEST_DELAY_S)
            alive = [child.process.sentinel for child in children if child.process is not None]
            wait([read, *alive], timeout=due_s)
    finally:
        _end([child.process for child in children if child.process is not None], drain_s)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def end_with_parent() -> None:
    """To be called in a child: sends it SIGTERM when its parent is gone."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class _Child:
    """One place, and the process that has it; None between two of them."""

    def __init__(self, start: Callable[[int], SpawnProcess], number: int) -> None:
        self._start, self._number = start, number
        self.process: SpawnProcess | None = None
        self._started_s, self._next_s, self._delay_s = 0.0, 0.0, FIRST_DELAY_S

    @property
    def due_s(self) -> float:
        """Seconds until there is something to do that no sentinel tells."""
        return LONGEST_DELAY_S if self.process is not None else max(0.0, self._next_s - time.monotonic())

    def keep(self) -> None:
        """Notes its end; starts it where it is due."""
        now_s = time.monotonic()
        if self.process is not None and self.process.exitcode is not None:
            old = now_s - self._started_s >= OLD_S
            self._next_s = now_s if old else self._started_s + self._delay_s
            self._delay_s = FIRST_DELAY_S if old else min(2 * self._delay_s, LONGEST_DELAY_S)
            log.error("process %d ended with %s and is started again", self._number, self.process.exitcode)
            self.process.close()
            self.process = None
        if self.process is None and now_s >= self._next_s:
            self._started_s = now_s
            self.process = self._start(self._number)


def _end(processes: list[SpawnProcess], drain_s: float) -> None:
    """SIGTERM to all, SIGKILL to those that are there after `drain_s`."""
    for process in processes:
        process.terminate()
    deadline_s = time.monotonic() + drain_s
    for process in processes:
        process.join(max(0.0, deadline_s - time.monotonic()))
        if process.exitcode is None:
            log.error("process %s did not end in %g s and is killed", process.name, drain_s)
            process.kill()
            process.join()
