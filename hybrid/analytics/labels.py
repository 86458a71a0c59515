"""Label rates by group, under user-level differential privacy: for a label that only devices know.

Counts are clipped, summed and noised as one Gaussian release; rates are made of
what was released and of nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.privacy.mechanisms import NoiseSource, PaidNoise

PURPOSE = "label-rates"
"""Of the ledger's entries that pay for these releases."""
LEAST = 1e-9  # rows: noise may leave less of a row than a quotient could bear


@dataclass(frozen=True)
class NoisedCounts:
    """Rows and positive rows by group, as released: noise may make them negative, or positives more than rows.

    Attributes:
        rows: how many rows, shape (folds, groups).
        positives: how many of them have the label 1, the same shape.
        sd: standard deviation of the noise of one positive count, in rows, and of one negative
            count, rows - positives, independent of it; those of rows are sqrt(2) as noisy. >= 0.
    """

    rows: NDArray[np.float64]
    positives: NDArray[np.float64]
    sd: float

    def out_of_fold(self) -> NoisedCounts:
        """For each fold the counts of all other folds: what may be joined to the rows of its users.

        Post-processing. The noise of the other folds adds up, so few folds have little.

        Raises:
            ConfigError: there is one fold only.
        """
        folds = len(self.rows)
        if folds < 2:
            raise ConfigError("folds must be at least 2 for counts of the others, got 1")
        return NoisedCounts(
            self.rows.sum(axis=0) - self.rows,
            self.positives.sum(axis=0) - self.positives,
            self.sd * math.sqrt(folds - 1),
        )

    def together(self) -> NoisedCounts:
        """The counts of all folds as one, shape (1, groups). Post-processing."""
        return NoisedCounts(
            self.rows.sum(axis=0, keepdims=True),
            self.positives.sum(axis=0, keepdims=True),
            self.sd * math.sqrt(len(self.rows)),
        )


def noised_label_counts(
    groups: NDArray[np.integer],
    labels: NDArray[np.generic],
    offsets: NDArray[np.integer],
    *,
    number_of_groups: int,
    clip: float,
    noise_multiplier: float,
    noise: NoiseSource,
    pay: Callable[[], None],
    fold: NDArray[np.integer] | None = None,
    folds: int = 1,
) -> NoisedCounts:
    """Counts rows and positive rows by group and releases both, noised, as one Gaussian release.

    A user's contribution is the histogram of its rows over (fold, group, label),
    scaled down to an L2 norm of `clip` as a whole. Positive and negative rows
    are counted, rather than rows and positive rows: a row then moves one count,
    not two, and where `clip` is to hold k rows of any kind, the noise of a rate
    has half the variance or less. A user of one fold moves no other fold's counts, so one event pays
    for all folds, and their noise is independent.

    Args:
        groups: each row's group, shape (n,); a row outside [0, number_of_groups) counts nowhere.
        labels: each row's label, shape (n,); a row whose label is not 0 or 1 counts nowhere.
        offsets: the rows of user u are offsets[u]:offsets[u + 1], shape (users + 1,).
        number_of_groups: g, known without looking at people; >= 1.
        clip: largest L2 norm of a user's histogram, in rows: one with k rows of one kind has norm
            k, one with k rows of k kinds has norm sqrt(k). Finite, > 0.
        noise_multiplier: standard deviation of the noise over `clip`; finite, >= 0.
        noise: where it comes from.
        pay: writes the spend of one `GaussianEvent(noise_multiplier)`, with purpose `PURPOSE` and
            this clip, to the ledger; raises where it is refused. Called once, before noise is drawn.
        fold: each user's fold, in [0, folds), shape (users,); public, drawn without looking at
            anybody's rows. None: one fold.
        folds: how many; >= 1.

    Returns:
        Of shape (folds, g).

    Raises:
        ConfigError: a setting is out of range, or shapes do not fit.
    """
    if not (0 < clip < math.inf and 0 <= noise_multiplier < math.inf):
        raise ConfigError(
            f"clip must be finite and > 0, noise_multiplier finite and >= 0, got {clip!r} and {noise_multiplier!r}"
        )
    user_fold = _folds(fold, folds, len(offsets) - 1)
    _check_shapes(groups, labels, offsets, number_of_groups)
    counts = _clipped_histogram(groups, labels, offsets, user_fold, shape=(folds, number_of_groups, 2), clip=clip)
    sd = noise_multiplier * clip
    noised = counts + PaidNoise(noise, pay).gaussian(counts.size, sd).reshape(counts.shape)
    negatives, positives = noised[..., 0], noised[..., 1]
    return NoisedCounts(negatives + positives, positives, sd)


def label_rates(counts: NoisedCounts, *, strength: float | None = None) -> NDArray[np.float64]:
    """Rates from noised counts, each drawn towards the noised overall rate of its fold by as much as it is uncertain.

    Post-processing: it costs nothing. With overall rate r, a group's n rows, p
    positives, noise variance s^2 of p - r n, and a prior variance t^2 of true
    rates around r, the rate is

        r + (p - r n) / (n + r (1 - r) / t^2 + s^2 / (t^2 n)),

    the best linear estimate, within [0, 1]. Groups without rows, or whose noised
    rows are negative, have the overall rate.

    Args:
        counts: as released, or its `out_of_fold()` or `together()`.
        strength: how many rows the overall rate counts for, r (1 - r) / t^2; finite, > 0. None:
            found for each fold from the counts, by the method of moments.

    Returns:
        In [0, 1], the shape of `counts.rows`.

    Raises:
        ConfigError: strength is out of range.
    """
    if strength is not None and not 0 < strength < math.inf:
        raise ConfigError(f"strength must be finite and > 0, got {strength!r}")
    rows, positives, variance = counts.rows, counts.positives, counts.sd**2
    groups = rows.shape[-1]
    # The overall rate alike: drawn to 1/2, with the uniform distribution's variance as its prior.
    overall = _shrunk(
        np.full((len(rows), 1), 0.5),
        rows.sum(axis=-1, keepdims=True),
        positives.sum(axis=-1, keepdims=True),
        prior=1 / 12,
        variance=variance * groups,
    )
    if strength is None:
        prior = _prior_variance(overall, rows, positives, variance)
    else:
        prior = overall * (1 - overall) / strength
    return _shrunk(overall, rows, positives, prior, variance)


def _shrunk(
    centre: NDArray[np.float64],
    rows: NDArray[np.float64],
    positives: NDArray[np.float64],
    prior: NDArray[np.float64] | float,
    variance: float,
) -> NDArray[np.float64]:
    """`label_rates`' formula; `centre` where there are no rows or the prior has no variance."""
    counted = np.where(rows > LEAST, rows, 0.0)
    weight = prior * counted  # of one row's worth of excess, against the two uncertainties
    uncertainty = weight * counted + centre * (1 - centre) * counted + _excess_variance(centre, variance)
    excess = positives - centre * rows
    share = np.divide(weight * excess, uncertainty, out=np.zeros_like(rows), where=uncertainty > 0)
    return np.asarray(np.clip(centre + share, 0.0, 1.0))


def _prior_variance(
    centre: NDArray[np.float64], rows: NDArray[np.float64], positives: NDArray[np.float64], variance: float
) -> NDArray[np.float64]:
    """(folds, 1): how much rates differ by more than chance and noise, from E excess^2 = t^2 n^2 + r (1 - r) n + s^2.

    E of a noised n^2 is n^2 and the noise of n, which is twice `variance`.
    """
    excess = positives - centre * rows
    surplus = (excess**2 - centre * (1 - centre) * rows - _excess_variance(centre, variance)).sum(-1, keepdims=True)
    squares = (rows**2 - 2 * variance).sum(-1, keepdims=True)
    found = np.divide(surplus, squares, out=np.zeros_like(squares), where=squares > LEAST)
    return np.asarray(np.clip(found, 0.0, centre * (1 - centre)))  # no variable in [0, 1] varies by more


def _excess_variance(centre: NDArray[np.float64], variance: float) -> NDArray[np.float64]:
    """Of the noise of p - r n = (1 - r) positives - r negatives."""
    return np.asarray(((1 - centre) ** 2 + centre**2) * variance)


def _clipped_histogram(
    groups: NDArray[np.integer],
    labels: NDArray[np.generic],
    offsets: NDArray[np.integer],
    user_fold: NDArray[np.int64],
    *,
    shape: tuple[int, int, int],
    clip: float,
) -> NDArray[np.float64]:
    """Sum of the users' clipped histograms over (fold, group, label); never users x groups in memory."""
    users, (folds, number_of_groups, _) = len(user_fold), shape
    positive = labels == 1
    usable = (positive | (labels == 0)) & (groups >= 0) & (groups < number_of_groups)
    user = np.repeat(np.arange(users), np.diff(offsets))[usable]
    kind = 2 * groups[usable].astype(np.int64) + positive[usable]
    cells = 2 * number_of_groups
    user_kind, count = np.unique(user * cells + kind, return_counts=True)
    user, kind = np.divmod(user_kind, cells)
    norm = np.sqrt(np.bincount(user, weights=count.astype(np.float64) ** 2, minlength=users))
    scaled = count * (clip / np.maximum(norm, clip))[user]
    total = np.bincount(user_fold[user] * cells + kind, weights=scaled, minlength=folds * cells)
    return total.astype(np.float64).reshape(shape)


def _folds(fold: NDArray[np.integer] | None, folds: int, users: int) -> NDArray[np.int64]:
    if fold is None and folds == 1:
        return np.zeros(users, np.int64)
    if folds < 1 or fold is None or fold.shape != (users,) or not ((fold >= 0) & (fold < folds)).all():
        raise ConfigError(f"fold must hold a number in [0, {folds}) for each of {users} users")
    return fold.astype(np.int64)


def _check_shapes(
    groups: NDArray[np.integer], labels: NDArray[np.generic], offsets: NDArray[np.integer], number_of_groups: int
) -> None:
    if number_of_groups < 1:
        raise ConfigError(f"number_of_groups must be at least 1, got {number_of_groups}")
    if groups.dtype.kind not in "iu":
        raise ConfigError(f"groups must be integers, got {groups.dtype}")
    rows = len(groups)
    if groups.shape != (rows,) or labels.shape != (rows,):
        raise ConfigError(f"groups and labels must be (n,), got {groups.shape} and {labels.shape}")
    if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 0).any():
        raise ConfigError(f"offsets must ascend from 0 to the {rows} rows")
