"""Two versions on the same rows."""

import numpy as np
import pytest

from hybrid.analytics.asking import Exact, People, Simulated
from hybrid.analytics.metrics import compare, evaluate
from hybrid.privacy.ledger import Ledger


def drawn(people=3000, seed=0):
    """One row a person; the second version's scores are the first's with the odds of a few rows moved."""
    rng = np.random.default_rng(seed)
    score = rng.beta(2, 3, people)
    label = (rng.random(people) < score).astype(float)
    against = np.clip(score + rng.normal(0, 0.05, people), 0.01, 0.99)
    return People({"score": score, "score_against": against, "label": label}, np.arange(people + 1))


def test_each_version_is_measured_as_if_it_were_alone():
    """Without noise the comparison's metrics are those of two evaluations, and their differences the differences."""
    people = drawn()
    swapped = People(people.columns | {"score": people.columns["score_against"]}, people.offsets)
    alone = [evaluate(Exact(each), full=False) for each in (people, swapped)]
    found = compare(Exact(people), full=False)
    for name in ("auc", "log_loss", "calibration", "precision"):
        one, other = (each.metrics[name].value for each in alone)
        assert found.first.metrics[name].value == pytest.approx(one)
        assert found.second.metrics[name].value == pytest.approx(other)
        assert found.differences[name].value == pytest.approx(one - other)
    np.testing.assert_allclose(found.second.roc.y, alone[1].roc.y)
    assert "mean_label" not in found.differences


def test_what_both_versions_share_is_not_in_the_interval_of_their_difference():
    """Paired rows: without noise the difference's full interval is less than half as wide as either version's own."""
    found = compare(Exact(drawn()))
    between, own = found.differences["auc"].full, found.first.metrics["auc"].full
    assert between.high - between.low < (own.high - own.low) / 2


def test_a_comparison_costs_what_was_asked_for(tmp_path):
    """Two releases of epsilon 1 together; the exact difference is within the noise interval."""
    exact = compare(Exact(drawn()), full=False)
    with Ledger.open(tmp_path, budget_epsilon=1, delta=1e-5) as ledger:
        found = compare(Simulated(drawn(), ledger, purpose="evaluate", epsilon=1, seed=2), rows=1)
        assert len(ledger.entries) == 2
        assert ledger.spent().epsilon == pytest.approx(1, rel=2e-3)
    for name, one in found.differences.items():
        assert exact.differences[name].value in one.noise, name
