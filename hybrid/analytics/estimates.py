"""What noised sums say, and how sure that is: each estimate with two intervals.

The *noise* interval is for the exact value on these people: only the mechanism's noise is in it. The *full* one is for
the population that they are drawn from, person by person: the rows of one are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.analytics.asking import Answer, Ask
from hybrid.query import Floats, Query

Z95 = 1.959964  # of a normal distribution: 95 % lie within
SPREAD_SHARE = 0.15  # of a question's epsilon, for its sampling variance
LEAST = 1e-12  # of what is divided by
STEP = 1e-3  # of the largest count, by which gradients are found

Statistic = Callable[[Floats], Floats]
"""(b, counts) -> (b,): a smooth function of summed counts, computed for many at once; NaN where it has no value."""


@dataclass(frozen=True)
class Interval:
    """95 %.

    Attributes:
        low, high: its ends.
    """

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """One number with its intervals.

    Attributes:
        value: the estimate; NaN where the noise left nothing to divide by.
        noise: for the exact value on these people.
        full: for the population; None where it was not asked for.
    """

    value: float
    noise: Interval
    full: Interval | None = None

    @classmethod
    def of(cls, value: float, noise_sd: float, sampling_variance: float | None = None) -> Estimate:
        """By the normal distribution."""
        full = None if sampling_variance is None else math.sqrt(noise_sd**2 + sampling_variance)
        return cls(value, _around(value, noise_sd), None if full is None else _around(value, full))

    def mapped(self, increasing: Callable[[float], float]) -> Estimate:
        """Of an increasing function of the number: an interval's ends go where it takes them."""

        def of(interval: Interval) -> Interval:
            return Interval(increasing(interval.low), increasing(interval.high))

        return Estimate(increasing(self.value), of(self.noise), None if self.full is None else of(self.full))

    def over(self, whole: float) -> Estimate:
        """As a share of what is known exactly; > 0."""
        return self.mapped(lambda value: value / whole)

    def within(self, low: float, high: float) -> Estimate:
        """Kept in the range that such a number can have."""
        return self.mapped(lambda value: float(np.clip(value, low, high)))


@dataclass(frozen=True)
class Estimated:
    """Statistics of one query.

    Attributes:
        answer: the noised counts.
        estimates: by name.
    """

    answer: Answer
    estimates: dict[str, Estimate]


def estimate(
    ask: Ask,
    query: Query,
    statistics: Mapping[str, Statistic],
    *,
    share: float = 1.0,
    full: bool = True,
    totals: Sequence[str] = (),
) -> Estimated:
    """Asks a query and computes statistics of its counts, in one phase, or in two for full intervals.

    Args:
        ask: whom; `begin(shares_of(share, full=full))` has been called.
        query: what.
        statistics: by name.
        share: of the whole question's epsilon.
        full: whether full intervals are wanted, which takes `SPREAD_SHARE` of that.
        totals: names of those that grow with the number of people, like a count, where the others do not change when
            everybody is there twice.

    Raises:
        BudgetExceeded: the ledger has not enough left.
    """
    first, *second = shares_of(share, full=full)
    answer = ask(query, share=first)
    counts = answer.counts.ravel()
    values = {name: float(function(counts[None])[0]) for name, function in statistics.items()}
    gradients = np.stack([gradient(function, counts) for function in statistics.values()])
    noise = answer.noise_sd(gradients)
    variances: Sequence[float | None] = [None] * len(values)
    if second:
        centres = [values[name] / answer.people if name in totals else 0.0 for name in statistics]
        variances = _sampling(ask, query, gradients, np.array(centres), share=second[0]).tolist()
    found = zip(values.items(), noise, variances, strict=True)
    return Estimated(answer, {name: Estimate.of(value, float(sd), variance) for (name, value), sd, variance in found})


def shares_of(share: float, *, full: bool) -> tuple[float, ...]:
    """Of the phases of one `estimate`."""
    return ((1 - SPREAD_SHARE) * share, SPREAD_SHARE * share) if full else (share,)


def gradient(function: Statistic, counts: Floats) -> Floats:
    """(counts,) by central differences, all at once; 0 where the function has no value."""
    step = STEP * max(1.0, float(np.abs(counts).max()))
    moved = counts + step * np.concatenate([np.eye(len(counts)), -np.eye(len(counts))])
    above, below = np.split(function(moved), 2)
    return np.nan_to_num((above - below) / (2 * step))


def quotient(part: Floats, whole: Floats) -> Floats:
    """(b,) twice -> (b,); NaN where noise, or nobody, left nothing to divide by."""
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(whole), math.nan), where=whole > LEAST))


def simulated(answer: Answer, function: Callable[[Floats], Floats], *, draws: int = 400, seed: int = 0) -> Floats:
    """(draws, ...) a function of counts that have the mechanism's noise once more: for what is not smooth.

    Post-processing: it tells nothing new, and costs nothing.
    """
    rng = np.random.default_rng(seed)
    noisy = answer.total + rng.normal(0.0, answer.sd, (draws, len(answer.total)))
    return function(answer.query.decode(noisy))


def _sampling(ask: Ask, query: Query, gradients: Floats, centres: Floats, *, share: float) -> Floats:
    """(m,) variances over people of the statistics, rather too large than too small by the noise that they have."""
    cap = query.rows * np.abs(gradients).max(axis=1) + np.abs(centres)
    cap = np.where(cap > 0, cap, 1.0)
    spread = query.model_copy(update={"spread": tuple(cap.tolist())})
    payload = np.concatenate([gradients, centres[:, None]], axis=1).astype(np.float32).ravel()
    answer = ask(spread, share=share, payload=payload)
    return cap**2 * np.maximum(answer.total + answer.sd, 0.0)


def _around(value: float, sd: float) -> Interval:
    return Interval(value - Z95 * sd, value + Z95 * sd)


def quantiles_of(
    answer: Answer, edges: NDArray[np.floating], levels: Sequence[float], *, group: int = 0
) -> list[Estimate]:
    """Quantiles from a cumulative histogram with `edges`, ascending with the level; each with both intervals.

    The noised distribution function is made to ascend (the nearest one that does), and inverted by lines between
    edges. An interval holds every edge-to-edge place at which the function may pass the level. The full one counts
    the rows of a person as if they were all alike.

    Args:
        answer: to a `Histogram` alone; rows without a value count nowhere.
        edges: of the histogram; (k,).
        levels: in (0, 1), ascending.
        group: of the answer, its place.

    Returns:
        One for each level, within the edges.
    """
    from scipy.optimize import isotonic_regression

    cells = len(edges) + 1
    counts = answer.counts[group][:cells]
    below = np.cumsum(counts)  # rows below each edge, and all
    rows = max(float(below[-1]), 1.0)
    sums = np.tri(cells)
    gradients = np.zeros((len(edges), answer.query.groups, cells + 1))
    found = []
    for level in levels:
        # What is above the level at each edge: rows below it, less its share of all.
        gradients[:, group, :cells] = sums[:-1] - level
        excess = below[:-1] - level * below[-1]
        noise = answer.noise_sd(gradients.reshape(len(edges), -1))
        rising = isotonic_regression(excess / rows).x
        value = float(np.interp(0.0, rising, edges))
        sampling = rows * answer.query.rows * level * (1 - level)
        both = np.sqrt(noise**2 + sampling)
        found.append(Estimate(value, *(_crossing(edges, excess, Z95 * sd, value) for sd in (noise, both))))
    return found


def _crossing(edges: NDArray[np.floating], excess: Floats, margin: Floats, value: float) -> Interval:
    """From the last edge that is surely below the crossing to the first that is surely above it."""
    low = np.flatnonzero(np.maximum.accumulate(excess + margin) < 0)
    high = np.flatnonzero(np.minimum.accumulate((excess - margin)[::-1])[::-1] > 0)
    ends = (edges[low[-1]] if len(low) else edges[0], edges[high[0]] if len(high) else edges[-1])
    return Interval(min(float(ends[0]), value), max(float(ends[1]), value))
