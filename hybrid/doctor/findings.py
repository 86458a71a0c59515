"""What a check finds, and how checks are run: each for a bounded time, none ending the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hybrid.errors import HybridError

Status = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: of which it is a part.
        status: "ok"; "warn": it works, and will not always; "fail": it does not; "skipped": nobody said where it is.
        found: in a sentence, without secrets, entities or features.
        fix: what to do; "" where all is well.
    """

    check: str
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """A check that is to be run.

    Attributes:
        name: as `--only` has it.
        look: gives its findings, one after the other; what it raises becomes one.
        fix: what to do where it cannot be carried out.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    fix: str

    def ok(self, found: str) -> Finding:
        """All is well."""
        return Finding(self.name, "ok", found)


def examine(checks: Sequence[Check], timeout_s: float) -> Iterator[Finding]:
    """Runs checks one after the other, and gives their findings as they come.

    Args:
        checks: each is run in a thread of its own; one that takes too long is left behind, and fails.
        timeout_s: for each.
    """
    for check in checks:
        yield from _within(check, timeout_s)


def _within(check: Check, timeout_s: float) -> list[Finding]:
    found: list[Finding] = []
    thread = threading.Thread(target=_look, args=(check, found), name=f"doctor-{check.name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    done = list(found)  # the thread may go on
    if thread.is_alive():
        fix = f"{check.fix}; or give it longer with --timeout-s"
        done.append(Finding(check.name, "fail", f"it was not done within {timeout_s:g} s", fix))
    return done


def _look(check: Check, found: list[Finding]) -> None:
    try:
        found.extend(check.look())
    except HybridError as error:
        found.append(Finding(check.name, "fail", str(error), check.fix))
    except Exception as error:
        # The class alone: a library's text may hold what must not be shown.
        found.append(Finding(check.name, "fail", f"it could not be looked at: {type(error).__name__}", check.fix))
