"""Estimates and their intervals."""

import numpy as np
import pytest

from hybrid.analytics.asking import Exact, People
from hybrid.analytics.estimates import Z95, Estimate, estimate, gradient, quantiles_of
from hybrid.analytics.tests.noisy import Noisy
from hybrid.query import Histogram, Labels, Query

RATE = {"rate": lambda counts: counts[:, 1] / counts.sum(axis=1)}


def test_the_gradient_of_a_rate():
    """p / (n + p) at (6, 2): -p / 64 and n / 64."""
    np.testing.assert_allclose(gradient(RATE["rate"], np.array([6.0, 2.0])), [-2 / 64, 6 / 64], rtol=1e-4)


def test_without_noise_the_full_interval_is_the_sampling_error():
    """100 people with one row each, 20 positive: the variance of the mean is 0.2 x 0.8 / 100."""
    people = People({"label": np.arange(100) < 20}, np.arange(101))
    found = estimate(Exact(people), Query(parts=(Labels(),)), RATE).estimates["rate"]
    assert (found.value, found.noise.low, found.noise.high) == pytest.approx((0.2, 0.2, 0.2))
    assert found.full.high - 0.2 == pytest.approx(Z95 * np.sqrt(0.2 * 0.8 / 100), rel=1e-3)


def test_rows_of_one_person_are_not_independent():
    """The same rows four times each, by the same person: the interval is as wide as with one each."""
    one = People({"label": np.arange(100) < 20}, np.arange(101))
    four = People({"label": np.repeat(np.arange(100) < 20, 4)}, 4 * np.arange(101))
    widths = [
        estimate(Exact(people), Query(parts=(Labels(),), rows=4), RATE).estimates["rate"].full.high
        for people in (one, four)
    ]
    assert widths[0] == pytest.approx(widths[1], rel=1e-3)


def test_a_total_varies_with_who_is_drawn():
    """50 of 100 people have a row: the number of rows of 100 drawn anew has the variance 100 x 1/2 x 1/2."""
    people = People({"label": np.zeros(50)}, np.concatenate([[0], np.cumsum(np.arange(100) < 50)]))
    total = {"rows": lambda counts: counts.sum(axis=1)}
    found = estimate(Exact(people), Query(parts=(Labels(),)), total, totals=("rows",)).estimates["rows"]
    assert found.full.high - 50 == pytest.approx(Z95 * 5, rel=1e-3)


def test_noise_intervals_hold_the_exact_value_as_often_as_they_say():
    """2,000 seeds of a rate: within 93.5 and 96.5 %, three standard errors of 95 %."""
    people = People({"label": np.arange(1000) < 300}, np.arange(1001))
    query = Query(parts=(Labels(),))
    hits = sum(
        0.3 in estimate(Noisy(people, 4.0, seed), query, RATE, full=False).estimates["rate"].noise
        for seed in range(2000)
    )
    assert 0.935 <= hits / 2000 <= 0.965


def test_an_estimate_is_kept_in_its_range():
    """A rate of -0.1 +- 0.2 is 0 in [0, 0.1]."""
    found = Estimate.of(-0.1, 0.2 / Z95, 0.0).within(0, 1)
    assert (found.value, found.noise.low, found.noise.high) == pytest.approx((0.0, 0.0, 0.1))
    assert (found.full.low, found.full.high) == pytest.approx((0.0, 0.1))


def test_quantiles_without_noise_are_those_of_the_bins():
    """10 rows in each of [0, 1), [1, 2), [2, 3), [3, 4): the quartile is 1, the median 2."""
    edges = np.arange(5.0)
    people = People({"x": np.repeat([0.5, 1.5, 2.5, 3.5], 10)}, np.arange(41))
    answer = Exact(people)(Query(parts=(Histogram(column="x", edges=tuple(edges), cumulative=True),)))
    found = quantiles_of(answer, edges, [0.25, 0.375, 0.5])
    assert [each.value for each in found] == pytest.approx([1.0, 1.5, 2.0])


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_ascend_however_much_noise_there_is(seed):
    """Noise as large as the data: 19 quantiles still ascend, each within its interval and within the edges."""
    edges = np.linspace(0, 1, 65)
    people = People({"x": np.random.default_rng(seed).random(200)}, np.arange(201))
    query = Query(parts=(Histogram(column="x", edges=tuple(edges.tolist()), cumulative=True),))
    found = quantiles_of(Noisy(people, 50.0, seed)(query), edges, np.linspace(0.05, 0.95, 19).tolist())
    values = [each.value for each in found]
    assert values == sorted(values)
    assert all(0 <= each.noise.low <= each.value <= each.noise.high <= 1 for each in found)
