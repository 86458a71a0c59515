"""The aggregator of a simulated population: draws a cohort, trains it, and lets one noised sum out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.features import Float32
from hybrid.federation.fleet import FLEET, Fleet, Tally, Work
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import (
    Aggregation,
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
COHORT, NOISE, LOCAL = 0, 1, 3  # independent streams of one seed; the fleet's is 2
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
    """

    sampling: float
    clip: float
    noise_multiplier: float
    minimum: int
    quantile: float | None = None
    planned_cohort: float | None = None

    @property
    def event(self) -> GaussianEvent:
        """What one round costs."""
        return GaussianEvent(self.noise_multiplier, self.sampling)

    def aggregation(self) -> Aggregation:
        """The mechanism."""
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
        tallies: filled with one a round.
    """

    fleet: Fleet
    work: Work
    tallies: list[Tally] = field(default_factory=list, repr=False)


class PaidMechanism:
    """One run's mechanism, from round to round: each release is in the ledger before its noise is drawn.

    Args:
        settings: of every round.
        ledger: pays for each round; None for an oracle, whose rounds have no noise and no privacy.
        seed: of the noise; None: it is the operating system's, as people's is.
        size: p, the length of a flat update.

    Raises:
        ConfigError: noise is drawn, and there is no ledger to pay for what it covers.
    """

    def __init__(self, settings: Round, ledger: Ledger | None, *, seed: int | None, size: int) -> None:
        if ledger is None and settings.noise_multiplier:
            raise ConfigError(f"noise_multiplier must be 0 without a ledger, got {settings.noise_multiplier!r}")
        self._settings, self._ledger, self._seed = settings, ledger, seed
        self._mechanism = settings.aggregation()
        self._state = self._mechanism.init(size)

    @property
    def clip(self) -> float:
        """The L2 norm that the next round clips to."""
        return self._state.clip

    def next_attempt(self, number: int) -> int:
        """At round `number`."""
        return 1 if self._ledger is None else self._ledger.next_attempt(PURPOSE, number)

    def release(self, number: int, attempt: int, cohort: Cohort) -> Release:
        """The noised sum of a round's cohort.

        Args:
            number: of the round, from 1.
            attempt: at it; tells its noise apart.
            cohort: see `Cohort`.

        Raises:
            BudgetExceeded, CohortTooSmall: nothing is spent.
        """
        clip = self._state.clip

        def pay() -> None:
            if self._ledger is not None:
                event = self._settings.event
                self._ledger.spend(event, purpose=PURPOSE, clip=clip, round_number=number, attempt=attempt)

        seed = self._seed
        source = SystemNoise() if seed is None else SeededNoise(seed, NOISE, number, attempt)
        noise = PaidNoise(source, pay)
        self._state, release = self._mechanism.step(self._state, cohort, noise)
        return release


def coins(seed: int, number: int, attempt: int, users: int) -> NDArray[np.float64]:
    """(users,) in [0, 1): who takes part in a round are those below its sampling."""
    return np.random.default_rng([seed, COHORT, number, attempt]).random(users)


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
    """

    def __init__(
        self, engine: Engine, ledger: Ledger | None, settings: Round, *, seed: int, fleet: Attended | None = None
    ) -> None:
        self._engine, self._settings, self._seed, self._fleet = engine, settings, seed, fleet
        self._mechanism = PaidMechanism(settings, ledger, seed=seed, size=engine.size)
        self._examples = np.diff(engine.examples.offsets)

    @property
    def clip(self) -> float:
        """The L2 norm that the next round clips to."""
        return self._mechanism.clip

    def run_round(self, number: int, flat: Float32) -> Release:
        """See `hybrid.federation.client_app.Aggregator`. A round run again is a new attempt, with other noise."""
        attempt = self._mechanism.next_attempt(number)
        users = self._cohort(number, attempt)
        stream = local_stream(self._seed, number, attempt)
        return self._mechanism.release(
            number, attempt, lambda norm: self._engine.clipped_sum(flat, users, norm, stream=stream)
        )

    def _cohort(self, number: int, attempt: int) -> NDArray[np.int64]:
        """Whose coin fell, and, on a fleet, who of them was there and answered in time."""
        tossed = coins(self._seed, number, attempt, self._engine.users)
        if self._fleet is None:
            return np.flatnonzero(tossed < self._settings.sampling)
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
