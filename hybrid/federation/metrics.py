"""How good predictions are: ranking, log-loss, calibration, and whether two models differ by more than chance.

NumPy only. Everything here is computed from pooled rows, so in a report it is
marked `oracle`: a simulation may show it, a fleet never could.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError

Floats = NDArray[np.floating]
CHUNK_CELLS = 1 << 19  # of one block of the bootstrap: 4 MiB an array


def auc(labels: Floats, scores: Floats) -> float:
    """Chance that a random positive scores above a random negative; a tie counts half.

    Args:
        labels: (n,) 0 or 1, of both kinds.
        scores: (n,).

    >>> auc(np.array([0, 1, 1, 0]), np.array([0.1, 0.9, 0.4, 0.4]))
    0.875
    """
    return float(_weighted_auc(labels, scores, np.ones((len(labels), 1)))[0])


def log_loss(labels: Floats, predictions: Floats) -> float:
    """Mean of -log of the probability given to what happened, in nats.

    Args:
        labels: (n,) 0 or 1.
        predictions: (n,) probabilities; kept 1e-7 away from 0 and 1.
    """
    return float(_row_losses(labels, predictions).mean())


@dataclass(frozen=True)
class Calibration:
    """Whether predicted probabilities are what happens.

    Attributes:
        ratio: mean prediction over mean label; 1 is calibrated in the large.
        ece: expected calibration error: mean distance of prediction and label over the bins, weighted by rows.
        rows, predicted, observed: of each bin: how many rows, their mean prediction, their mean label.
    """

    ratio: float
    ece: float
    rows: tuple[int, ...]
    predicted: tuple[float, ...]
    observed: tuple[float, ...]


def calibration(labels: Floats, predictions: Floats, *, bins: int = 10) -> Calibration:
    """Compares prediction and label in bins of (nearly) equally many rows: deciles by default.

    Args:
        labels: (n,) 0 or 1.
        predictions: (n,) probabilities.
        bins: how many; at most n.
    """
    parts = np.array_split(np.argsort(predictions, kind="stable"), bins)
    rows = np.array([len(part) for part in parts])
    predicted = np.array([predictions[part].mean() for part in parts], dtype=np.float64)
    observed = np.array([labels[part].mean() for part in parts], dtype=np.float64)
    return Calibration(
        ratio=float(predictions.mean() / labels.mean()),
        ece=float((np.abs(predicted - observed) * rows).sum() / len(labels)),
        rows=tuple(rows.tolist()),
        predicted=tuple(predicted.tolist()),
        observed=tuple(observed.tolist()),
    )


@dataclass(frozen=True)
class Compared:
    """Two models' predictions on the same rows of one held-out fold.

    Attributes:
        labels: (n,) 0 or 1.
        ours, theirs: (n,) probabilities.
        users: (n,) whose row it is; any integers.
    """

    labels: Floats
    ours: Floats
    theirs: Floats
    users: NDArray[np.int64]


@dataclass(frozen=True)
class Difference:
    """A paired difference, ours minus theirs, and its percentile interval under resampled users.

    Attributes:
        mean: on the rows themselves, mean over folds.
        low, high: 2.5 % and 97.5 % of the resamples: `low` is the lower 95 % bound.
    """

    mean: float
    low: float
    high: float


def compare(folds: Sequence[Compared], *, resamples: int = 2000, seed: int = 0) -> dict[str, Difference]:
    """Bootstraps the difference of two models over people: the rows of one person are not independent.

    Users are drawn with replacement within each fold, the same draw for both
    models; a resample's difference is the mean over folds.

    Args:
        folds: one item a fold, or one alone.
        resamples: how many draws.
        seed: of the draws.

    Returns:
        "auc" (above 0: ours ranks better) and "log_loss" (below 0: ours fits better).

    Raises:
        ConfigError: there is no fold.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3 (percentile interval).
    """
    if not folds:
        raise ConfigError("compare must get at least one fold, got none")
    rng = np.random.default_rng(seed)
    drawn = [_resampled(fold, resamples, rng) for fold in folds]
    exact = [_differences(fold, np.ones((len(fold.labels), 1))) for fold in folds]
    return {name: _interval(exact, drawn, place) for place, name in enumerate(("auc", "log_loss"))}


def _interval(exact: list[Floats], drawn: list[Floats], place: int) -> Difference:
    means = np.mean([part[place] for part in drawn], axis=0)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return Difference(float(np.mean([part[place, 0] for part in exact])), float(low), float(high))


def _resampled(fold: Compared, resamples: int, rng: np.random.Generator) -> Floats:
    """(2, resamples) differences in AUC and log-loss."""
    _, user = np.unique(fold.users, return_inverse=True)
    count = int(user.max()) + 1
    block = max(1, CHUNK_CELLS // len(user))
    parts = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        times = rng.multinomial(count, np.full(count, 1 / count), size=size)
        parts.append(_differences(fold, times.T.astype(np.float64)[user]))
    return np.concatenate(parts, axis=1)


def _differences(fold: Compared, weights: Floats) -> Floats:
    """(2, r) differences under r weightings of the rows, (n, r)."""
    ranks = [_weighted_auc(fold.labels, scores, weights) for scores in (fold.ours, fold.theirs)]
    loss = _row_losses(fold.labels, fold.ours) - _row_losses(fold.labels, fold.theirs)
    return np.stack([ranks[0] - ranks[1], loss @ weights / weights.sum(axis=0)])


def _weighted_auc(labels: Floats, scores: Floats, weights: Floats) -> Floats:
    """(r,) AUC under r weightings of the rows, (n, r); NaN where one kind of label has no weight."""
    positive = labels > 0
    down = np.flatnonzero(~positive)[np.argsort(scores[~positive], kind="stable")]
    below = np.concatenate([np.zeros((1, weights.shape[1])), np.cumsum(weights[down], axis=0)])
    up = weights[positive]
    first, last = (np.searchsorted(scores[down], scores[positive], side=side) for side in ("left", "right"))
    beaten = np.einsum("nr,nr->r", up, below[first]) + np.einsum("nr,nr->r", up, below[last])
    with np.errstate(invalid="ignore"):
        found: Floats = beaten / (2 * up.sum(axis=0) * below[-1])
    return found


def _row_losses(labels: Floats, predictions: Floats) -> Floats:
    probability = np.clip(predictions.astype(np.float64), 1e-7, 1 - 1e-7)
    return -np.where(labels > 0, np.log(probability), np.log1p(-probability))
