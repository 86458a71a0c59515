"""What the console does for its people, one thing at a time, while the page stays there."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType

from hybrid.console.sessions import Refused
from hybrid.console.steps import Seen, Step
from hybrid.errors import HybridError

QUICK_S = 2.0  # that an answer waits for what may be done at once

log = logging.getLogger(__name__)
Perform = Callable[[Step, Seen], str]
"""Does a step to the rollout that was seen, and to no other, and says what it did; raises a HybridError that says
why it did not."""


@dataclass(frozen=True)
class Work:
    """One step, while it is at work and after.

    Attributes:
        step: that it is.
        began, ended: in UTC; None: it is at work.
        said: what it did, or why it did not.
        failed: whether it did not.
    """

    step: Step
    began: datetime
    ended: datetime | None = None
    said: str = ""
    failed: bool = False


class Desk(AbstractContextManager["Desk"]):
    """Does one step at a time, in a thread of its own; the end of the block waits for it.

    Args:
        perform: does it.
        now: in UTC.
    """

    def __init__(self, perform: Perform, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._perform, self._now, self._alone = perform, now, threading.Lock()
        self._thread = ThreadPoolExecutor(1, "console-work")
        self._works: dict[str, Work] = {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()

    def begin(self, step: Step, seen: Seen) -> None:
        """Begins a step, and gives it a moment to be done.

        Raises:
            Refused: another is at work.
        """
        with self._alone:
            for other in self._works.values():
                if other.ended is None:
                    raise Refused(409, f"“{other.step.title}” is at work: one thing at a time. Nothing was done")
            self._works[step.model] = Work(step, self._now())
        log.info("begins: %s", step.title)
        wait([self._thread.submit(self._do, step, seen)], QUICK_S)

    def latest(self, model: str) -> Work | None:
        """What was done last to a model, or is at work, since the console began."""
        with self._alone:
            return self._works.get(model)

    def _do(self, step: Step, seen: Seen) -> None:
        failed = True
        try:
            said, failed = self._perform(step, seen), False
        except HybridError as error:
            said = str(error)
        except Exception as error:  # its text may name what no page and no log should
            at = traceback.extract_tb(error.__traceback__)[-1]
            said = f"an error that nobody foresaw ({type(error).__name__}): the console's log says where, not why"
            log.error("%s in %s, line %s", type(error).__name__, at.filename, at.lineno)
        log.info("%s: %s", "failed" if failed else "done", step.title)
        with self._alone:
            done = self._works[step.model]
            self._works[step.model] = replace(done, ended=self._now(), said=said, failed=failed)
