"""Metrics of noised counts are those of the rows."""

import numpy as np
import pytest

from hybrid.analytics import metrics
from hybrid.analytics.asking import Exact, People
from hybrid.analytics.tests.noisy import Noisy
from hybrid.errors import ConfigError
from hybrid.federation import metrics as pooled

NODES = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
COUNTS = np.array([[[2.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0, 1.0]]])
"""Negatives at 0, 0, 1/4, 1/2; positives at 1/2, 3/4, 3/4, 1."""


def test_auc_of_counts():
    """Rows that are further apart than a node are in order or not; the same node counts half.

    Negatives at 0 and 1, positives at 1/2 and 1: of four pairs two are in order, one is not, one ties.
    """
    counts = np.array([[[1.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0, 1.0]]])
    assert metrics.auc(counts)[0] == pytest.approx(2.5 / 4)


def test_auc_of_few_nodes_is_that_of_the_rows_between_them():
    """One row in forty is positive: most of 200,000 scores are between six nodes, where sharing loses their order.

    The exact AUC is to 0.001. Ties for half, alone, would be 0.004 less than it.
    """
    rng = np.random.default_rng(0)
    score = 1 / (1 + np.exp(4 - 0.8 * rng.normal(size=200_000)))
    label = (rng.random(200_000) < score).astype(float)
    people = People({"score": score, "label": label}, np.arange(200_001))
    found = metrics.evaluate(Exact(people), rows=1, full=False).metrics["auc"]
    assert found.value == pytest.approx(pooled.auc(label, score), abs=1e-3)


def test_calibration_of_counts():
    """Mean prediction (0 + 0 + 1/4 + 1/2 + 1/2 + 3/2 + 1) / 8 = 3.75 / 8, mean label 1/2."""
    assert metrics.mean_prediction(NODES)(COUNTS)[0] == pytest.approx(3.75 / 8)
    assert metrics.calibration(NODES)(COUNTS)[0] == pytest.approx(3.75 / 4)


def test_precision_and_recall_of_counts():
    """Above 0.5: three rows, all positive, of four positive ones. Above 0.3 two more at 1/2, one of them positive."""
    assert metrics.precision(NODES, 0.5)(COUNTS)[0] == pytest.approx(1.0)
    assert metrics.recall(NODES, 0.5)(COUNTS)[0] == pytest.approx(0.75)
    assert metrics.precision(NODES, 0.3)(COUNTS)[0] == pytest.approx(4 / 5)
    assert metrics.recall(NODES, 0.3)(COUNTS)[0] == pytest.approx(1.0)


def test_normalised_entropy_of_the_mean_label_is_one():
    """Everybody is given 1/4, and a quarter has the label: log-loss and entropy are the same."""
    counts = np.zeros((1, 2, 5))
    counts[0, :, 1] = 3.0, 1.0
    assert metrics.normalised_entropy(NODES)(counts)[0] == pytest.approx(1.0)


def test_what_has_no_rows_has_no_value():
    """No positives, so no AUC and no recall: NaN, and no warning."""
    counts = np.zeros((1, 2, 5))
    assert np.isnan(metrics.auc(counts)[0])
    assert np.isnan(metrics.recall(NODES)(counts)[0])
    assert np.isnan(
        metrics.normalised_entropy(NODES)(COUNTS * [[[1.0], [-0.5]]])[0]
    )  # fewer positives than none: noise


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    score = rng.beta(2, 3, 4000)
    return score, (rng.random(4000) < score).astype(float)


def test_without_noise_metrics_are_those_of_the_rows(rows):
    """4,000 rows of 1,000 people, nothing clipped: AUC and log-loss to 0.001, calibration and a threshold's exactly."""
    score, label = rows
    found = metrics.evaluate(Exact(People({"score": score, "label": label}, 4 * np.arange(1001))), rows=4).metrics
    assert found["auc"].value == pytest.approx(pooled.auc(label, score), abs=1e-3)
    assert found["log_loss"].value == pytest.approx(pooled.log_loss(label, score), abs=1e-3)
    assert found["calibration"].value == pytest.approx(score.mean() / label.mean(), abs=1e-6)
    assert found["precision"].value == pytest.approx(label[score > 0.5].mean())
    assert found["recall"].value == pytest.approx(label[score > 0.5].sum() / label.sum())


def test_curves_run_from_corner_to_corner(rows):
    """ROC from (0, 0) to (1, 1), ascending; ten deciles, ascending in prediction, near what happens."""
    score, label = rows
    found = metrics.evaluate(Exact(People({"score": score, "label": label}, np.arange(4001))), rows=1, full=False)
    assert (found.roc.x[0], found.roc.x[-1], found.roc.y[-1]) == (0, 1, 1)
    assert (np.diff(found.roc.y) >= 0).all()
    assert found.deciles.x.shape == (10,)
    assert (np.diff(found.deciles.x) > 0).all()
    np.testing.assert_allclose(found.deciles.y, found.deciles.x, atol=0.1)


def test_bands_hold_the_exact_curves_where_noise_is_large(rows):
    """Of 400 people and much noise, 40 seeds: each decile's label, and each rate of the ROC, in 85 % at least."""
    score, label = (column[:400] for column in rows)
    people = People({"score": score, "label": label}, np.arange(401))
    exact, *noised = (
        metrics.evaluate(Noisy(people, sd, seed), rows=1, full=False) for seed, sd in enumerate([0.0, *[4.0] * 40])
    )
    for name in ("roc", "deciles"):
        true, curves = getattr(exact, name).y, [getattr(each, name) for each in noised]
        held = [(each.low - 1e-9 <= true) & (true <= each.high + 1e-9) for each in curves]
        assert np.mean(held, axis=0).min() > 0.85


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0])
def test_a_threshold_is_a_probability(threshold):
    """In (0, 1), or refused."""
    with pytest.raises(ConfigError, match="threshold"):
        metrics.nodes_for(None, threshold)
