"""The aggregator of a simulated population: draws a cohort, trains it, and lets one noised sum out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.features import Float32
from hybrid.federation.fleet import FLEET, Fleet, Tally, Work
from hybrid.federation.flights import Flights, Flush, Schedule
from hybrid.federation.records import values_of, with_values
from hybrid.privacy.accountant import Event, GaussianEvent, MatrixEvent
from hybrid.privacy.ledger import AnyEntry, Entry, Ledger
from hybrid.privacy.matrix import Matrix, matrix_sum
from hybrid.privacy.mechanisms import (
    Aggregation,
    ClippedSum,
    Cohort,
    PaidNoise,
    Release,
    SeededNoise,
    SystemNoise,
    adaptive_gaussian_sum,
    gaussian_sum,
    quantile_noise_for,
)

if TYPE_CHECKING:
    from hybrid.federation.engine import Engine  # and with it torch, which serving devices does not need

PURPOSE = "train"
COHORT, NOISE, LOCAL, SCHEDULE = 0, 1, 3, 4  # independent streams of one seed; the fleet's is 2
ADAPTATION = 0.2  # of the clip's logarithm a round, as in Andrew et al.


@dataclass(frozen=True)
class Round:
    """How a round is sampled, clipped and noised.

    Attributes:
        sampling: each user takes part by an independent coin of this probability, in (0, 1].
        clip: largest L2 norm of one user's update; the first round's, where it adapts.
        noise_multiplier: standard deviation of the noise over `clip`.
        minimum: fewest participants of a round that is released.
        quantile: of the updates' norms that an adaptive clip seeks; None: it stays.
        planned_cohort: expected number of participants; for an adaptive clip.
        matrix: correlates the noise of rounds in which users take part by a schedule, not by coins: `sampling` is
            then 1, which claims nothing of it. None: each round's noise is its own.

    Raises:
        ConfigError: the clip would adapt, and the noise spans rounds.
    """

    sampling: float
    clip: float
    noise_multiplier: float
    minimum: int
    quantile: float | None = None
    planned_cohort: float | None = None
    matrix: Matrix | None = None

    def __post_init__(self) -> None:
        if self.matrix is not None and self.quantile is not None:
            raise ConfigError("quantile must be None with a matrix: noise that spans the rounds is drawn for one clip")

    @property
    def event(self) -> Event:
        """What one round costs; with a matrix, what all its rounds do together."""
        if self.matrix is not None:
            return self.matrix.event(self.noise_multiplier)
        return GaussianEvent(self.noise_multiplier, self.sampling)

    def of(self, rounds: int) -> Event:
        """What so many rounds cost: what to reserve."""
        event = self.event
        return event if isinstance(event, MatrixEvent) else replace(event, count=rounds)

    def aggregation(self) -> Aggregation:
        """The mechanism."""
        if self.matrix is not None:
            return matrix_sum(
                clip_norm=self.clip,
                noise_multiplier=self.noise_multiplier,
                minimum=self.minimum,
                matrix=self.matrix,
            )
        if self.quantile is None or self.planned_cohort is None:
            return gaussian_sum(clip_norm=self.clip, noise_multiplier=self.noise_multiplier, minimum=self.minimum)
        return adaptive_gaussian_sum(
            initial_clip=self.clip,
            quantile=self.quantile,
            lr=ADAPTATION,
            noise_multiplier=self.noise_multiplier,
            quantile_noise=quantile_noise_for(self.noise_multiplier, self.planned_cohort),
            planned_cohort=self.planned_cohort,
            minimum=self.minimum,
        )


@dataclass(frozen=True)
class Attended:
    """A fleet on which the simulated rounds run, and what it did.

    Attributes:
        fleet: who is there, and how fast.
        work: what a round asks of a device.
        tallies: filled with one a round; after a restart the first is of all rounds before it.
    """

    fleet: Fleet
    work: Work
    tallies: list[Tally] = field(default_factory=list, repr=False)

    def state(self) -> dict[str, Any] | None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        return values_of(sum(self.tallies[1:], start=self.tallies[0])) if self.tallies else None

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        self.tallies[:] = [] if state is None else [Tally(**state)]


class PaidMechanism:
    """One run's mechanism, from round to round: each release is in the ledger before its noise is drawn.

    Args:
        settings: of every round.
        ledger: pays for each round; None for an oracle, whose rounds have no noise and no privacy.
        seed: of the noise; None: it is the operating system's, as people's is.
        size: p, the length of a flat update.
        repeats: entries of rounds that are only computed again, after a restart: see `next_attempt`.
        purpose: of its entries in the ledger.

    Attributes:
        horizon: names it in the ledger, where a matrix mechanism may be begun anew on the same one.
        purpose: as given.

    Raises:
        ConfigError: noise is drawn, and there is no ledger to pay for what it covers; or rounds are to be repeated
            whose noise cannot be.
    """

    horizon: str | None = None

    def __init__(
        self,
        settings: Round,
        ledger: Ledger | None,
        *,
        seed: int | None,
        size: int,
        repeats: Iterable[AnyEntry] = (),
        purpose: str = PURPOSE,
    ) -> None:
        if ledger is None and settings.noise_multiplier:
            raise ConfigError(f"noise_multiplier must be 0 without a ledger, got {settings.noise_multiplier!r}")
        self._settings, self._ledger, self._seed, self.purpose = settings, ledger, seed, purpose
        self._mechanism = settings.aggregation()
        self._state = self._mechanism.init(size)
        self._repeats = {entry.round: entry for entry in repeats}  # of several attempts at a round, the last
        if seed is None and self._repeats:
            raise ConfigError("repeats must be left out without a seed: the system's noise is never the same again")

    def state(self) -> dict[str, Any]:
        """See `hybrid.federation.checkpoint.Stateful`."""
        return values_of(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        self._state = with_values(self._state, state)

    @property
    def clip(self) -> float:
        """The L2 norm that the next round clips to."""
        return self._state.clip

    @property
    def released(self) -> int:
        """How many rounds it has released: with a matrix, steps of the horizon that are used up."""
        return self._state.round

    def walk_over(self) -> None:
        """Uses up a step of the horizon without a release: the same mechanism, with a row that nobody is shown."""
        nobody = ClippedSum(np.zeros(self._state.size), 0, 0, 0)
        step = replace(self._settings, minimum=0).aggregation().step
        self._state, _ = step(self._state, lambda _: nobody, SystemNoise())

    def go_on(self, clip: float) -> None:
        """Goes on with an adaptive clip where a process before left it: at the norm of its last release."""
        self._state = replace(self._state, clip=clip)

    def next_attempt(self, number: int) -> int:
        """At round `number`: a new one, with noise and a ledger entry of its own, unless the round is a repetition.

        A seeded simulation that goes on from a checkpoint computes the rounds
        after it again: from the same weights, with the same cohort and the same
        noise, so that the same number is released, which tells nobody anything
        new and is paid for. Who gives `repeats` vouches that it is the same; an
        entry made with another noise, sampling or clip, or of another step of a
        horizon, is not repeated.
        """
        if self._ledger is None:
            return 1
        paid = self._repeated(number)
        return self._ledger.next_attempt(self.purpose, number) if paid is None else paid.attempt

    def _repeated(self, number: int) -> AnyEntry | None:
        """What paid for round `number`, where this round is that one again."""
        entry = self._repeats.get(number)
        if entry is None or (entry.event, entry.clip) != (self._settings.event, self._state.clip):
            return None
        return entry if isinstance(entry, Entry) or entry.step == self._state.round + 1 else None

    def release(self, number: int, attempt: int, cohort: Cohort) -> Release:
        """The noised sum of a round's cohort.

        Args:
            number: of the round, from 1.
            attempt: at it; tells its noise apart.
            cohort: see `Cohort`.

        Raises:
            BudgetExceeded, CohortTooSmall: nothing is spent.
        """
        clip, event, paid = self._state.clip, self._settings.event, self._repeated(number)
        step = self._state.round + 1 if isinstance(event, MatrixEvent) else None

        def pay() -> None:
            self._repeats.pop(number, None)  # a second release in this process is a new attempt in any case
            if self._ledger is not None and (paid is None or attempt != paid.attempt):
                self._ledger.spend(
                    event,
                    purpose=self.purpose,
                    clip=clip,
                    round_number=number,
                    attempt=attempt,
                    step=step,
                    horizon=self.horizon,
                )

        seed = self._seed
        source = SystemNoise() if seed is None else SeededNoise(seed, NOISE, number, attempt)
        noise = PaidNoise(source, pay)
        self._state, release = self._mechanism.step(self._state, cohort, noise)
        return release


def coins(seed: int, number: int, attempt: int, users: int) -> NDArray[np.float64]:
    """(users,) in [0, 1): who takes part in a round are those below its sampling."""
    return np.random.default_rng([seed, COHORT, number, attempt]).random(users)


@lru_cache(maxsize=4)
def groups(seed: int, users: int, separation: int) -> NDArray[np.int64]:
    """(users,) in [0, separation): the group of each user, of equal sizes but for one, in a seeded order.

    The groups take turns, so that each user takes part once in any `separation`
    steps. Who is in which may be known to everybody: no privacy rests on it.
    """
    drawn = np.random.default_rng([seed, SCHEDULE]).permutation(users) % separation
    drawn.flags.writeable = False
    return drawn


def takes_part(settings: Round, users: int, *, seed: int, number: int, attempt: int, step: int) -> NDArray[np.int64]:
    """Who is asked in a round, ascending: those whose coin fell, or, with a matrix, the group whose turn it is.

    Args:
        settings: of the round.
        users: of the population.
        seed: of the run.
        number: of the round, from 1.
        attempt: at it, from 1.
        step: of the horizon, from 0, with a matrix.
    """
    if settings.matrix is None:
        return np.flatnonzero(coins(seed, number, attempt, users) < settings.sampling)
    separation = settings.matrix.participation.separation
    return np.flatnonzero(groups(seed, users, separation) == step % separation)


def local_stream(seed: int, number: int, attempt: int) -> tuple[int, ...]:
    """Of what is random in a round on the devices: see `Engine.clipped_sum`."""
    return seed, LOCAL, number, attempt


class SimulatedAggregator:
    """What stands, in a simulation, where a fleet has its aggregator service.

    Args:
        engine: trains any users of the population.
        ledger: pays for each round before its noise is drawn; None for an oracle, without noise and privacy.
        settings: of every round.
        seed: of coins, noise and local order: the same seed repeats a run bit by bit.
        fleet: which of those whose coin fell answer in time; None: all do.
        repeats: see `PaidMechanism`.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger | None,
        settings: Round,
        *,
        seed: int,
        fleet: Attended | None = None,
        repeats: Iterable[AnyEntry] = (),
    ) -> None:
        self._engine, self._settings, self._seed, self._fleet = engine, settings, seed, fleet
        self._mechanism = PaidMechanism(settings, ledger, seed=seed, size=engine.size, repeats=repeats)
        self._examples = np.diff(engine.examples.offsets)

    @property
    def clip(self) -> float:
        """The L2 norm that the next round clips to."""
        return self._mechanism.clip

    def state(self) -> dict[str, Any]:
        """See `hybrid.federation.checkpoint.Stateful`."""
        fleet = None if self._fleet is None else self._fleet.state()
        return {"mechanism": self._mechanism.state(), "fleet": fleet}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        self._mechanism.restore(state["mechanism"])
        if self._fleet is not None:
            self._fleet.restore(state["fleet"])

    def run_round(self, number: int, flat: Float32) -> Release:
        """See `hybrid.federation.client_app.Aggregator`. A round run again is a new attempt, with other noise."""
        attempt = self._mechanism.next_attempt(number)
        users = self._cohort(number, attempt)
        stream = local_stream(self._seed, number, attempt)
        return self._mechanism.release(
            number, attempt, lambda norm: self._engine.clipped_sum(flat, users, norm, stream=stream)
        )

    def _cohort(self, number: int, attempt: int) -> NDArray[np.int64]:
        """Who is asked, and, on a fleet, who of them was there and answered in time."""
        users, step = self._engine.users, self._mechanism.released
        if self._fleet is None:
            return takes_part(self._settings, users, seed=self._seed, number=number, attempt=attempt, step=step)
        tossed = coins(self._seed, number, attempt, users)
        attendance = self._fleet.fleet.round(
            number,
            tossed,
            sampling=self._settings.sampling,
            work=self._fleet.work,
            examples=self._examples,
            rng=np.random.default_rng([self._seed, FLEET, number, attempt]),
        )
        self._fleet.tallies.append(Tally.of(self._fleet.fleet, attendance, self._examples))
        return attendance.finished


class BufferedAggregator:
    """Simulates asynchronous training: each of its rounds is a flush. See `hybrid.federation.buffer`.

    Args:
        engine: trains any users of the population.
        ledger: pays for all flushes before the first's noise is drawn; None for an oracle, without noise and privacy.
        settings: of every flush.
        schedule: which devices begin when, and come when.
        seed: of noise and local order: the same seed repeats a run bit by bit.
        repeats: see `PaidMechanism`.

    Attributes:
        log: of the flushes.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger | None,
        settings: Round,
        schedule: Schedule,
        *,
        seed: int,
        repeats: Iterable[AnyEntry] = (),
    ) -> None:
        self._engine, self._schedule, self._seed = engine, schedule, seed
        self._mechanism = PaidMechanism(settings, ledger, seed=seed, size=engine.size, repeats=repeats)
        self._flights = Flights.none(engine.users)
        self._versions: dict[int, Float32] = {}  # that somebody may still come from
        self.log = FlushLog.empty(len(schedule.fleet.trace.classes))

    @property
    def clip(self) -> float:
        """The L2 norm that the next flush clips to."""
        return self._mechanism.clip

    def state(self) -> dict[str, Any]:
        """See `hybrid.federation.checkpoint.Stateful`."""
        return {
            "mechanism": self._mechanism.state(),
            "flights": values_of(self._flights),
            "versions": self._versions,
            "log": values_of(self.log),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        self._mechanism.restore(state["mechanism"])
        self._flights = with_values(self._flights, state["flights"])
        self._versions = dict(state["versions"])
        self.log = with_values(self.log, state["log"])

    def run_round(self, number: int, flat: Float32) -> Release:
        """See `hybrid.federation.client_app.Aggregator`; `flat` is the version that devices begin at from now on."""
        versions = self._versions | {number - 1: flat}
        flights, flush = self._schedule.flush(self._flights)
        assert flush.number == number  # a flush that was not released is the same flush again
        attempt = self._mechanism.next_attempt(number)
        release = self._mechanism.release(number, attempt, lambda norm: self._sum(versions, flush, norm, attempt))
        wanted = set(flights.began.tolist())
        self._versions = {version: kept for version, kept in versions.items() if version in wanted}
        self._flights, self.log = flights, self.log.after(flush, self._schedule.fleet)
        return release

    def _sum(self, versions: Mapping[int, Float32], flush: Flush, norm: float, attempt: int) -> ClippedSum:
        """Users that began at one version train in one batch."""
        total, below, above = np.zeros(self._engine.size), 0, 0
        for version in np.unique(flush.began):
            users = np.sort(flush.users[flush.began == version])
            stream = local_stream(self._seed, flush.number, attempt)
            one = self._engine.clipped_sum(versions[int(version)], users, norm, stream=(*stream, int(version)))
            total += self._schedule.buffer.weight(flush.number - 1 - int(version)) * one.total
            below, above = below + one.below, above + one.above
        return ClippedSum(total, len(flush.users), below, above)


@dataclass(frozen=True)
class FlushLog:
    """What became of devices in an asynchronous training. An oracle's: a fleet's classes and losses stay with it.

    Attributes:
        time_s: of each flush: seconds since midnight, UTC, of the first day.
        staleness: of each flush, the mean; 0 of one to which nobody came.
        lost: of each flush, devices that began and sent nothing.
        updates: (classes,) that were counted, of each class of devices.
    """

    time_s: list[float]
    staleness: list[float]
    lost: list[int]
    updates: NDArray[np.int64]

    @classmethod
    def empty(cls, classes: int) -> FlushLog:
        """Before the first flush."""
        return cls([], [], [], np.zeros(classes, np.int64))

    def after(self, flush: Flush, fleet: Fleet) -> FlushLog:
        """With one more."""
        counted = np.bincount(fleet.device_class[flush.users], minlength=len(self.updates))
        return FlushLog(
            [*self.time_s, flush.time_s],
            [*self.staleness, float(flush.staleness.mean()) if len(flush.users) else 0.0],
            [*self.lost, flush.lost],
            self.updates + counted,
        )
