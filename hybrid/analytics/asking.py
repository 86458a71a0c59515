"""Asks people a query, and lets one noised sum out: the ledger is paid before the noise is drawn.

What is asked of a population may take several queries, its phases, which together cost the epsilon that was given.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hybrid.errors import ConfigError
from hybrid.privacy.accountant import GaussianEvent, noise_multiplier_for
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import NoiseSource, PaidNoise, SeededNoise, SystemNoise, clip_and_sum
from hybrid.query import Floats, Query, contributions

ANALYZE, NORMALISE, PRIOR, RECALIBRATE, EVALUATE, DRIFT, FUNNEL = PURPOSES = (
    "analyze",
    "normalise",
    "label-prior",
    "recalibrate",
    "evaluate",
    "drift",
    "funnel",
)
"""Of the ledger's entries that pay for queries."""
STREAM = 5  # of a seed; those below are a training's


@dataclass(frozen=True)
class Answer:
    """The noised sum of one query.

    Attributes:
        query: that was asked.
        total: as released, (query.size,).
        sd: standard deviation of the noise of each number of it; >= 0.
        people: who were asked, with rows or without: public.
    """

    query: Query
    total: Floats = field(repr=False)
    sd: float
    people: int

    @property
    def counts(self) -> Floats:
        """(groups, cells of a group) decoded: what a row adds is in its part's own terms, and noise may be below 0."""
        decoded: Floats = self.query.decode(self.total[None])[0].reshape(self.query.groups, -1)
        return decoded

    def noise_sd(self, gradients: Floats) -> Floats:
        """Standard deviations of functions of the counts, by how they change with each.

        Args:
            gradients: (m, query.counts).

        Returns:
            (m,).
        """
        return np.asarray(self.sd * np.linalg.norm(self.query.decode_transposed(gradients), axis=1))


class Ask(Protocol):
    """Who answers: a simulated population, or a fleet."""

    @property
    def answered(self) -> int:
        """How many people did, in the phase with the fewest."""
        ...

    def begin(self, shares: Sequence[float]) -> None:
        """Sets aside what all phases cost, or refuses before the first.

        Args:
            shares: of the whole that each phase takes, > 0, together at most 1. A phase with the share w has noise of
                standard deviation 1 / sqrt(w) times that of a query with all of it.

        Raises:
            BudgetExceeded: the ledger has not enough left. Nothing was written.
        """
        ...

    def __call__(self, query: Query, *, share: float = 1.0, payload: NDArray[np.floating] | None = None) -> Answer:
        """Asks everybody.

        Args:
            query: what.
            share: of the whole, as `begin` was told; where it was told nothing, it is set aside now.
            payload: for a query with `spread`.

        Raises:
            BudgetExceeded: the ledger has not enough left. Nothing was written.
        """
        ...


@dataclass(frozen=True)
class People:
    """A simulated population's rows.

    Attributes:
        columns: name -> (n,) raw values of features, "label" and "score".
        offsets: (people + 1,) of each person's rows, the oldest first.
    """

    columns: Mapping[str, ArrayLike] = field(repr=False)
    offsets: NDArray[np.integer] = field(repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, users: NDArray[np.bool_]) -> People:
        """Some of them: (people,) which."""
        counts = np.diff(self.offsets)
        rows = np.repeat(users, counts)
        columns = {name: np.asarray(column)[rows] for name, column in self.columns.items()}
        return People(columns, np.concatenate([[0], np.cumsum(counts[users])]))

    def sum(self, query: Query, payload: NDArray[np.floating] | None = None) -> Floats:
        """(query.size,) the exact sum of clipped contributions: a mechanism's, or an oracle's."""
        return clip_and_sum(contributions(query, self.columns, self.offsets, payload), query.size, query.norm).total


class Simulated:
    """Asks a simulated population.

    Args:
        people: who.
        ledger: pays.
        purpose: one of `PURPOSES`.
        epsilon: of all phases together, at the ledger's delta; finite, > 0.
        seed: of the noise, so that a run can be repeated; None: the operating system's.

    Raises:
        ConfigError: epsilon is out of range.
    """

    def __init__(self, people: People, ledger: Ledger, *, purpose: str, epsilon: float, seed: int | None) -> None:
        assert purpose in PURPOSES
        self._people, self._ledger, self._purpose, self._seed = people, ledger, purpose, seed
        self._whole = noise_multiplier_for(epsilon, ledger.delta, 1.0, 1)

    @property
    def answered(self) -> int:
        """See `Ask`: everybody."""
        return len(self._people)

    def begin(self, shares: Sequence[float]) -> None:
        """See `Ask`."""
        self._ledger.reserve([phase(self._whole, share) for share in checked_shares(shares)])

    def __call__(self, query: Query, *, share: float = 1.0, payload: NDArray[np.floating] | None = None) -> Answer:
        """See `Ask`."""
        total = self._people.sum(query, payload)
        event = phase(self._whole, share)
        number = next_question(self._ledger, self._purpose)

        def pay() -> None:
            self._ledger.spend(event, purpose=self._purpose, clip=query.norm, round_number=number)

        sd = event.noise_multiplier * query.norm
        noise = PaidNoise(self._noise(number), pay).gaussian(query.size, sd)
        return Answer(query, total + noise, sd, len(self._people))

    def _noise(self, number: int) -> NoiseSource:
        if self._seed is None:
            return SystemNoise()
        return SeededNoise(self._seed, STREAM, zlib.crc32(self._purpose.encode()), number)


@dataclass(frozen=True)
class Exact:
    """Asks a simulated population without noise and without a ledger: an oracle, or what a server knows anyway.

    Attributes:
        people: who.
    """

    people: People

    @property
    def answered(self) -> int:
        """See `Ask`: everybody."""
        return len(self.people)

    def begin(self, shares: Sequence[float]) -> None:
        """See `Ask`. Nothing is spent."""
        checked_shares(shares)

    def __call__(self, query: Query, *, share: float = 1.0, payload: NDArray[np.floating] | None = None) -> Answer:
        """See `Ask`. Nothing is spent."""
        return Answer(query, self.people.sum(query, payload), 0.0, len(self.people))


def phase(whole: float, share: float) -> GaussianEvent:
    """What a phase costs, where a query with all of it has the noise multiplier `whole`.

    >>> phase(4.0, 0.25).noise_multiplier
    8.0
    """
    return GaussianEvent(whole / math.sqrt(share))


def next_question(ledger: Ledger, purpose: str) -> int:
    """The number of the next query of a purpose, from 1: never one whose noise may have been seen."""
    return 1 + max((entry.round for entry in ledger.entries if entry.purpose == purpose), default=0)


def checked_shares(shares: Iterable[float]) -> tuple[float, ...]:
    """Raises: ConfigError: a share is not > 0, or all are more than 1."""
    found = tuple(shares)
    if not found or min(found) <= 0 or sum(found) > 1 + 1e-12:
        raise ConfigError(f"shares must be > 0 and at most 1 together, got {found}")
    return found
