"""Questions about one feature, or about the label: counts, moments, histograms, quantiles, categories.

Each is one noised sum of bounded contributions, or two; every number comes with both intervals of
`hybrid.analytics.estimates`. No part of epsilon is spent on the full one. The rows of a person may depend on each
other, so they are counted as if they were alike: what k rows add, d_1 to d_k, has (d_1 + ... + d_k)^2 <= k (d_1^2 + ...
+ d_k^2) (Cauchy and Schwarz), and the sum of d^2 over rows is known from the answer. That is exact where one row is
asked of each person, and too wide where a person's several rows differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.analytics.asking import Answer, Ask
from hybrid.analytics.estimates import LEAST, Estimate, gradient, quantiles_of, quotient
from hybrid.analytics.vocabulary import discover
from hybrid.errors import ConfigError
from hybrid.features import Bucketize, Categorical, Log1p, Numeric, Transform
from hybrid.query import (
    MOST_GROUPS,
    AnyPart,
    By,
    Categories,
    Floats,
    Histogram,
    Labels,
    Moments,
    Query,
)
from hybrid.spec import HybridModel

CELLS = 512  # at least, of the fine histogram that quantiles are read from
BINS = 10  # of a histogram that nobody asked to be finer
MOST_EDGES = 1000
WIDTHS = 4.0  # standard deviations from the mean to a bound, where bounds are a declaration's
ADAPTIVE_SHARES = (0.3, 0.7)  # of an adaptive histogram's epsilon: for its edges, for its counts


@dataclass(frozen=True)
class Asked:
    """Which rows are counted, and by what: see `Query`.

    Attributes:
        rows: of a person, at most; >= 1.
        take: "last" or "first": which, where a person has more.
        by: groups; None: all together.
    """

    rows: int = 1
    take: Literal["last", "first"] = "last"
    by: By | None = None

    @property
    def groups(self) -> tuple[str | None, ...]:
        """Their names; one without a name where all are counted together."""
        return (None,) if self.by is None else self.by.values

    def query(self, part: AnyPart) -> Query:
        """Of one part."""
        return Query(parts=(part,), rows=self.rows, take=self.take, by=self.by)


@dataclass(frozen=True)
class Scale:
    """Between which values a number is asked about, and whether evenly or by the logarithm of one more.

    Attributes:
        low, high: in the feature's own unit.
        log: whether log(1 + max(x, 0)) stands for x.

    Raises:
        ConfigError: low is not below high, or, on a logarithmic scale, below 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(f"low must be finite and below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low < 0:
            raise ConfigError(f"low must be at least 0 for a logarithmic scale, got {self.low:g}")

    def grid(self, cells: int) -> Floats:
        """(cells + 1,) edges from low to high."""
        if not self.log:
            return np.linspace(self.low, self.high, cells + 1)
        edges = np.expm1(np.linspace(math.log1p(self.low), math.log1p(self.high), cells + 1))
        edges[[0, -1]] = self.low, self.high
        return np.asarray(edges)


@dataclass(frozen=True)
class Numbers:
    """Moments of one group's values, each kept between the bounds; on a logarithmic scale those of log(1 + x).

    Attributes:
        group: None where all are together.
        count: rows with a value.
        sum, mean, variance, std: of them; the variance is over the rows, with n as its denominator.
    """

    group: str | None
    count: Estimate
    sum: Estimate
    mean: Estimate
    variance: Estimate
    std: Estimate


@dataclass(frozen=True)
class Counts:
    """Rows of one group by cell.

    Attributes:
        group: None where all are together.
        cells: rows in each.
        shares: of the rows that are in any of them.
        rows: in all cells together.
        missing: rows without a value; None where such rows are not asked about.
    """

    group: str | None
    cells: tuple[Estimate, ...]
    shares: tuple[Estimate, ...]
    rows: Estimate
    missing: Estimate | None


@dataclass(frozen=True)
class Binned:
    """A histogram of each group, over the same bins.

    Attributes:
        edges: ascending; the first bin is below the first edge, the last from the last edge on.
        groups: their counts.
    """

    edges: tuple[float, ...]
    groups: tuple[Counts, ...]


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of each group.

    Attributes:
        levels: in (0, 1), ascending.
        groups: their values at each level, ascending.
        histogram: of the same answer, with few bins.
    """

    levels: tuple[float, ...]
    groups: tuple[tuple[Estimate, ...], ...]
    histogram: Binned


def numbers(ask: Ask, feature: str, scale: Scale, asked: Asked, *, share: float = 1.0) -> tuple[Numbers, ...]:
    """Count, sum, mean, variance and standard deviation of a numeric feature, one of each group.

    Args:
        ask: whom.
        feature: its name.
        scale: what is outside its bounds counts as at the bound.
        asked: which rows.
        share: of the question's epsilon.

    Raises:
        BudgetExceeded: the ledger has not enough left.
    """
    part = Moments(column=feature, low=scale.low, high=scale.high, scale="log1p" if scale.log else "linear")
    answer = ask(asked.query(part), share=share)
    found = zip(asked.groups, answer.counts, strict=True)
    return tuple(_numbers(group, counts, answer, part.range) for group, counts in found)


def histogram(ask: Ask, feature: str, edges: Sequence[float], asked: Asked, *, share: float = 1.0) -> Binned:
    """Rows by bins that are known before; arguments as for `numbers`.

    Raises:
        BudgetExceeded: the ledger has not enough left.
        ConfigError: edges do not ascend.
    """
    check_edges(edges)
    answer = ask(asked.query(Histogram(column=feature, edges=tuple(edges))), share=share)
    return Binned(tuple(map(float, edges)), _counts(answer, asked.groups, np.eye(len(edges) + 1)))


def adaptive_histogram(
    ask: Ask, feature: str, bins: int, scale: Scale, asked: Asked, *, share: float = 1.0, cells: int = CELLS
) -> Binned:
    """Rows by bins that hold about as many each: their edges are noised quantiles of a first phase.

    Edges are the same for all groups, and places of a fine grid, so that there are fewer bins where many rows have one
    value. What is outside the bounds is in the first or the last bin.

    Args:
        ask: whom; `begin` was told the two `ADAPTIVE_SHARES` of `share`.
        feature: its name.
        bins: how many, at most; at least 2.
        scale: where to look for edges.
        asked: which rows.
        share: of the question's epsilon, for both phases.
        cells: of the fine grid, at least.

    Raises:
        BudgetExceeded: the ledger has not enough left.
        ConfigError: bins are fewer than 2, or more than cells.
    """
    if not 2 <= bins <= cells:
        raise ConfigError(f"bins must be from 2 to {cells}, got {bins}")
    first, second = (part * share for part in ADAPTIVE_SHARES)
    grid = scale.grid(cells)
    together = Asked(asked.rows, asked.take)
    answer = ask(together.query(Histogram(column=feature, edges=tuple(grid.tolist()), cumulative=True)), share=first)
    levels = [place / bins for place in range(1, bins)]
    found = [quantile.value for quantile in quantiles_of(answer, grid, levels)]
    # The edge below: a value that many rows have is then the beginning of a bin, not inside of one.
    places = np.unique(np.clip(np.searchsorted(grid, found, side="right") - 1, 0, cells))
    return histogram(ask, feature, grid[places].tolist(), asked, share=second)


def quantiles(
    ask: Ask,
    feature: str,
    levels: Sequence[float],
    scale: Scale,
    asked: Asked,
    *,
    share: float = 1.0,
    bins: int = BINS,
    cells: int = CELLS,
) -> Quantiles:
    """Quantiles, ascending with the level, and a histogram from the same answer, which costs nothing more.

    Args:
        ask: whom.
        feature: its name.
        levels: in (0, 1), ascending.
        scale: quantiles are between its bounds, to one of about `cells` places or between two.
        asked: which rows.
        share: of the question's epsilon.
        bins: of the histogram, between the bounds; those below and above come beside.
        cells: of the fine grid, at least.

    Raises:
        BudgetExceeded: the ledger has not enough left.
        ConfigError: levels or bins are out of range.
    """
    check_levels(levels)
    if not 1 <= bins <= cells:
        raise ConfigError(f"bins must be from 1 to {cells}, got {bins}")
    step = math.ceil(cells / bins)
    grid = scale.grid(step * bins)
    answer = ask(asked.query(Histogram(column=feature, edges=tuple(grid.tolist()), cumulative=True)), share=share)
    found = [quantiles_of(answer, grid, levels, group=group) for group in range(answer.query.groups)]
    bin_of = np.searchsorted(
        np.arange(bins + 1) * step, np.arange(len(grid) + 1)
    )  # a cell begins at the edge before it
    union = (bin_of == np.arange(bins + 2)[:, None]).astype(np.float64)
    drawn = Binned(tuple(grid[::step].tolist()), _counts(answer, asked.groups, union))
    return Quantiles(tuple(levels), tuple(map(tuple, found)), drawn)


def categories(
    ask: Ask, feature: str, values: Sequence[str], asked: Asked, *, share: float = 1.0
) -> tuple[Counts, ...]:
    """Rows by text: each of the values, and all others as the last cell; arguments as for `numbers`.

    Values are known before. Which values are frequent is another question: see `frequent`.

    Raises:
        BudgetExceeded: the ledger has not enough left.
    """
    answer = ask(asked.query(Categories(column=feature, values=tuple(values))), share=share)
    return _counts(answer, asked.groups, np.eye(len(values) + 1))


def frequent(ask: Ask, feature: str, most: int, *, share: float = 1.0) -> tuple[list[str], Counts]:
    """The most frequent texts of people's last rows, known before or not: see `hybrid.analytics.vocabulary.discover`.

    Args:
        ask: whom; `begin` has been called with `hybrid.analytics.vocabulary.phases(share)`.
        feature: a text feature.
        most: texts at most.
        share: of the whole question's epsilon.

    Returns:
        The texts, and how many people have each. Rows and shares are of all who were asked; none where none stands out.

    Raises:
        BudgetExceeded: the ledger has not enough left.
    """
    found = discover(ask, feature, most, share=share)
    cells, shares = tuple(one.people for one in found), tuple(one.people.over(one.asked) for one in found)
    asked = found[0].asked if found else 0
    return [one.text for one in found], Counts(None, cells, shares, Estimate.of(asked, 0.0, 0.0), None)


def labels(ask: Ask, asked: Asked, *, share: float = 1.0) -> tuple[Counts, ...]:
    """Rows with the label 0, and with the label 1: the share of the second is the label's rate.

    Raises:
        BudgetExceeded: the ledger has not enough left.
    """
    return _counts(ask(asked.query(Labels()), share=share), asked.groups, np.eye(2))


def check_edges(edges: Sequence[float]) -> None:
    """Raises: ConfigError: there are none, too many, or they do not ascend."""
    if not 1 <= len(edges) <= MOST_EDGES:
        raise ConfigError(f"edges must be from 1 to {MOST_EDGES}, got {len(edges)}")
    if not all(map(math.isfinite, edges)) or any(a >= b for a, b in pairwise(edges)):
        raise ConfigError(f"edges must be finite and ascend, got {', '.join(f'{edge:g}' for edge in edges)}")


def check_values(feature: str, values: Sequence[str], most: int) -> None:
    """Raises: ConfigError: there are too many."""
    if len(values) > most:
        raise ConfigError(f"{feature!r} must have at most {most} values to be counted by them, got {len(values)}")


def check_levels(levels: Sequence[float]) -> None:
    """Raises: ConfigError: there are none, or they do not ascend between 0 and 1."""
    if not levels or not all(a < b for a, b in pairwise((0.0, *levels, 1.0))):
        raise ConfigError(
            f"levels of quantiles must ascend between 0 and 1, got {', '.join(map(str, levels)) or 'none'}"
        )


def scale_of(transform: Transform) -> Scale | None:
    """The bounds that a declaration suggests; None where it suggests none.

    >>> scale_of(Numeric(mean=60, std=20))
    Scale(low=-20.0, high=140.0, log=False)
    """
    if isinstance(transform, Numeric) and transform.low is not None and transform.high is not None:
        return Scale(transform.low, transform.high, log=isinstance(transform, Log1p))
    if isinstance(transform, Log1p):
        ends = (max(transform.mean + sign * WIDTHS * transform.std, 0.0) for sign in (-1, 1))
        low, high = (math.expm1(end) for end in ends)
        return Scale(low, high, log=True) if low < high < math.inf else None
    if isinstance(transform, Numeric):
        return Scale(transform.mean - WIDTHS * transform.std, transform.mean + WIDTHS * transform.std)
    if isinstance(transform, Bucketize) and len(transform.edges) > 1:
        return Scale(transform.edges[0], transform.edges[-1])
    return None


def by_of(model: HybridModel, key: str) -> By:
    """Groups by a feature that the server knows of each row, and whose values are declared.

    Raises:
        ConfigError: there is no such feature; the message says by which one can.
    """
    known = server_keys(model)
    if key in known:
        check_values(key, known[key], MOST_GROUPS)
        return By(column=key, values=known[key])
    if key in model.device:
        why = f"{key!r} is known only on devices: which group a person is in would be a secret of its own"
    else:
        why = f"got {key!r}"
    possible = ", ".join(known) or "none"
    raise ConfigError(f"by must be a request or server feature with a declared vocabulary ({possible}); {why}")


def server_keys(model: HybridModel) -> dict[str, tuple[str, ...]]:
    """Name -> vocabulary of the features that the server knows of each row: what questions can be grouped by."""
    known = {**model.request, **model.server.features.transforms}
    return {name: t.vocabulary for name, t in known.items() if isinstance(t, Categorical)}


def _numbers(group: str | None, counts: Floats, answer: Answer, ends: tuple[float, float]) -> Numbers:
    """Of one group, from its count, sum and sum of squares of x in [0, 1]."""
    low, span = ends[0], ends[1] - ends[0]
    rows, most = answer.query.rows, answer.query.rows * answer.people

    def mean(c: Floats) -> Floats:
        return quotient(c[:, 1], c[:, 0])

    def variance(c: Floats) -> Floats:
        return quotient(c[:, 2], c[:, 0]) - mean(c) ** 2  # noise may leave it below 0

    functions: dict[str, Callable[[Floats], Floats]] = {
        "count": lambda c: c[:, 0],
        "sum": lambda c: low * c[:, 0] + span * c[:, 1],
        "mean": lambda c: low + span * mean(c),
        "variance": lambda c: span**2 * variance(c),
    }
    n = float(np.clip(counts[0], 1.0, most))
    m, v = (float(np.nan_to_num(function(counts[None])[0])) for function in (mean, variance))
    v = max(v, 0.0)
    total = float(functions["sum"](counts[None])[0])
    squares = low**2 * n + 2 * low * span * float(counts[1]) + span**2 * float(counts[2])
    # A fourth moment is at most the largest square times the second.
    fourth = max(max(abs(m), abs(1 - m)) ** 2 * v - v**2, 0.0)
    sampling = {
        "count": n * (rows - n / answer.people),
        "sum": rows * squares - total**2 / answer.people,
        "mean": rows * span**2 * v / n,
        "variance": rows * span**4 * fourth / n,
    }
    within = {
        "count": (0.0, float(most)),
        "sum": (min(low, 0.0) * most, max(low + span, 0.0) * most),
        "mean": (low, low + span),
        "variance": (0.0, span**2 / 4),
    }
    found = {}
    for name, function in functions.items():
        noise = answer.sd * float(np.linalg.norm(gradient(function, counts)))
        value = float(function(counts[None])[0])
        found[name] = Estimate.of(value, noise, max(sampling[name], 0.0)).within(*within[name])
    return Numbers(group, **found, std=found["variance"].mapped(math.sqrt))


def _counts(answer: Answer, groups: Sequence[str | None], union: NDArray[np.float64]) -> tuple[Counts, ...]:
    """Rows by cell of each group.

    Args:
        answer: to one part.
        groups: their names.
        union: (m, c) which of the first c numbers of a group are in each of m cells; one after them is of missing
            values.
    """
    found = []
    for place, group in enumerate(groups):
        size = answer.counts.shape[1]
        weights = np.zeros((len(union), size))
        weights[:, : union.shape[1]] = union
        cells = _totals(answer, place, weights)
        (rows,) = _totals(answer, place, weights.sum(axis=0, keepdims=True))
        missing = None
        if size > union.shape[1]:
            (missing,) = _totals(answer, place, np.eye(size)[-1:])
        found.append(Counts(group, cells, _shares(answer, place, weights), rows, missing))
    return tuple(found)


def _totals(answer: Answer, group: int, weights: Floats) -> tuple[Estimate, ...]:
    """Sums of a group's numbers, by (m, size) weights of 0 and 1."""
    rows, people = answer.query.rows, answer.people
    values, noise = weights @ answer.counts[group], answer.noise_sd(_placed(answer, group, weights))
    kept = np.clip(values, 0.0, rows * people)
    sampling = kept * (rows - kept / max(people, 1))
    estimates = (Estimate.of(*map(float, one)) for one in zip(values, noise, sampling, strict=True))
    return tuple(one.within(0.0, rows * people) for one in estimates)


def _shares(answer: Answer, group: int, weights: Floats) -> tuple[Estimate, ...]:
    """What part of all of them each sum is."""
    counts, whole = answer.counts[group], weights.sum(axis=0)
    total = float(whole @ counts)
    shares = weights @ counts / total if total > LEAST else np.full(len(weights), math.nan)
    at_least = max(total, 1.0)
    slopes = (weights - np.nan_to_num(shares)[:, None] * whole) / at_least
    noise = answer.noise_sd(_placed(answer, group, slopes))
    kept = np.clip(np.nan_to_num(shares), 0.0, 1.0)
    sampling = answer.query.rows * kept * (1 - kept) / at_least
    estimates = (Estimate.of(*map(float, one)) for one in zip(shares, noise, sampling, strict=True))
    return tuple(one.within(0.0, 1.0) for one in estimates)


def _placed(answer: Answer, group: int, weights: Floats) -> Floats:
    """(m, size) of one group -> (m, counts) of all."""
    placed = np.zeros((len(weights), answer.query.groups, weights.shape[1]))
    placed[:, group] = weights
    return placed.reshape(len(weights), -1)
