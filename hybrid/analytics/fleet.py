"""Asks a fleet of real devices: a query is a round of their aggregator, paid for as a training's round is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybrid.analytics.asking import PURPOSES, Answer, checked_shares, next_question, phase
from hybrid.errors import ConfigError
from hybrid.federation.fleet_aggregator import FleetAggregator
from hybrid.privacy.accountant import GaussianEvent, noise_multiplier_for
from hybrid.query import Query


class FleetAsk:
    """Asks the devices that check in to an aggregator. See `hybrid.analytics.asking.Ask`.

    Each phase of a question is a round of its own. A device takes part in a phase as in a training's round, as often as
    policies let it: phases are about the same people where rounds are longer than the policy's separation.

    Args:
        aggregator: whose check-in is served; its ledger pays. Its rounds are run by the thread that asks.
        purpose: one of `PURPOSES`.
        epsilon: of all phases together, at the ledger's delta; finite, > 0. None: without noise, where it has none.
        minimum: fewest devices whose answers are released together; >= 1.

    Raises:
        ConfigError: a setting is out of range, or there is one of epsilon and ledger.
    """

    def __init__(self, aggregator: FleetAggregator, *, purpose: str, epsilon: float | None, minimum: int = 1) -> None:
        assert purpose in PURPOSES
        ledger = aggregator.ledger
        if (epsilon is None) != (ledger is None):
            raise ConfigError(
                f"epsilon must be None where the aggregator has no ledger, and only there, got {epsilon!r}"
            )
        if minimum < 1:
            raise ConfigError(f"minimum must be at least 1, got {minimum!r}")
        self._aggregator, self._ledger, self._purpose, self._minimum = aggregator, ledger, purpose, minimum
        self._whole = 0.0
        if epsilon is not None and ledger is not None:
            self._whole = noise_multiplier_for(epsilon, ledger.delta, 1.0, 1)
        self._aside: Counter[GaussianEvent] = Counter()
        self._answered: list[int] = []

    @property
    def answered(self) -> int:
        """See `Ask`; 0 before the first phase."""
        return min(self._answered, default=0)

    def begin(self, shares: Sequence[float]) -> None:
        """See `Ask`. What a phase that failed had set aside is there for it when it is asked again."""
        events = [phase(self._whole, share) for share in checked_shares(shares)]
        if self._ledger is not None:
            self._ledger.reserve(events)
        self._aside.update(events)

    def __call__(self, query: Query, *, share: float = 1.0, payload: NDArray[np.floating] | None = None) -> Answer:
        """See `Ask`. Blocks until the round has closed, by the aggregator's clock.

        Raises:
            BudgetExceeded: the ledger has not enough left. Nobody was asked.
            CohortTooSmall: fewer than the minimum answered. Nothing is spent.
            PlanError: the query, or its payload, is larger than devices take. Nobody was asked, nothing is spent.
            Halted, RoundStopped: the version was halted, or the aggregator stopped. Nothing is spent.
        """
        event = phase(self._whole, share)
        if not self._aside[event]:
            self.begin([share])
        number = len(self._answered) + 1 if self._ledger is None else next_question(self._ledger, self._purpose)
        release = self._aggregator.ask(
            query,
            None if payload is None else np.asarray(payload, np.float32),
            purpose=self._purpose,
            number=number,
            noise_multiplier=event.noise_multiplier,
            minimum=self._minimum,
        )
        self._aside[event] -= 1
        self._answered.append(release.received)
        return Answer(query, release.sum, event.noise_multiplier * query.norm, release.received)
