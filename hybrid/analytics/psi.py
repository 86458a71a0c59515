"""How far two distributions are apart, from noised counts of the same cells: the population stability index (PSI)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hybrid.query import Floats

MOVED, DRIFTED = 0.1, 0.25
"""The usual thresholds: below the first nothing happened, from the second on something did.

Source: Siddiqi, Credit Risk Scorecards, Wiley 2006, chapter 9. They are rules of thumb, of no theory.
"""
Verdict = Literal["stable", "moved", "drifted", "unclear"]

LEAST_SHARE = 1e-3  # a share below counts as so much: the logarithm of an empty cell is no news of its own
RARE_SHARE = 0.01  # of the mean of both: cells below are put together
RARE_SDS = 3.0  # the same, in standard deviations of the noise in it
BLIND = 0.5  # where floors, of all cells together, come to so much, nothing is measured
TAIL = 0.025  # of each side of the interval
STEPS, DRAWS, REACH = 16, 400, 4.0


@dataclass(frozen=True)
class Noised:
    """Rows by cell, one row a person.

    Attributes:
        counts: (k,), with noise: they may be negative.
        sd: standard deviation of the noise of each, independent; (k,) or one number.
    """

    counts: Floats = field(repr=False)
    sd: Floats | float

    @property
    def sds(self) -> Floats:
        """(k,)."""
        return np.broadcast_to(np.asarray(self.sd, np.float64), self.counts.shape)

    @property
    def rows(self) -> float:
        """How many there are, about; at least 1."""
        return max(float(self.counts.sum()), 1.0)

    @property
    def shares(self) -> Floats:
        """(k,) of the rows, none below 0, together 1."""
        kept = np.maximum(self.counts, 0.0)
        return np.asarray(kept / max(float(kept.sum()), 1.0))


@dataclass(frozen=True)
class Psi:
    """The index, with what noise and sampling add to it taken away.

    Attributes:
        value: >= 0; None where the noise drowns the counts.
        low, high: 95 % interval for the index of the two populations; `high` is None where `value` is.
    """

    value: float | None
    low: float
    high: float | None

    @property
    def verdict(self) -> Verdict:
        """By the lower end, so that noise alone alarms nobody; "unclear" where the interval spans both thresholds."""
        if self.low >= DRIFTED:
            return "drifted"
        if self.low >= MOVED:
            return "moved"
        return "stable" if self.high is not None and self.high < DRIFTED else "unclear"


def index(reference: Floats, current: Floats) -> Floats:
    """(..., k) shares > 0, twice -> (...) sum of (q - p) log(q / p): 0 where they are the same.

    Source:
        Jeffreys, Proc. Royal Society A 186, 1946 (his J); as "population stability index" in Siddiqi, 2006.

    >>> float(index(np.array([0.5, 0.5]), np.array([0.2, 0.8])).round(4))
    0.4159
    """
    return np.asarray(((current - reference) * np.log(current / reference)).sum(axis=-1))


def psi(reference: Noised, current: Noised, *, ordered: bool = True, apart: int = 0, seed: int = 0) -> Psi:
    """Estimates the index of two populations of which people were asked with noise.

    Two samples of one population differ, and noised ones more: their index has an expectation above 0, about
    (k - 1)(1/n + 1/m) without noise. So the index of the counts is compared with what it would be by chance, were the
    two populations t times as far apart as they look, for many t: `value` is the index where its expectation is what
    was seen, `low` and `high` where what was seen is at its 97.5th and 2.5th percentile.

    It is the index of cells that can be told from noise: neighbours are put together until they hold `RARE_SHARE` of
    the rows, and `RARE_SDS` standard deviations of their noise; and a share below `LEAST_SHARE`, or one standard
    deviation of its noise, counts as so much on both sides. Both can only make it less than that of the cells as given.

    Both samples count as independent. Where the same people are in both, chance moves them apart less than that: the
    interval is then wider than it need be, and the value a little low.

    Args:
        reference: counts of k cells.
        current: of the same cells.
        ordered: whether cells have neighbours; else they are put in the order of their size.
        apart: so many of the last cells (unseen, missing) are never put together with others.
        seed: of the draws.

    Source:
        The expectation: Yurdakul, Statistical Properties of Population Stability Index, Western Michigan University
        2018, chapter 3. The interval inverts a test, as by Neyman, 1937; its chance is simulated.
    """
    reference, current = _put_together(reference, current, ordered, apart)
    floors = np.maximum(LEAST_SHARE, np.maximum(reference.sds / reference.rows, current.sds / current.rows))
    if floors.sum() >= BLIND:
        return Psi(None, 0.0, None)
    chance = _Chance(reference, current, floors, np.random.default_rng(seed))
    seen = float(index(_floored(reference.counts, floors), _floored(current.counts, floors)))
    usual = max(float(chance.drawn(np.zeros(1)).mean()), 1e-12)
    steps = np.linspace(0.0, 1.0 + REACH * np.sqrt(usual / max(seen, 1e-3 * usual)), STEPS)
    drawn, exact = chance.drawn(steps), chance.exact(steps)

    def where(expected: Floats, at: float) -> float:
        return float(np.interp(at, np.maximum.accumulate(expected), exact))

    value = where(drawn.mean(axis=1), seen)
    least, most = np.quantile(drawn, [TAIL, 1 - TAIL], axis=1)
    low = where(most, seen)
    # Seen to be nearer than two samples of one population usually are: that is luck, and says no more than the usual.
    high = where(least, max(seen, usual))
    return Psi(value, min(low, value), max(high, value))


class _Chance:
    """What the index would be of noised samples of two populations that lie on a line through the two that were seen.

    Args:
        reference, current: as seen.
        floors: (k,) of shares.
        rng: of the draws; the same for every point of the line.
    """

    def __init__(self, reference: Noised, current: Noised, floors: Floats, rng: np.random.Generator) -> None:
        self._sides = (reference, current)
        self._floors = floors
        self._normal = rng.normal(size=(2, DRAWS, len(floors)))
        certain = [side.rows / (1 + float((side.sds**2).sum()) / side.rows) for side in self._sides]
        self._middle = (certain[0] * reference.shares + certain[1] * current.shares) / sum(certain)

    def _at(self, side: Noised, steps: Floats) -> Floats:
        """(s, k) shares, `steps` times as far from the middle as they look."""
        shares = np.maximum(self._middle + steps[:, None] * (side.shares - self._middle), 0.0)
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def exact(self, steps: Floats) -> Floats:
        """(s,) ascending: the index of the populations."""
        reference, current = (_floored(self._at(side, steps), self._floors) for side in self._sides)
        return np.maximum.accumulate(index(reference, current))

    def drawn(self, steps: Floats) -> Floats:
        """(s, draws) of noised samples; a count of many people varies about as a normal variable."""
        sampled = []
        for side, normal in zip(self._sides, self._normal, strict=True):
            mean = side.rows * self._at(side, steps)[:, None]
            sampled.append(_floored(mean + np.sqrt(mean + side.sds**2) * normal, self._floors))
        return index(*sampled)


def _floored(counts: Floats, floors: Floats) -> Floats:
    """(..., k) counts -> shares, none below its floor, together 1."""
    shares = np.maximum(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-9), floors)
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


def _put_together(reference: Noised, current: Noised, ordered: bool, apart: int) -> tuple[Noised, Noised]:
    """Both with groups of cells as their cells. Both decide on the groups, so that neither is there by its luck."""
    sides = (reference, current)
    share = np.mean([side.counts / side.rows for side in sides], axis=0)
    variance = np.mean([(side.sds / side.rows) ** 2 for side in sides], axis=0) / 2
    cells = np.arange(len(share) - apart)
    groups: list[list[int]] = [[]]
    for cell in cells if ordered else cells[np.argsort(-share[cells])]:
        groups[-1].append(int(cell))
        if share[groups[-1]].sum() >= max(RARE_SHARE, RARE_SDS * float(np.sqrt(variance[groups[-1]].sum()))):
            groups.append([])
    groups += [[cell] for cell in range(len(share) - apart, len(share))]
    groups = [group for group in groups if group]

    def grouped(side: Noised) -> Noised:
        counts = np.array([side.counts[group].sum() for group in groups])
        return Noised(counts, np.array([np.linalg.norm(side.sds[group]) for group in groups]))

    return grouped(reference), grouped(current)
