"""The aggregator of a simulated population: draws a cohort, trains it, and lets one noised sum out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid.features import Float32
from hybrid.federation.engine import Engine
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import PaidNoise, Release, SeededNoise, clip_and_sum, gaussian_sum

PURPOSE = "train"
COHORT, NOISE = 0, 1  # independent streams of one seed


@dataclass(frozen=True)
class Round:
    """How a round is sampled, clipped and noised.

    Attributes:
        sampling: each user takes part by an independent coin of this probability, in (0, 1].
        clip: largest L2 norm of one user's update.
        noise_multiplier: standard deviation of the noise over `clip`.
        minimum: fewest participants of a round that is released.
    """

    sampling: float
    clip: float
    noise_multiplier: float
    minimum: int

    @property
    def event(self) -> GaussianEvent:
        """What one round costs."""
        return GaussianEvent(self.noise_multiplier, self.sampling)


class SimulatedAggregator:
    """What stands, in a simulation, where a fleet has its aggregator service.

    Args:
        engine: trains any users of the population.
        ledger: pays for each round before its noise is drawn.
        settings: of every round.
        seed: of coins and noise: the same seed repeats a run bit by bit.
    """

    def __init__(self, engine: Engine, ledger: Ledger, settings: Round, *, seed: int) -> None:
        self._engine, self._ledger, self._settings, self._seed = engine, ledger, settings, seed
        self._mechanism = gaussian_sum(
            clip_norm=settings.clip, noise_multiplier=settings.noise_multiplier, minimum=settings.minimum
        )
        self._state = self._mechanism.init(engine.module.size)

    def run_round(self, number: int, flat: Float32) -> Release:
        """See `hybrid.federation.client_app.Aggregator`. A round run again is a new attempt, with other noise."""
        attempt = self._ledger.next_attempt(PURPOSE, number)

        def pay() -> None:
            settings = self._settings
            self._ledger.spend(
                settings.event, purpose=PURPOSE, clip=settings.clip, round_number=number, attempt=attempt
            )

        coins = np.random.default_rng([self._seed, COHORT, number, attempt]).random(self._engine.users)
        updates = self._engine.updates(flat, np.flatnonzero(coins < self._settings.sampling))
        noise = PaidNoise(SeededNoise(self._seed, NOISE, number, attempt), pay)
        size = self._state.size
        self._state, release = self._mechanism.step(self._state, lambda clip: clip_and_sum(updates, size, clip), noise)
        return release
