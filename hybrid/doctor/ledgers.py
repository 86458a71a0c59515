"""Privacy ledgers: whether each can be read, is whole, and can be gone on with."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from hybrid.doctor.findings import Finding
from hybrid.errors import ConfigError
from hybrid.privacy.ledger import FILE, Ledger

NAME = "ledgers"
RESTORE = "put back the copy that you kept of it; without one, start another run: what this one spent is not known"
PROC = Path("/proc")


def ledgers(runs: Path, proc: Path = PROC) -> Iterator[Finding]:
    """Looks at every ledger below the folder of the runs.

    Args:
        runs: one folder per run; a federation's aggregators have theirs below it.
        proc: where the system tells of its processes.
    """
    files = sorted(runs.rglob(FILE)) if runs.is_dir() else []
    if not files:
        yield Finding(NAME, "skipped", f"there is no ledger in {runs}")
        return
    bad = [list(_ledger(file, str(file.parent.relative_to(runs)), proc)) for file in files]
    yield from chain.from_iterable(bad)
    if well := bad.count([]):
        yield Finding(NAME, "ok", f"{well} of {len(files)} can be read, are whole, and nobody unseen holds them")


def _ledger(file: Path, run: str, proc: Path) -> Iterator[Finding]:
    """What is wrong with one."""
    try:
        account = Ledger.read(file.parent)
    except ConfigError as error:
        yield Finding(NAME, "fail", f"{run}: {error}", RESTORE)
        return
    except OSError as error:
        fix = f"give the account that runs `hybrid` the right to read {file} (it is its owner's alone)"
        yield Finding(NAME, "fail", f"{run}: it cannot be read: {type(error).__name__}", fix)
        return
    if account.lost:
        found = (
            f"{run}: it is damaged; what cannot be read counts as {len(account.lost)} releases, the costliest there are"
        )
        yield Finding(NAME, "warn", found, "put back the copy that you kept of it, if it has more lines")
    if _locked(file) and not _holders(file, proc):
        found = f"{run}: it is locked by a process that is not seen here"
        fix = (
            "wait, if a training runs on another machine or in another container; if none does, a child that it left "
            f"behind has it open: `fuser {file}` on the machine with the disk names it, and its end frees the ledger"
        )
        yield Finding(NAME, "warn", found, fix)


def _locked(file: Path) -> bool:
    """Whether another process keeps others out, as `Ledger.open` does; tried for an instant, and shared."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # not every file system has locks
        return True
    finally:
        os.close(descriptor)
    return False


def _holders(file: Path, proc: Path) -> list[int]:
    """The processes that have the file open, of those that this one may see."""
    found = []
    for descriptor in proc.glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if descriptor.readlink() == file.resolve():
                found.append(int(descriptor.parts[-3]))
    return found
