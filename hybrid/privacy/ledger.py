"""The durable account of privacy spent: one file per run, written before anything is released.

`ledger.jsonl` is append-only, one JSON object a line: the budget it was opened
with, what was reserved, what was spent. It holds settings and counts, nothing
from a device. One process at a time has it open; any may read it.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hybrid.errors import BudgetExceeded, ConfigError, NotFound
from hybrid.privacy.accountant import Event, GaussianEvent, MatrixEvent, Spent, epsilon

FILE = "ledger.jsonl"


class Line(BaseModel):
    """One line of the ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Opened(Line):
    """The first line: what may be spent.

    Attributes:
        budget_epsilon, delta: of everything in this ledger together.
    """

    kind: Literal["opened"] = "opened"
    budget_epsilon: float
    delta: float


class Reserved(Line):
    """Releases that a process set out to make. They cost nothing until they are spent.

    Attributes:
        events: what they would cost.
        time: when it was written.
    """

    kind: Literal["reserved"] = "reserved"
    events: tuple[Annotated[MatrixEvent | GaussianEvent, Field(union_mode="left_to_right")], ...]
    time: AwareDatetime


class Entry(Line):
    """One release that was made, or would have been had its process lived on.

    Attributes:
        purpose: what was released, e.g. "train".
        mechanism: that made it.
        noise_multiplier: standard deviation of the noise over `clip`.
        sampling: Poisson sampling probability of each person, in (0, 1].
        clip: L2 norm that one person moves the sum by, at most.
        round, attempt: which release of this purpose it was.
        time: when it was written.
    """

    kind: Literal["spent"] = "spent"
    purpose: str
    mechanism: Literal["gaussian"] = "gaussian"
    noise_multiplier: float
    sampling: float
    clip: float
    round: int
    attempt: int
    time: AwareDatetime

    @property
    def event(self) -> GaussianEvent:
        """What it costs."""
        return GaussianEvent(self.noise_multiplier, self.sampling)


class MatrixEntry(Line):
    """One step of a matrix mechanism, released or not. The first costs what all of them do, the others nothing more.

    Attributes:
        purpose: what was released, e.g. "train".
        mechanism: that made it.
        noise_multiplier, sensitivity, rounds, separation: of the whole, see `MatrixEvent`.
        step: of the horizon, from 1.
        clip: L2 norm that one person moves one sum by, at most.
        horizon: tells it from others of the same mechanism, each of which costs as much; None: the only one.
        round, attempt: which release of this purpose it was.
        time: when it was written.
    """

    kind: Literal["matrix"] = "matrix"
    purpose: str
    mechanism: Literal["matrix"] = "matrix"
    noise_multiplier: float
    sensitivity: float
    rounds: int
    separation: int
    step: int
    clip: float
    horizon: str | None = None
    round: int
    attempt: int
    time: AwareDatetime

    @property
    def event(self) -> MatrixEvent:
        """What all steps cost together."""
        return MatrixEvent(self.noise_multiplier, self.sensitivity, self.rounds, self.separation)


AnyEntry = Entry | MatrixEntry


def costs(entries: Iterable[AnyEntry]) -> list[Event]:
    """What releases cost: each plain one its own, the steps of one matrix mechanism theirs once.

    The steps of a mechanism ascend. One that does not is of another mechanism, or
    was done again with other noise: either way all of it is counted again. One of
    another horizon is counted whatever its step: its first may never have been written.

    Args:
        entries: in the order in which they were written.
    """
    found: list[Event] = []
    last = _Steps()
    for entry in entries:
        if not last.paid(entry):
            found.append(entry.event)
        last.note(entry)
    return found


class _Steps:
    """The last step of each matrix mechanism, by purpose, event and horizon."""

    def __init__(self, entries: Iterable[AnyEntry] = ()) -> None:
        self._last: dict[tuple[str, MatrixEvent, str | None], int] = {}
        for entry in entries:
            self.note(entry)

    def paid(self, entry: AnyEntry) -> bool:
        """Whether it is one more step of a mechanism that is paid for."""
        if isinstance(entry, Entry):
            return False
        return 0 < self._last.get((entry.purpose, entry.event, entry.horizon), 0) < entry.step

    def note(self, entry: AnyEntry) -> None:
        """It is in the ledger."""
        if isinstance(entry, MatrixEntry):
            self._last[entry.purpose, entry.event, entry.horizon] = entry.step


@dataclass(frozen=True)
class Lost:
    """A stretch of the file that cannot be read.

    Attributes:
        releases: that it may have held, at most; >= 1.
    """

    releases: int


SHORTEST_ENTRY = 155  # bytes of a line of an `Entry` with a purpose of one letter, its end included

AnyLine = Opened | Reserved | Entry | MatrixEntry
_LINE: TypeAdapter[AnyLine] = TypeAdapter(Annotated[AnyLine, Field(discriminator="kind")])


@dataclass(frozen=True)
class Account:
    """What a ledger says, as it was when it was read. `Ledger.read` gives one.

    Attributes:
        budget_epsilon, delta: what may be spent.
        entries: every release that can be read, in order.
        lost: what is counted for stretches that cannot be read; empty in an undamaged file.
    """

    budget_epsilon: float
    delta: float
    entries: tuple[AnyEntry, ...]
    lost: tuple[Event, ...] = ()

    def events(self) -> list[Event]:
        """What all releases cost: first those that were lost, then the entries, see `costs`."""
        return [*self.lost, *costs(self.entries)]

    def spent(self) -> Spent:
        """What all releases cost together, at `delta`."""
        return epsilon(self.events(), self.delta)


class Ledger:
    """A run's account. Get one from `Ledger.open`, and close it, or use it in a `with` block.

    A run reserves all its releases at its start, which composes them once; each
    release then counts against the reservation, without composing anew. A
    reservation ends with its process; what was spent stays.

    Attributes:
        budget_epsilon, delta: what may be spent.
        entries: every release so far, in order.
    """

    def __init__(self, descriptor: int, lines: Sequence[AnyLine | Lost], opened: Opened) -> None:
        account = _account(opened, lines)
        self.budget_epsilon, self.delta = account.budget_epsilon, account.delta
        self.entries = list(account.entries)
        self._descriptor = descriptor
        self._lost = account.lost
        self._attempts = {(entry.purpose, entry.round): entry.attempt for entry in self.entries}
        self._steps = _Steps(self.entries)
        self._reserved: Counter[Event] = Counter()  # keys count one release, or one mechanism

    @classmethod
    def open(cls, folder: Path, *, budget_epsilon: float, delta: float) -> Ledger:
        """Opens the ledger of a run, or starts one, and keeps other processes out until it is closed.

        A line that cannot be read, as a power cut may leave one, counts as the
        costliest release that the ledger knows of, and as many of them as its
        length can hold: damage is never taken for less spent. Whoever may write
        the file can of course rewrite it: it is an account, not a seal.

        Args:
            folder: of the run, `runs/<run>`; made where it is missing.
            budget_epsilon: that all releases together may cost; > 0.
            delta: in (0, 1).

        Raises:
            ConfigError: a setting is out of range or not what the ledger was started with;
                another process has it open; or the file is damaged beyond a bound.
        """
        if not 0 < budget_epsilon < float("inf"):
            raise ConfigError(f"budget_epsilon must be finite and > 0, got {budget_epsilon!r}")
        if not 0 < delta < 1:
            raise ConfigError(f"delta must be in (0, 1), got {delta!r}")
        folder.mkdir(parents=True, exist_ok=True)
        wanted = Opened(budget_epsilon=budget_epsilon, delta=delta)
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _lock(descriptor, folder)
            return cls(descriptor, _start_or_read(descriptor, folder, wanted), wanted)
        except BaseException:
            os.close(descriptor)
            raise

    @staticmethod
    def read(folder: Path) -> Account:
        """Reads the ledger of a run without opening it: no lock is taken and nothing is written.

        A training may be writing it meanwhile. Damage counts as it does for `open`,
        and so does a line of which only a part is there yet.

        Args:
            folder: of the run, `runs/<run>`.

        Raises:
            NotFound: the run has no ledger.
            ConfigError: the file is damaged beyond a bound.
        """
        try:
            content = (folder / FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            content = b""
        if not content:
            raise NotFound(f"run {folder.name!r} has no ledger: no privacy was spent in it")
        opened, lines = _lines(content, folder)
        return _account(opened, lines)

    def reserve(self, events: Iterable[Event]) -> None:
        """Sets releases aside, all or none: what is reserved can be spent without asking again.

        A matrix mechanism is set aside whole.

        Raises:
            BudgetExceeded: with what is spent and reserved they would pass the budget. Nothing was written.
        """
        events = tuple(events)
        outstanding = [each for event, count in (+self._reserved).items() for each in _times(event, count)]
        total = epsilon([*self._spent_events(), *outstanding, *events], self.delta)
        if total.epsilon > self.budget_epsilon:
            raise BudgetExceeded(
                f"budget_epsilon is {self.budget_epsilon:g} at delta {self.delta:g}; "
                f"{len(self.entries) + len(self._lost)} releases made and those asked for would cost "
                f"{total.epsilon:.4g} together ({total.method})"
            )
        self._append(Reserved(events=events, time=datetime.now(UTC)))
        for event in events:
            one = event if isinstance(event, MatrixEvent) else replace(event, count=1)
            self._reserved[one] += 1 if isinstance(event, MatrixEvent) else event.count

    def spend(
        self,
        event: Event,
        *,
        purpose: str,
        clip: float,
        round_number: int,
        attempt: int = 1,
        step: int | None = None,
        horizon: str | None = None,
    ) -> None:
        """Writes one release to the disk. Call it before the noise is drawn; release only if it returns.

        Args:
            event: its cost, with count 1. Where it was not reserved, it is now.
            purpose: what is released, e.g. "train".
            clip: L2 norm that one person moves the sum by, at most.
            round_number: of the purpose.
            attempt: at the round, from 1: see `next_attempt`.
            step: of the horizon of a `MatrixEvent`, from 1; None for a `GaussianEvent`. The first that is written is
                charged for all; each later one is free, and one that does not come after the last is charged for all
                again.
            horizon: names it, where one of the same mechanism may have been begun in this ledger before.

        Raises:
            BudgetExceeded: it was not reserved and would pass the budget. Nothing was written.
            ConfigError: the attempt is in the ledger already, the event counts more than one release, or the
                step is outside the horizon.
        """
        entry = _entry(event, step, horizon, purpose=purpose, clip=clip, round=round_number, attempt=attempt)
        if attempt < self.next_attempt(purpose, round_number):
            raise ConfigError(
                f"attempt {attempt} at {purpose} round {round_number} is in the ledger already: it needs a new one"
            )
        paid = self._steps.paid(entry)
        if not paid and not self._reserved[event]:
            self.reserve([event])
        self._append(entry)
        if not paid:
            self._reserved[event] -= 1
        self._steps.note(entry)
        self._attempts[purpose, round_number] = attempt
        self.entries.append(entry)

    def next_attempt(self, purpose: str, round_number: int) -> int:
        """The number of the next attempt at a round: after a crash, never one whose noise may have been seen."""
        return self._attempts.get((purpose, round_number), 0) + 1

    def spent(self) -> Spent:
        """What all releases so far cost together, at `delta`."""
        return epsilon(self._spent_events(), self.delta)

    def close(self) -> None:
        """Lets other processes have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _spent_events(self) -> list[Event]:
        return [*self._lost, *costs(self.entries)]

    def _append(self, line: Line) -> None:
        try:
            _write(self._descriptor, line)
        except OSError:
            self.close()  # half a line may be on the disk: only a new reading knows
            raise


def _entry(event: Event, step: int | None, horizon: str | None, **about: Any) -> AnyEntry:
    """Raises: ConfigError: the event is of more than one release, or the step is not of its horizon."""
    about["time"] = datetime.now(UTC)
    if isinstance(event, GaussianEvent):
        assert step is None
        assert horizon is None
        if event.count != 1:
            raise ConfigError(f"count must be 1, one entry for each release, got {event.count}")
        return Entry(noise_multiplier=event.noise_multiplier, sampling=event.sampling, **about)
    if step is None or not 1 <= step <= event.rounds:
        raise ConfigError(f"step must be in [1, {event.rounds}], the horizon that is paid for, got {step!r}")
    return MatrixEntry(**asdict(event), step=step, horizon=horizon, **about)


def _times(event: Event, count: int) -> list[Event]:
    return [event] * count if isinstance(event, MatrixEvent) else [replace(event, count=count)]


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"the ledger of run {folder.name!r} is open in another process: wait for it to end") from None


def _start_or_read(descriptor: int, folder: Path, wanted: Opened) -> list[AnyLine | Lost]:
    content = _read(descriptor)
    if not content:
        _write(descriptor, wanted)
        for holder in (folder, folder.parent):
            _sync_folder(holder)
        return [wanted]
    if not content.endswith(b"\n"):
        _write_all(descriptor, b"\n")  # so that what follows is a line of its own
    opened, lines = _lines(content, folder)
    for name in ("budget_epsilon", "delta"):
        if getattr(opened, name) != getattr(wanted, name):
            raise ConfigError(
                f"{name} of run {folder.name!r} must stay {getattr(opened, name)!r}, got {getattr(wanted, name)!r}"
            )
    return lines


def _lines(content: bytes, folder: Path) -> tuple[Opened, list[AnyLine | Lost]]:
    """The budget, and all lines.

    Raises:
        ConfigError: the budget cannot be read.
    """
    lines = [_parse(line) for line in content.splitlines()]
    opened = lines[0]
    if not isinstance(opened, Opened):
        raise ConfigError(f"the ledger of run {folder.name!r} is damaged in its first line: start another run")
    return opened, lines


def _account(opened: Opened, lines: Sequence[AnyLine | Lost]) -> Account:
    """Raises: ConfigError: something was lost, and no line tells what it may have cost."""
    entries = tuple(line for line in lines if isinstance(line, AnyEntry))
    lost = sum(line.releases for line in lines if isinstance(line, Lost))
    return Account(opened.budget_epsilon, opened.delta, entries, (_costliest(lines),) * lost if lost else ())


def _parse(line: bytes) -> AnyLine | Lost:
    try:
        return _LINE.validate_json(line)
    except (ValidationError, ConfigError):
        return Lost(1 if len(line) < 2 * SHORTEST_ENTRY else math.ceil((len(line) + 1) / SHORTEST_ENTRY))


def _costliest(lines: Sequence[AnyLine | Lost]) -> GaussianEvent:
    """The least noise and the highest sampling of any release that a lost line may have been.

    Raises:
        ConfigError: no line tells.
    """
    events: list[Event] = [line.event for line in lines if isinstance(line, AnyEntry)]
    events += [event for line in lines if isinstance(line, Reserved) for event in line.events]
    if not events:
        raise ConfigError("the ledger is damaged, and no line of it says what its releases cost: start another run")
    plain = [event.gaussian if isinstance(event, MatrixEvent) else event for event in events]
    return GaussianEvent(min(e.noise_multiplier for e in plain), max(e.sampling for e in plain))


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _write(descriptor: int, line: Line) -> None:
    _write_all(descriptor, line.model_dump_json().encode() + b"\n")


def _write_all(descriptor: int, content: bytes) -> None:
    if os.write(descriptor, content) != len(content):
        raise OSError("the disk took half a line of the ledger")
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
