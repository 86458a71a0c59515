"""How good predictions are, from noised counts of scores by label: nobody's score or label is seen.

Each device shares its rows' scores between nodes (`hybrid.query.Scores`); everything here is computed of the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hybrid.analytics.asking import Answer, Ask
from hybrid.analytics.estimates import LEAST, Estimate, Estimated, Statistic, estimate, quotient, simulated
from hybrid.errors import ConfigError
from hybrid.query import AGAINST, SCORE, Floats, Query, Scores

NODES = 64
DECILES = 10
THRESHOLD = 0.5
POINTS = 101  # of a curve


def arcsine_nodes(nodes: int = NODES) -> Floats:
    """(nodes,) from 0 to 1, closer together near both ends, where a score's own spread is smaller: sin^2 of even steps.

    >>> arcsine_nodes(3).round(3).tolist()
    [0.0, 0.5, 1.0]
    """
    return np.asarray(np.sin(np.linspace(0, math.pi / 2, nodes)) ** 2)


def nodes_for(nodes: Sequence[float] | None, threshold: float = THRESHOLD) -> Floats:
    """Those by which scores are counted, with two at the threshold: rows below it share none with rows above.

    Args:
        nodes: ascending probabilities; None: `arcsine_nodes()`.
        threshold: of precision and recall, which so are exact; in (0, 1).

    Raises:
        ConfigError: the threshold is out of range.
    """
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold must be in (0, 1), got {threshold!r}")
    return np.union1d(arcsine_nodes() if nodes is None else nodes, [threshold, np.nextafter(threshold, 1)])


def auc(counts: Floats) -> Floats:
    """(b, 2, nodes) -> (b,) chance that a positive scores above a negative.

    A tie counts half. Rows of neighbouring nodes may come from between them, where their order was lost as they were
    shared out: for nodes h apart, and negatives and positives of the densities f and g, a sum of f' g h^2 / 4 too much.
    That is an eighth of how negatives change from the node before to the one behind, and is taken away.
    """
    negative, positive = counts[:, 0], counts[:, 1]
    around = np.pad(negative, ((0, 0), (1, 1)))
    below = np.cumsum(negative, axis=1) - negative / 2 - (around[:, 2:] - around[:, :-2]) / 8
    return quotient((positive * below).sum(axis=1), positive.sum(axis=1) * negative.sum(axis=1))


def log_loss(nodes: Floats) -> Callable[[Floats], Floats]:
    """Mean of -log of the probability given to what happened, in nats.

    A score is taken to be at least half the first step of the nodes away from 0 and from 1.
    """
    kept = _kept(nodes)
    of_label = np.stack([-np.log1p(-kept), -np.log(kept)])
    return lambda counts: quotient((counts * of_label).sum(axis=(1, 2)), counts.sum(axis=(1, 2)))


def normalised_entropy(nodes: Floats) -> Callable[[Floats], Floats]:
    """Log-loss over that of always predicting the mean label: below 1 is better than that.

    Source:
        He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014, section 3.
    """
    loss = log_loss(nodes)

    def function(counts: Floats) -> Floats:
        rate = mean_label(counts)
        kept = np.clip(rate, LEAST, 1 - LEAST)
        entropy = -kept * np.log(kept) - (1 - kept) * np.log1p(-kept)
        return quotient(loss(counts), np.where(rate == kept, entropy, 0.0))  # of a rate that noise alone can make: none

    return function


def mean_label(counts: Floats) -> Floats:
    """Share of positives."""
    return quotient(counts[:, 1].sum(axis=1), counts.sum(axis=(1, 2)))


def mean_prediction(nodes: Floats) -> Callable[[Floats], Floats]:
    """Mean score; exact, since scores are shared between nodes linearly."""
    return lambda counts: quotient((counts * nodes).sum(axis=(1, 2)), counts.sum(axis=(1, 2)))


def calibration(nodes: Floats) -> Callable[[Floats], Floats]:
    """Mean prediction over mean label: 1 is calibrated in the large."""
    predicted = mean_prediction(nodes)
    return lambda counts: quotient(predicted(counts), mean_label(counts))


def precision(nodes: Floats, threshold: float = THRESHOLD) -> Callable[[Floats], Floats]:
    """Share of positives among rows that score above a threshold; exact with `nodes_for` it."""
    above = nodes > threshold

    def function(counts: Floats) -> Floats:
        chosen = (counts * above).sum(axis=2)
        return quotient(chosen[:, 1], chosen.sum(axis=1))

    return function


def recall(nodes: Floats, threshold: float = THRESHOLD) -> Callable[[Floats], Floats]:
    """Share of the positives that score above a threshold; exact with `nodes_for` it."""
    above = nodes > threshold
    return lambda counts: quotient((counts[:, 1] * above).sum(axis=1), counts[:, 1].sum(axis=1))


def statistics(nodes: Floats, threshold: float = THRESHOLD) -> dict[str, Statistic]:
    """What `evaluate` reports, by name: functions of flat counts (b, 2 x nodes)."""
    of_pairs = {
        "auc": auc,
        "log_loss": log_loss(nodes),
        "normalised_entropy": normalised_entropy(nodes),
        "calibration": calibration(nodes),
        "mean_prediction": mean_prediction(nodes),
        "mean_label": mean_label,
        "precision": precision(nodes, threshold),
        "recall": recall(nodes, threshold),
    }
    return {name: _flat(function, len(nodes)) for name, function in of_pairs.items()}


@dataclass(frozen=True)
class Curve:
    """A curve with a band that is for each of its points by itself.

    Attributes:
        x, y, low, high: (k,); the band is the noise's.
    """

    x: Floats
    y: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Evaluation:
    """How good a version is.

    Attributes:
        metrics: by name, see `statistics`.
        roc: true against false positive rate.
        deciles: mean label against mean prediction in ten parts of equally many rows.
        rows: noised number of rows.
        people: who were asked.
    """

    metrics: dict[str, Estimate]
    roc: Curve
    deciles: Curve
    rows: Estimate
    people: int


@dataclass(frozen=True)
class Comparison:
    """Two versions on the same rows.

    Attributes:
        first, second: how good each is.
        differences: the first's less the second's, by name; with intervals for paired rows, which are narrower than
            what the two versions' own intervals would let one think.
    """

    first: Evaluation
    second: Evaluation
    differences: dict[str, Estimate]


def evaluate(
    ask: Ask,
    *,
    nodes: Sequence[float] | None = None,
    rows: int = 8,
    clip: float | None = None,
    threshold: float = THRESHOLD,
    share: float = 1.0,
    full: bool = True,
) -> Evaluation:
    """Measures the scores of people's labelled rows.

    Args:
        ask: whom: their columns "score" and "label".
        nodes: see `nodes_for`.
        rows: of a person, at most, the last ones.
        clip: see `Query`.
        threshold: of precision and recall.
        share: of the question's epsilon.
        full: whether intervals for the population are wanted too.

    Raises:
        BudgetExceeded: the ledger has not enough left.
        ConfigError: the threshold is out of range.
    """
    grid = nodes_for(nodes, threshold)
    query = Query(parts=(_scores(grid, SCORE),), rows=rows, clip=clip)
    named = statistics(grid, threshold) | {"rows": lambda counts: counts.sum(axis=1)}
    found = estimate(ask, query, named, share=share, full=full, totals=("rows",))
    return _evaluation(found, grid, 0)


def compare(
    ask: Ask,
    *,
    nodes: Sequence[float] | None = None,
    rows: int = 8,
    clip: float | None = None,
    threshold: float = THRESHOLD,
    share: float = 1.0,
    full: bool = True,
) -> Comparison:
    """Measures two versions on the same rows with one query, which has both scores of each.

    A person moves the sums for both, so that each version's noise is sqrt(2) times what it is where it is asked
    about alone.

    Args:
        ask: whom: their columns "score", "score_against" and "label".
        nodes: see `nodes_for`.
        rows: of a person, at most, the last ones.
        clip: see `Query`.
        threshold: of precision and recall.
        share: of the question's epsilon.
        full: whether intervals for the population are wanted too.

    Raises:
        BudgetExceeded: the ledger has not enough left.
        ConfigError: the threshold is out of range.
    """
    grid = nodes_for(nodes, threshold)
    query = Query(parts=(_scores(grid, SCORE), _scores(grid, AGAINST)), rows=rows, clip=clip)
    of_one, size = statistics(grid, threshold), 2 * len(grid)
    first, second = ({name: _of_part(f, place, size) for name, f in of_one.items()} for place in range(2))
    named: dict[str, Statistic] = {"rows": lambda counts: counts[:, :size].sum(axis=1)}
    for name in of_one:
        named |= {name: first[name], f"against.{name}": second[name]}
        if name != "mean_label":  # the rows are the same
            named[f"difference.{name}"] = _less(first[name], second[name])
    found = estimate(ask, query, named, share=share, full=full, totals=("rows",))
    differences = {
        name.removeprefix("difference."): value
        for name, value in found.estimates.items()
        if name.startswith("difference.")
    }
    return Comparison(_evaluation(found, grid, 0), _evaluation(found, grid, 1, "against."), differences)


def _scores(nodes: Floats, column: str) -> Scores:
    return Scores(nodes=tuple(nodes.tolist()), column=column, cumulative=True)


def _evaluation(found: Estimated, nodes: Floats, part: int, prefix: str = "") -> Evaluation:
    """Of one part of a query."""
    size = 2 * len(nodes)
    names = statistics(nodes)
    return Evaluation(
        metrics={name: _in_range(name, found.estimates[f"{prefix}{name}"]) for name in names},
        roc=_curve(found.answer, _of_part(_roc(len(nodes)), part, size)),
        deciles=_curve(found.answer, _of_part(_deciles(nodes), part, size)),
        rows=found.estimates["rows"],
        people=found.answer.people,
    )


def _of_part(function: Statistic, part: int, size: int) -> Statistic:
    return lambda counts: function(counts[:, part * size : (part + 1) * size])


def _less(first: Statistic, second: Statistic) -> Statistic:
    return lambda counts: first(counts) - second(counts)


def _in_range(name: str, value: Estimate) -> Estimate:
    shares = {"auc", "mean_prediction", "mean_label", "precision", "recall"}
    return value.within(0.0, 1.0 if name in shares else math.inf)


def _flat(function: Callable[[Floats], Floats], nodes: int) -> Statistic:
    return lambda counts: function(counts.reshape(len(counts), 2, nodes))


def _curve(answer: Answer, function: Callable[[Floats], Floats]) -> Curve:
    """(1, counts) -> (1, 2, k) x and y; the band from the mechanism's noise drawn again."""
    x, y = function(answer.counts.reshape(1, -1))[0]
    around = simulated(answer, function)[:, 1]
    low, high = np.nanpercentile(around, [2.5, 97.5], axis=0)
    return Curve(x, y, np.minimum(low, y), np.maximum(high, y))


def _roc(nodes: int) -> Callable[[Floats], Floats]:
    """True positive rate at even false positive rates."""
    at = np.linspace(0, 1, POINTS)

    def function(counts: Floats) -> Floats:
        above = np.cumsum(np.flip(counts.reshape(len(counts), 2, nodes), axis=2), axis=2)
        rates = np.clip(_ascending(above) / np.maximum(above[:, :, -1:], LEAST), 0, 1)
        curves = [np.interp(at, false, true) for false, true in np.pad(rates, ((0, 0), (0, 0), (1, 0)))]
        return np.stack([np.broadcast_to(at, (len(counts), POINTS)), np.stack(curves)], axis=1)

    return function


def _deciles(nodes: Floats) -> Callable[[Floats], Floats]:
    """Mean prediction and mean label in ten parts of equally many rows, each node's rows cut in proportion.

    From running sums, which have the least noise.
    """
    places = np.arange(len(nodes) + 1)

    def function(counts: Floats) -> Floats:
        pairs = counts.reshape(len(counts), 2, len(nodes))
        rows = pairs.sum(axis=1)
        sums = np.cumsum(np.stack([rows, rows * nodes, pairs[:, 1]], axis=1), axis=2)
        parts = []
        for below, scores, positives in np.pad(sums, ((0, 0), (0, 0), (1, 0))):
            whole = max(float(below[-1]), LEAST)
            cuts = np.linspace(0, whole, DECILES + 1)[1:-1]
            ends = np.concatenate([[0], np.interp(cuts, np.clip(_ascending(below), 0, whole), places), [places[-1]]])
            parts.append([np.diff(np.interp(ends, places, each)) * DECILES / whole for each in (scores, positives)])
        return np.clip(np.array(parts), 0, 1)

    return function


def _ascending(sums: Floats) -> Floats:
    """(..., k) noised running sums -> ones that do not fall: amid the least that are above and the most below."""
    above = np.maximum.accumulate(sums, axis=-1)
    below = np.flip(np.minimum.accumulate(np.flip(sums, -1), axis=-1), -1)
    return np.asarray((above + below) / 2)


def _kept(nodes: Floats) -> Floats:
    return np.asarray(np.clip(nodes, (nodes[1] - nodes[0]) / 2, 1 - (nodes[-1] - nodes[-2]) / 2))
