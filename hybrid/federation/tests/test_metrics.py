import numpy as np
import pytest

from hybrid.errors import ConfigError
from hybrid.federation.metrics import Compared, auc, calibration, compare, log_loss


def test_auc_counts_pairs_and_half_of_ties():
    """Of the 2 x 3 pairs, 0.8 beats all three negatives, 0.5 beats one and ties with one: 4.5 / 6."""
    labels = np.array([1, 1, 0, 0, 0])
    scores = np.array([0.8, 0.5, 0.2, 0.5, 0.7])
    assert auc(labels, scores) == pytest.approx(4.5 / 6)


def test_log_loss_is_the_mean_surprise():
    """-log(0.8), -log(1 - 0.4), and a certain mistake bounded at -log(1e-7)."""
    expected = -(np.log(0.8) + np.log(0.6) + np.log(1e-7)) / 3
    assert log_loss(np.array([1.0, 0.0, 1.0]), np.array([0.8, 0.4, 0.0])) == pytest.approx(expected)


def test_calibration_of_two_bins_by_hand():
    """Bins (0.1, 0.3) with labels (0, 1) and (0.7, 0.9) with (1, 1): errors 0.3 and 0.2, ratio 2.0 / 3."""
    found = calibration(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.9, 0.1, 0.3, 0.7]), bins=2)
    assert found.rows == (2, 2)
    assert found.predicted == pytest.approx((0.2, 0.8))
    assert found.observed == pytest.approx((0.5, 1.0))
    assert found.ece == pytest.approx(0.25)
    assert found.ratio == pytest.approx(2.0 / 3)


def _fold(rng, users, noise):
    labels = rng.integers(0, 2, users * 20).astype(float)
    signal = 0.25 + 0.5 * labels
    return Compared(
        labels=labels,
        ours=np.clip(signal + rng.normal(0, noise, len(labels)), 0.01, 0.99),
        theirs=np.clip(signal + rng.normal(0, 2 * noise, len(labels)), 0.01, 0.99),
        users=np.repeat(np.arange(users), 20),
    )


def test_the_bootstrap_agrees_with_one_that_copies_rows():
    """Weighting a user's rows by how often it was drawn is the same as repeating them."""
    fold = _fold(np.random.default_rng(0), users=12, noise=0.4)
    found = compare([fold], resamples=50, seed=7)
    times = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=50)
    differences = []
    for draw in times:
        rows = np.repeat(np.arange(len(fold.labels)), draw[fold.users])
        differences.append(auc(fold.labels[rows], fold.ours[rows]) - auc(fold.labels[rows], fold.theirs[rows]))
    assert found["auc"].low == pytest.approx(np.percentile(differences, 2.5))
    assert found["auc"].mean == pytest.approx(auc(fold.labels, fold.ours) - auc(fold.labels, fold.theirs))


def test_a_model_compared_with_itself_differs_by_nothing():
    """Mean and both bounds are 0."""
    fold = _fold(np.random.default_rng(1), users=5, noise=0.4)
    same = compare([Compared(fold.labels, fold.ours, fold.ours, fold.users)], resamples=20)
    assert same["auc"].low == same["auc"].high == same["log_loss"].mean == 0


def test_a_better_model_is_seen_to_be_better():
    """Five folds of 120 people: both intervals are on the side of the model whose scores have less noise."""
    rng = np.random.default_rng(2)
    found = compare([_fold(rng, users=120, noise=0.4) for _ in range(5)], resamples=500)
    assert found["auc"].low > 0 > found["log_loss"].high


def test_comparing_no_fold_is_an_error():
    """The message names what must be given."""
    with pytest.raises(ConfigError, match="at least one fold"):
        compare([])
