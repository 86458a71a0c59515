"""A simulated fleet: which devices are there when a round asks, and which of them finish before it closes.

A trace (a public file) describes classes of devices. A fleet is drawn from it:
columns, never one object per device. A round asks the fleet who attends; what
those devices compute is the engine's business.

What this does to privacy. Sampling stays Poisson: each device tosses one coin
per round and attempt, by itself, and takes part only where it fell below
`sampling`. Being away, dropping out and being late only ever turn a
contribution into zero, and the round is released when its time is up, whoever
came, over a denominator fixed before. So the noised sum is that of Poisson
sampling with `sampling`, after over-selection, with some contributions zero,
whoever chose whom to keep away, if no coin told them, of this round or before.
Charge `sampling`: no device takes part with a higher probability.

What is not claimed. The theorem is about the sum alone. The exact count of a
round, of those selected or those who finished, does not depend on what a
contribution was, but it depends on the coins, which amplification takes to be
unseen: beside the sum it is not covered (docs/decisions/0009 has the numbers).
So these counts stay in the aggregator, and in a simulation's report they are
oracle. And whether a device finishes depends on how many examples it has, so
that the count of those who finished says something of that number.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from hybrid.errors import ConfigError
from hybrid.spec import Declared, Name

PHONES = Path(__file__).with_name("traces") / "phones.toml"  # synthetic; its header says after what
HOUR = 3600.0
FLEET = 2  # stream of a run's seed, beside those of `hybrid.federation.aggregator`

Probability = Annotated[FiniteFloat, Field(ge=0, le=1)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
NonNegative = Annotated[FiniteFloat, Field(ge=0)]


class DeviceClass(BaseModel):
    """Devices that are alike. Times are of the median device: one device's are `slowness` times as long.

    Attributes:
        name: of the class.
        share: of the fleet.
        startup_seconds: from being selected to having the program loaded.
        seconds_per_example: of training, for each example and local step.
        download_bytes_per_second, upload_bytes_per_second: of its network.
        dropout: probability that one which takes part is lost in mid-round, whatever its time.
        spread: standard deviation of the logarithm of `slowness`, which is normal with mean 0; at most 5.
        availability: (24,) probability of being idle, charging and on an unmetered network
            at 00:00, 01:00, ... 23:00 local time; linear in between.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    share: Probability
    startup_seconds: NonNegative = 0.0
    seconds_per_example: NonNegative
    download_bytes_per_second: Positive
    upload_bytes_per_second: Positive
    dropout: Probability
    spread: Annotated[FiniteFloat, Field(ge=0, le=5)] = 0.0
    availability: Annotated[tuple[Probability, ...], Field(min_length=24, max_length=24)]


class TimeZone(BaseModel):
    """Where a share of the fleet lives.

    Attributes:
        utc_offset_hours: local time minus UTC, in [-12, 14].
        share: of the fleet, in every class alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    utc_offset_hours: Annotated[FiniteFloat, Field(ge=-12, le=14)]
    share: Probability


class Trace(Declared):
    """What is publicly known of a fleet, and how often it is asked.

    Attributes:
        classes: of devices; their shares sum to 1.
        time_zones: their shares sum to 1.
        round_minutes: from the start of one round to that of the next; > 0.
        start_hour: of round 1, UTC, in [0, 24).
        habit: share of days on which a device keeps the hours that it usually keeps, in
            [0, 1]; on the others its hours are drawn anew.

    Raises:
        ConfigError: a field is wrong; the message names it, what it must be and what it got.
    """

    classes: Annotated[tuple[DeviceClass, ...], Field(min_length=1, max_length=256)]
    time_zones: Annotated[tuple[TimeZone, ...], Field(min_length=1, max_length=256)]
    round_minutes: Positive
    start_hour: Annotated[FiniteFloat, Field(ge=0, lt=24)] = 0.0
    habit: Probability = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for where, parts in (("classes", self.classes), ("time_zones", self.time_zones)):
            total = math.fsum(part.share for part in parts)
            if not math.isclose(total, 1.0, abs_tol=1e-6):
                raise ValueError(f"the shares of {where} must sum to 1, got {total:g}")
        names = [one.name for one in self.classes]
        if len(set(names)) < len(names):
            raise ValueError(f"classes must have distinct names, got {names}")
        return self

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Reads a trace from a TOML file such as `PHONES`.

        Raises:
            ConfigError: the file does not exist, is no TOML, or a field is wrong; the message
                names the file, the field, what it must be and what it got.
        """
        try:
            return cls(**tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"trace {str(path)!r} must be a readable file, got {type(error).__name__}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path.name} must be TOML: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{path.name}: {error}") from None

    def start_s(self, number: int) -> float:
        """When round `number`, counted from 1, starts: seconds since midnight, UTC, of the first day."""
        return self.start_hour * HOUR + (number - 1) * self.round_minutes * 60.0

    def available_share(self, time_s: ArrayLike) -> NDArray[np.float64]:
        """The share of each class that is available.

        Args:
            time_s: (t,) seconds since midnight, UTC, of the first day.

        Returns:
            (t, classes) probabilities.
        """
        hours = np.atleast_1d(np.asarray(time_s, dtype=np.float64)) / HOUR
        zones = [(zone.share, self._chance(hours + zone.utc_offset_hours)) for zone in self.time_zones]
        return np.asarray(np.sum([share * chance for share, chance in zones], axis=0))

    def _chance(self, local_hours: NDArray[np.float64]) -> NDArray[np.float64]:
        """(t,) local time -> (t, classes) probability of being available then."""
        curves = [np.interp(local_hours % 24, np.arange(25), _closed(one)) for one in self.classes]
        return np.stack(curves, axis=-1)


@dataclass(frozen=True)
class Work:
    """What a round asks of each device, and until when. The same for all: it is in the plan.

    Attributes:
        steps: local steps, each over all of the device's examples; >= 1.
        download_bytes, upload_bytes: of weights and update; >= 0.
        deadline_s: when the round closes, in seconds from its start; > 0.

    Raises:
        ConfigError: a number is outside its range.
    """

    steps: int
    download_bytes: int
    upload_bytes: int
    deadline_s: float

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("download_bytes", 0), ("upload_bytes", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if not 0 < self.deadline_s < math.inf:
            raise ConfigError(f"deadline_s must be finite and > 0, got {self.deadline_s!r}")

    def _seconds(self, one: DeviceClass) -> tuple[float, float]:
        """What the median device of a class takes: whatever it has, and more for each example."""
        network = self.download_bytes / one.download_bytes_per_second + self.upload_bytes / one.upload_bytes_per_second
        return one.startup_seconds + network, self.steps * one.seconds_per_example


@dataclass(frozen=True)
class Attendance:
    """Who attended one round. Of all this only `seconds` may leave the aggregator.

    Attributes:
        number: of the round.
        start_s: when it started: seconds since midnight, UTC, of the first day.
        seconds: how long it lasted: to its deadline, since it closes by the clock, not at the first k.
        selected: (s,) int64 ascending, the users who were available and whose coin fell.
        finished: (f,) int64 ascending, those of them whose update came in time. Only these contribute.
    """

    number: int
    start_s: float
    seconds: float
    selected: NDArray[np.int64] = field(repr=False)
    finished: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class Fleet:
    """Devices drawn from a trace, one for each user, as columns.

    A device's day begins at the hour at which its class is least available, so
    that a night is not cut in two. On each day it has one level, uniform in
    [0, 1): it is available while the curve of its class is above that level.
    So at any moment the share available is the curve, and a phone that charges
    keeps charging for hours. On a share `habit` of the days the level is the
    device's usual one: some phones are there nearly every night, some hardly ever.

    Attributes:
        trace: it was drawn from.
        device_class: (n,) uint8, index into `trace.classes`.
        time_zone: (n,) uint8, index into `trace.time_zones`.
        slowness: (n,) float32, > 0: how many times longer it takes than the median of its class.
        usual_level: (n,) float64 in [0, 1).
        key: uint64, of the levels of all days.
    """

    trace: Trace
    device_class: NDArray[np.uint8] = field(repr=False)
    time_zone: NDArray[np.uint8] = field(repr=False)
    slowness: NDArray[np.float32] = field(repr=False)
    usual_level: NDArray[np.float64] = field(repr=False)
    key: np.uint64 = field(repr=False)

    @classmethod
    def draw(cls, trace: Trace, users: int, seed: int) -> Fleet:
        """Gives each user a device, at random and whatever data the user has.

        Args:
            trace: to draw from.
            users: n, how many; >= 0.
            seed: >= 0; the same one draws the same fleet, whose days repeat bit by bit.
        """
        sequence = np.random.SeedSequence(seed, spawn_key=(FLEET,))
        rng = np.random.default_rng(sequence)
        device_class = _pick(trace.classes, users, rng)
        spread = np.array([one.spread for one in trace.classes], dtype=np.float32)[device_class]
        return cls(
            trace=trace,
            device_class=device_class,
            time_zone=_pick(trace.time_zones, users, rng),
            slowness=np.exp(spread * rng.standard_normal(users, dtype=np.float32)),
            usual_level=rng.random(users),
            key=rng.integers(2**64, dtype=np.uint64),
        )

    @property
    def users(self) -> int:
        """n, how many devices."""
        return len(self.device_class)

    def available(self, devices: NDArray[np.int64], time_s: float) -> NDArray[np.bool_]:
        """Whether each device is idle, charging and on an unmetered network; on a fleet only it knows.

        A pure function of the fleet, the device and the time.

        Args:
            devices: (k,) each in [0, users).
            time_s: seconds since midnight, UTC, of the first day; >= 0.

        Returns:
            (k,) whether.
        """
        zones = self.trace.time_zones
        local = time_s / HOUR + np.array([zone.utc_offset_hours for zone in zones])
        dawn = np.array([np.argmin(one.availability) for one in self.trace.classes])
        days = np.floor((local[:, None] - dawn) / 24).astype(np.int64)
        chance = self.trace._chance(local)
        kind = self.time_zone[devices], self.device_class[devices]
        return self._level(devices, days[kind]) < chance[kind]

    def round(
        self,
        number: int,
        coins: NDArray[np.floating],
        *,
        sampling: float,
        work: Work,
        examples: NDArray[np.integer],
        rng: np.random.Generator,
    ) -> Attendance:
        """Who attends a round.

        Pure but for the n numbers it takes from `rng`. Nobody's coin or examples
        decide whether another attends.

        Args:
            number: of the round, from 1; it tells the time.
            coins: (n,) uniform in [0, 1), drawn for this round and attempt alone.
            sampling: a coin below it falls; in (0, 1]. What is to be charged for.
            work: what each device is to do.
            examples: (n,) rows of each user.
            rng: of drop-outs; of this round and attempt alone.

        Raises:
            ConfigError: a number is outside its range, a shape is not (n,), or the round
                would last beyond the start of the next.
        """
        _check_round(self.trace, work)
        for name, column in (("coins", coins), ("examples", examples)):
            if column.shape != (self.users,):
                raise ConfigError(f"{name} must have shape ({self.users},), got {column.shape}")
        if number < 1 or not 0 < sampling <= 1:
            raise ConfigError(f"round must be >= 1 and sampling in (0, 1], got {number!r} and {sampling!r}")
        start_s = self.trace.start_s(number)
        fell = np.flatnonzero(coins < sampling)
        selected = fell[self.available(fell, start_s)]
        dropout = np.array([one.dropout for one in self.trace.classes])
        # A draw for each device, not for each selected one: no one's coin moves another's draw.
        stays = rng.random(self.users)[selected] >= dropout[self.device_class[selected]]
        in_time = self.seconds(selected, work, examples[selected]) <= work.deadline_s
        return Attendance(number, start_s, work.deadline_s, selected, selected[stays & in_time])

    def seconds(self, devices: NDArray[np.int64], work: Work, examples: NDArray[np.integer]) -> NDArray[np.float64]:
        """How long devices take from their selection to the end of their upload, if they do not drop out.

        Args:
            devices: (k,) each in [0, users).
            work: what each is to do.
            examples: (k,) rows of each.

        Returns:
            (k,) seconds: slowness x (start-up + download + steps x examples x seconds per example + upload).
        """
        fixed, each = np.array([work._seconds(one) for one in self.trace.classes]).T
        kind = self.device_class[devices]
        median: NDArray[np.float64] = fixed[kind] + each[kind] * examples
        return median * self.slowness[devices]

    def _level(self, devices: NDArray[np.int64], days: NDArray[np.int64]) -> NDArray[np.float64]:
        """(k,) levels in [0, 1) of devices on their days."""
        bits = _splitmix64(self.key, devices + (days << 40))
        fresh, habit = (half.astype(np.uint32) * 2.0**-32 for half in (bits >> np.uint64(32), bits))
        return np.where(habit < self.trace.habit, self.usual_level[devices], fresh)


def finishing(trace: Trace, *, rounds: Sequence[int], work: Work, examples: ArrayLike) -> NDArray[np.float64]:
    """What the trace alone says of the devices whose coin falls: how probably they are there, and finish.

    Args:
        trace: of the fleet.
        rounds: numbers, from 1, of the rounds to average over, e.g. range(1, 201); at least one.
        work: what each device is to do.
        examples: of a user, >= 0: one number, or (k,) equally likely ones. A public
            assumption (a cap, last year's report): people's own counts would make what
            is computed from it a function of their data.

    Returns:
        (classes,) probabilities in [0, 1].

    Raises:
        ConfigError: the round would last beyond the start of the next.
    """
    _check_round(trace, work)
    starts = [trace.start_s(number) for number in rounds]
    available = np.mean(trace.available_share(starts), axis=0)
    assumed = np.atleast_1d(np.asarray(examples, dtype=np.float64))
    stays = [(1 - one.dropout) * _in_time(one, work, assumed) for one in trace.classes]
    return np.asarray(available * stays)


@dataclass(frozen=True)
class OverSelection:
    """How many to ask, so that enough finish.

    Attributes:
        sampling: probability of each device's coin, in (0, 1]. Charge this one.
        wanted: how many are wanted to finish a round.
        expected: how many are expected to, a round: `wanted`, or fewer where `capped`. A
            constant to divide the sums by.
        finishing: (classes,) probability that a device whose coin falls is there and finishes.
        capped: whether even everybody would be too few, so that `sampling` is 1.
    """

    sampling: float
    wanted: float
    expected: float
    finishing: tuple[float, ...]
    capped: bool


def over_selection(
    trace: Trace, *, users: int, wanted: float, rounds: Sequence[int], work: Work, examples: ArrayLike
) -> OverSelection:
    """The sampling probability at which as many devices are expected to finish as are wanted.

    From public numbers only: no coin, no count and nobody's data enters it. It
    is the mean over `rounds` that is met; one round at the trough of the day
    has fewer, one at its peak more. For a probability of its own for each
    round give one at a time, and charge each for its own.

    Args:
        trace: of the fleet.
        users: n, in the population; >= 1.
        wanted: devices that are to finish a round; > 0.
        rounds: numbers, from 1, of the rounds to average over.
        work: what each device is to do.
        examples: of a user, by a public assumption; as for `finishing`.

    Raises:
        ConfigError: a number is outside its range, or no device can ever finish.
    """
    if users < 1 or not 0 < wanted < math.inf:
        raise ConfigError(f"users must be >= 1 and wanted finite and > 0, got {users!r} and {wanted!r}")
    by_class = finishing(trace, rounds=rounds, work=work, examples=examples)
    most = users * float(_shares(trace.classes) @ by_class)
    if most <= 0:
        raise ConfigError(
            f"deadline_s must be long enough for some device of the trace to finish, got {work.deadline_s:g}: none does"
        )
    sampling = min(1.0, wanted / most)
    return OverSelection(sampling, wanted, sampling * most, tuple(by_class.tolist()), wanted > most)


@dataclass(frozen=True)
class Tally:
    """What a report needs of rounds, small enough to keep for each; `+` joins them.

    Attributes:
        rounds: how many.
        selected, finished: (classes,) devices, counted once for each round.
        finished_examples: rows of those that finished.
    """

    rounds: int
    selected: NDArray[np.int64]
    finished: NDArray[np.int64]
    finished_examples: int

    @classmethod
    def of(cls, fleet: Fleet, attendance: Attendance, examples: NDArray[np.integer]) -> Tally:
        """Counts one round; `examples` are those given to it."""
        classes = len(fleet.trace.classes)
        selected, finished = (
            np.bincount(fleet.device_class[users], minlength=classes)
            for users in (attendance.selected, attendance.finished)
        )
        return cls(1, selected, finished, int(examples[attendance.finished].sum()))

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.rounds + other.rounds,
            self.selected + other.selected,
            self.finished + other.finished,
            self.finished_examples + other.finished_examples,
        )


@dataclass(frozen=True)
class ClassTurnout:
    """One class's part, in devices a round.

    Attributes:
        name: of the class.
        share: of the fleet as drawn.
        expected: to finish a round, by the trace and the assumed examples.
        selected, finished: of a round, in the mean.
    """

    name: str
    share: float
    expected: float
    selected: float
    finished: float


@dataclass(frozen=True)
class Turnout:
    """Who took part in a training, for its report.

    Oracle, as the names say: a simulation knows it. On a fleet the class of a
    device and the number of its examples stay with it, and exact counts stay in
    the aggregator.

    Attributes:
        rounds: how many.
        oracle_selected, oracle_finished: devices a round, in the mean.
        oracle_lost: share of the selected that never finished; 0 where none was selected.
        oracle_by_class: each class's part.
        oracle_examples: rows of a user, mean over the fleet.
        oracle_examples_finished: the same over those that finished, each as often as it
            did: lower where who has more examples finishes less; 0 where none did.
    """

    rounds: int
    oracle_selected: float
    oracle_finished: float
    oracle_lost: float
    oracle_by_class: tuple[ClassTurnout, ...]
    oracle_examples: float
    oracle_examples_finished: float


def turnout(
    fleet: Fleet, tallies: Sequence[Tally], *, sampling: float, expected: ArrayLike, examples: NDArray[np.integer]
) -> Turnout:
    """Sums up a training's rounds.

    Args:
        fleet: that was asked.
        tallies: of its rounds; at least one.
        sampling: of every round.
        expected: (classes,) what `finishing` said before.
        examples: (n,) rows of each user.

    Raises:
        ConfigError: no round was tallied.
    """
    if not tallies:
        raise ConfigError("tallies must be of at least one round, got none")
    total = sum(tallies[1:], start=tallies[0])
    drawn = np.bincount(fleet.device_class, minlength=len(fleet.trace.classes))
    columns = (
        drawn / max(1, fleet.users),
        sampling * fleet.users * _shares(fleet.trace.classes) * np.asarray(expected),
        total.selected / total.rounds,
        total.finished / total.rounds,
    )
    selected, finished = int(total.selected.sum()), int(total.finished.sum())
    return Turnout(
        rounds=total.rounds,
        oracle_selected=selected / total.rounds,
        oracle_finished=finished / total.rounds,
        oracle_lost=(selected - finished) / max(1, selected),
        oracle_by_class=tuple(
            ClassTurnout(one.name, *row)
            for one, row in zip(fleet.trace.classes, np.stack(columns, axis=1).tolist(), strict=True)
        ),
        oracle_examples=float(examples.mean()) if fleet.users else 0.0,
        oracle_examples_finished=total.finished_examples / max(1, finished),
    )


def _check_round(trace: Trace, work: Work) -> None:
    if work.deadline_s > 60.0 * trace.round_minutes:
        raise ConfigError(
            f"deadline_s must be at most {60.0 * trace.round_minutes:g}, the trace's round_minutes, "
            f"got {work.deadline_s:g}: rounds would overlap"
        )


def _in_time(one: DeviceClass, work: Work, examples: NDArray[np.float64]) -> float:
    """The probability that slowness x seconds <= deadline_s, mean over `examples`."""
    fixed, each = work._seconds(one)
    seconds = fixed + each * examples
    if one.spread == 0:
        return float(np.mean(seconds <= work.deadline_s))
    with np.errstate(divide="ignore"):
        normal = np.log(work.deadline_s / seconds) / one.spread
    return float(np.mean([0.5 * math.erfc(-z / math.sqrt(2.0)) for z in normal]))


def _closed(one: DeviceClass) -> NDArray[np.float64]:
    """(25,) a class's curve, with 24:00."""
    return np.array([*one.availability, one.availability[0]])


def _shares(parts: Sequence[DeviceClass] | Sequence[TimeZone]) -> NDArray[np.float64]:
    return np.array([part.share for part in parts])


def _pick(parts: Sequence[DeviceClass] | Sequence[TimeZone], users: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(users,) indices into `parts`, each by its share."""
    edges = np.cumsum(_shares(parts))
    return np.searchsorted(edges / edges[-1], rng.random(users), side="right").astype(np.uint8)


def _splitmix64(key: np.uint64, counter: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The outputs of SplitMix64, seeded with `key`, of these numbers: any of them without those before.

    Source:
        Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014. https://doi.org/10.1145/2660193.2660195
    """
    z = counter.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
