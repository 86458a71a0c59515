"""Time, as rounds need it: they close by the clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

_T = TypeVar("_T")
_LOOK_S = 0.05


class Clock(Protocol):
    """What a round waits by."""

    def now_ms(self) -> int:
        """Unix time in UTC, as devices have it too."""
        ...

    def wait(self, stop: threading.Event, until_ms: int) -> None:
        """Returns at that time, or once `stop` is set."""
        ...


class SystemClock:
    """The machine's; one that is set anew is noticed within a second."""

    def now_ms(self) -> int:
        """See `Clock`."""
        return time.time_ns() // 1_000_000

    def wait(self, stop: threading.Event, until_ms: int) -> None:
        """See `Clock`."""
        while not stop.is_set() and (left_ms := until_ms - self.now_ms()) > 0:
            stop.wait(min(left_ms / 1e3, 1.0))


@dataclass
class ManualClock:
    """Goes forward when it is told to: for tests and measurements, whose rounds end when all have come.

    Attributes:
        at_ms: what it shows; at first the machine's time, so that devices take its plans.
        waited_for: set while somebody waits for a later time.
    """

    at_ms: int = field(default_factory=lambda: SystemClock().now_ms())
    waited_for: threading.Event = field(default_factory=threading.Event)
    _moved: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def now_ms(self) -> int:
        """See `Clock`."""
        return self.at_ms

    def wait(self, stop: threading.Event, until_ms: int) -> None:
        """See `Clock`."""
        self.waited_for.set()
        with self._moved:
            while self.at_ms < until_ms and not stop.is_set():
                self._moved.wait(_LOOK_S)  # `stop` is another's, and cannot wake it
        self.waited_for.clear()

    def forward(self, seconds: float) -> None:
        """Shows a later time."""
        with self._moved:
            self.at_ms += round(1e3 * seconds)
            self._moved.notify_all()

    @contextmanager
    def during(self, waits: Callable[[], _T], seconds: float) -> Iterator[Future[_T]]:
        """Runs something that waits for this clock beside the block, which begins once it does.

        Args:
            waits: run in a thread.
            seconds: by which the clock goes forward at the block's end.

        Yields:
            What comes of it, done once the block has ended.
        """
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(waits)
            while not self.waited_for.wait(_LOOK_S) and not future.done():
                pass
            try:
                yield future
            finally:
                self.forward(seconds)
