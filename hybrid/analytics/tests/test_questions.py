from datetime import timedelta

import numpy as np
import pytest

from hybrid.analytics.asking import Answer, Exact, People, Simulated
from hybrid.analytics.questions import (
    ADAPTIVE_SHARES,
    Asked,
    Scale,
    adaptive_histogram,
    by_of,
    categories,
    histogram,
    labels,
    numbers,
    quantiles,
    scale_of,
    server_keys,
)
from hybrid.analytics.tests.noisy import Noisy
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.features import Bucketize, Categorical, Log1p, Numeric
from hybrid.privacy.accountant import epsilon
from hybrid.privacy.ledger import Ledger, costs
from hybrid.query import By
from hybrid.spec import Clear, Entity, HybridModel, Label, Privacy, Server, View


def people(offsets=None, **columns):
    """One row of each person, unless offsets say otherwise."""
    rows = len(next(iter(columns.values())))
    return People(columns, np.arange(rows + 1) if offsets is None else np.array(offsets))


def values(estimates):
    return [estimate.value for estimate in estimates]


FOUR = people(x=np.array([10.0, 20.0, 30.0, np.nan, 70.0]), key=np.array(["a", "b", "a", "a", "b"], dtype=object))
TO_50 = Scale(0, 50)


def test_numbers_are_those_of_the_bounded_values():
    """10, 20, 30 and 70, which counts as 50: mean 27.5, variance 218.75; the missing one is not among them."""
    (found,) = numbers(Exact(FOUR), "x", TO_50, Asked())
    assert found.count.value == 4
    assert found.sum.value == pytest.approx(110)
    assert found.mean.value == pytest.approx(27.5)
    assert found.variance.value == pytest.approx(218.75)
    assert found.std.value == pytest.approx(218.75**0.5)


def test_without_noise_the_interval_for_these_people_has_no_width():
    """And the full interval of a mean has that of a sample: 1.96 sqrt(variance / n) on either side."""
    (found,) = numbers(Exact(FOUR), "x", TO_50, Asked())
    assert found.mean.noise.low == found.mean.noise.high == found.mean.value
    assert found.mean.full.high - found.mean.value == pytest.approx(1.959964 * (218.75 / 4) ** 0.5)


def test_numbers_by_group_are_each_groups_own():
    """a has 10 and 30, b has 20 and 50."""
    found = numbers(Exact(FOUR), "x", TO_50, Asked(by=By(column="key", values=("b", "a"))))
    assert [one.group for one in found] == ["b", "a"]
    assert [one.mean.value for one in found] == pytest.approx([35, 20])
    assert [one.std.value for one in found] == pytest.approx([15, 10])


def test_numbers_on_a_logarithmic_scale_are_of_the_logarithm():
    """log(1 + x) of 0 and of e - 1: mean 1/2, also where the bounds are far."""
    (found,) = numbers(Exact(people(x=np.array([0.0, np.e - 1]))), "x", Scale(0, 1e6, log=True), Asked())
    assert found.mean.value == pytest.approx(0.5)


def test_a_histogram_counts_each_bin_and_what_is_missing():
    """Below 20: 10. From 20 to 50: 20 and 30. From 50 on: 70. A quarter, half and a quarter of those with a value."""
    (found,) = histogram(Exact(FOUR), "x", [20, 50], Asked()).groups
    assert values(found.cells) == [1, 2, 1]
    assert values(found.shares) == [0.25, 0.5, 0.25]
    assert (found.rows.value, found.missing.value) == (4, 1)


def test_the_full_interval_of_a_share_is_the_binomials_where_each_person_has_a_row():
    """Half of 4 rows: 1.96 sqrt(1/2 1/2 / 4) on either side; with 2 rows asked of each, sqrt(2) times that at most."""
    (found,) = histogram(Exact(FOUR), "x", [20, 50], Asked()).groups
    assert found.shares[1].full.high - 0.5 == pytest.approx(1.959964 * (0.25 / 4) ** 0.5)
    pairs = people(x=np.array([0.0, 0.0, 9.0, 9.0]), offsets=[0, 2, 4])
    (found,) = histogram(Exact(pairs), "x", [5], Asked(rows=2)).groups
    assert found.shares[0].full.high == 1.0
    assert found.shares[0].full.low == pytest.approx(max(0.0, 0.5 - 1.959964 * (2 * 0.25 / 4) ** 0.5))


def test_the_sampling_bound_holds_for_people_whose_rows_are_alike():
    """40 people with 3 equal rows each: over draws of people a share varies as its full interval says, no less."""
    rng = np.random.default_rng(0)
    shares, halves = [], []
    for _ in range(200):
        x = np.repeat(rng.random(40) < 0.3, 3).astype(float)
        (found,) = histogram(Exact(people(x=x, offsets=range(0, 121, 3))), "x", [0.5], Asked(rows=3)).groups
        shares.append(found.shares[1].value)
        halves.append(found.shares[1].full.high - found.shares[1].value)
    assert np.mean(halves) / 1.959964 == pytest.approx(np.std(shares), rel=0.15)


def test_quantiles_ascend_and_are_to_a_cell_of_the_grid():
    """Of 0, 1, ..., 999 the quartiles are 249.5, 499.5 and 749.5; a cell is 16 wide."""
    found = quantiles(Exact(people(x=np.arange(1000.0))), "x", (0.25, 0.5, 0.75), Scale(0, 1024), Asked(), cells=64)
    np.testing.assert_allclose(values(found.groups[0]), [249.5, 499.5, 749.5], atol=16)


def test_the_histogram_that_comes_with_quantiles_is_of_the_same_rows():
    """Even bins between the bounds, and those outside: 1 below 0, 2 in [0, 5), 1 in [5, 10), 1 at 10."""
    found = quantiles(
        Exact(people(x=np.array([-1.0, 0, 4.99, 5, 10, np.nan]))), "x", (0.5,), Scale(0, 10), Asked(), bins=2
    )
    assert found.histogram.edges == (0, 5, 10)
    assert values(found.histogram.groups[0].cells) == pytest.approx([1, 2, 1, 1])
    assert found.histogram.groups[0].missing.value == pytest.approx(1)


def test_quantiles_by_group_are_each_groups_own(tmp_path):
    """Medians of 100 and 300, asked with noise: each to within its interval, which ascends with the level."""
    x = np.concatenate([np.full(2000, 100.0), np.full(2000, 300.0)])
    key = np.repeat(np.array(["low", "high"], dtype=object), 2000)
    with Ledger.open(tmp_path, budget_epsilon=4, delta=1e-5) as ledger:
        ask = Simulated(people(x=x, key=key), ledger, purpose="analyze", epsilon=2, seed=1)
        asked = Asked(by=By(column="key", values=("low", "high")))
        found = quantiles(ask, "x", (0.25, 0.5, 0.75), Scale(0, 512), asked, cells=128)
    for group, exact in zip(found.groups, (100, 300), strict=True):
        assert values(group) == sorted(values(group))
        assert all(exact in one.noise and abs(one.value - exact) <= 4 for one in group)
        assert all(one.full.low <= one.noise.low and one.noise.high <= one.full.high for one in group)


def test_quantiles_of_an_answer_with_much_noise_still_ascend(tmp_path):
    """Epsilon 0.05 on 50 people: nearly only noise."""
    with Ledger.open(tmp_path, budget_epsilon=4, delta=1e-5) as ledger:
        ask = Simulated(people(x=np.arange(50.0)), ledger, purpose="analyze", epsilon=0.05, seed=1)
        found = quantiles(ask, "x", tuple(np.arange(0.05, 1, 0.05)), Scale(0, 50), Asked(), cells=100)
    assert values(found.groups[0]) == sorted(values(found.groups[0]))


def test_adaptive_bins_hold_about_as_many_rows_each():
    """Of 0 to 999, in four bins, 250 each, to a cell of the grid."""
    found = adaptive_histogram(Exact(people(x=np.arange(1000.0))), "x", 4, Scale(0, 1024), Asked(), cells=128)
    np.testing.assert_allclose(values(found.groups[0].cells), 250, atol=16)


def test_a_value_that_many_have_begins_an_adaptive_bin():
    """Nine of ten have a 5: one edge, at or a cell below it, and no bin without width."""
    x = np.concatenate([np.full(90, 5.0), np.arange(10.0) / 10])
    found = adaptive_histogram(Exact(people(x=x)), "x", 4, Scale(0, 10), Asked())
    assert len(found.edges) == 1
    assert 5 - 10 / 512 < found.edges[0] <= 5
    assert values(found.groups[0].cells) == [10, 90]


def test_the_phases_of_an_adaptive_histogram_cost_what_was_asked_for(tmp_path):
    """Two releases, which compose to epsilon 0.5 or a little less."""
    with Ledger.open(tmp_path, budget_epsilon=0.5, delta=1e-5) as ledger:
        ask = Simulated(people(x=np.arange(100.0)), ledger, purpose="analyze", epsilon=0.5, seed=1)
        ask.begin(ADAPTIVE_SHARES)
        adaptive_histogram(ask, "x", 4, Scale(0, 100), Asked())
        assert len(ledger.entries) == 2
        assert 0.49 < epsilon(costs(ledger.entries), 1e-5).epsilon <= 0.5
        with pytest.raises(BudgetExceeded):
            ask.begin((0.1,))


def test_categories_count_each_value_the_others_and_the_missing():
    """Of a, a, c and nothing: two a, no b, one other."""
    words = np.array(["a", "a", "c", None], dtype=object)
    (found,) = categories(Exact(people(x=words)), "x", ("a", "b"), Asked())
    assert values(found.cells) == [2, 0, 1]
    assert found.missing.value == 1


def test_the_label_rate_is_over_rows_with_a_label():
    """Of 1, 0, 0 and nothing: 1/3; by group 1/2 and 0."""
    asked = people(label=np.array([1.0, 0, 0, np.nan]), key=np.array(["a", "a", "b", "b"], dtype=object))
    (found,) = labels(Exact(asked), Asked())
    assert values(found.cells) == [2, 1]
    assert found.shares[1].value == pytest.approx(1 / 3)
    assert found.missing is None
    groups = labels(Exact(asked), Asked(by=By(column="key", values=("a", "b"))))
    assert [group.shares[1].value for group in groups] == [0.5, 0]


def test_one_person_counts_with_so_many_rows_at_most():
    """A person with five rows and one with one: of at most two rows, the last ones, three are counted."""
    asked = people(x=np.array([1.0, 2, 3, 4, 5, 9]), offsets=[0, 5, 6])
    (found,) = histogram(Exact(asked), "x", [4.5, 6], Asked(rows=2)).groups
    assert values(found.cells) == [1, 1, 1]
    (found,) = histogram(Exact(asked), "x", [4.5, 6], Asked(rows=2, take="first")).groups
    assert values(found.cells) == [2, 0, 1]


def test_estimates_stay_where_such_numbers_can_be(tmp_path):
    """However much noise: counts within 0 and people, shares within 0 and 1, a mean within its bounds."""
    with Ledger.open(tmp_path, budget_epsilon=4, delta=1e-5) as ledger:
        ask = Simulated(people(x=np.arange(20.0)), ledger, purpose="analyze", epsilon=0.02, seed=3)
        (counted,) = histogram(ask, "x", [5, 10], Asked()).groups
        (found,) = numbers(ask, "x", Scale(0, 20), Asked())
    within = [(one, 0, 20) for one in counted.cells] + [(one, 0, 1) for one in counted.shares if one.value == one.value]
    within += [(one, 0, 20) for one in (found.count, found.mean) if one.value == one.value]
    for estimate, low, high in within:
        ends = (estimate.value, estimate.noise.low, estimate.noise.high, estimate.full.low, estimate.full.high)
        assert all(low <= end <= high for end in ends)


class _Moved:
    """Asks, and says how far one person moved the sum."""

    def __init__(self, one):
        self.one, self.moved = one, []

    def begin(self, shares):
        pass

    def __call__(self, query, *, share=1.0, payload=None):
        self.moved.append(np.linalg.norm(self.one.sum(query, payload)) / query.norm)
        return Answer(query, np.zeros(query.size), 1.0, 1)


def test_one_person_moves_each_sum_by_at_most_its_bound():
    """A thousand rows, infinite and huge values among them: no sum moves by more than the norm that is noised."""
    wild = np.tile(np.array([np.inf, -np.inf, 1e300, 0.0, np.nan]), 200)
    one = _Moved(people(x=wild, label=np.tile([1.0, 0.0], 500), offsets=[0, 1000]))
    asked = Asked(rows=3)
    numbers(one, "x", TO_50, asked)
    histogram(one, "x", [1, 2], asked)
    quantiles(one, "x", (0.5,), TO_50, asked)
    adaptive_histogram(one, "x", 4, TO_50, asked)
    labels(one, asked)
    assert len(one.moved) == 6
    assert max(one.moved) <= 1 + 1e-12


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: histogram(Exact(FOUR), "x", [2, 2], Asked()), "edges must be finite and ascend, got 2, 2"),
        (lambda: histogram(Exact(FOUR), "x", [], Asked()), "edges must be from 1 to 1000, got 0"),
        (lambda: quantiles(Exact(FOUR), "x", (0.5, 0.2), TO_50, Asked()), "levels of quantiles must ascend"),
        (lambda: quantiles(Exact(FOUR), "x", (np.nan,), TO_50, Asked()), "between 0 and 1, got nan"),
        (lambda: quantiles(Exact(FOUR), "x", (0.5,), TO_50, Asked(), bins=0), "bins must be from 1 to 512, got 0"),
        (lambda: adaptive_histogram(Exact(FOUR), "x", 1, TO_50, Asked()), "bins must be from 2 to 512, got 1"),
        (lambda: Scale(3, 3), "low must be finite and below high, got 3 and 3"),
        (lambda: Scale(-1, 3, log=True), "low must be at least 0 for a logarithmic scale, got -1"),
    ],
)
def test_what_cannot_be_asked_is_refused(ask, message):
    """In a sentence that names the setting."""
    with pytest.raises(ConfigError, match=message):
        ask()


def test_bounds_are_suggested_by_the_declaration():
    """Four standard deviations on either side of the mean, of the logarithm where it is one; outer edges."""
    assert scale_of(Numeric(mean=60, std=20)) == Scale(-20, 140)
    log = scale_of(Log1p(mean=1, std=0.5))
    assert (log.low, log.high, log.log) == (0, pytest.approx(np.e**3 - 1), True)
    assert scale_of(Bucketize(edges=(1, 24, 168))) == Scale(1, 168)
    assert scale_of(Bucketize(edges=(1,))) is None
    assert scale_of(Categorical(vocabulary=("a",))) is None


MODEL = HybridModel(
    name="taxi",
    server=Server(
        service="zones",
        entity=Entity(name="zone", join_key="zone_id"),
        views=(
            View(
                name="zones",
                source="zones.parquet",
                features={"kind": Categorical(vocabulary=("centre", "port")), "demand": Numeric()},
            ),
        ),
        max_feature_age=timedelta(days=1),
    ),
    request={"hour": Categorical(vocabulary=("7AM", "2PM"))},
    device={"trips": Numeric(), "home": Categorical(vocabulary=("port",))},
    server_tower=lambda: None,
    device_tower=lambda: None,
    head=lambda: None,
    label=Label(column="rode", visible_to="device"),
    privacy=Privacy(epsilon=4, delta=1e-3, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="for a test of the questions"),
)


def test_groups_are_by_what_the_server_knows_and_has_declared():
    """A request or server feature with a vocabulary; any other is refused, and those that can be are named."""
    assert server_keys(MODEL) == {"hour": ("7AM", "2PM"), "kind": ("centre", "port")}
    assert by_of(MODEL, "kind") == By(column="kind", values=("centre", "port"))
    with pytest.raises(ConfigError, match=r"with a declared vocabulary \(hour, kind\); got 'demand'"):
        by_of(MODEL, "demand")
    with pytest.raises(ConfigError, match=r"\(hour, kind\); 'home' is known only on devices"):
        by_of(MODEL, "home")


def test_a_spread_that_the_noise_swallows_has_an_interval_that_holds_it():
    """200 people around 40 with a deviation of 2, in noise as large as many: 400 seeds of variance and deviation.

    Half of the estimated variances are below 0, and count as 0: the interval is then from 0 up to what could be hidden.
    """
    spread = people(x=np.tile([38.0, 42.0], 100))
    held, empty = np.zeros(2), 0
    for seed in range(400):
        (found,) = numbers(Noisy(spread, 4.0, seed), "x", Scale(0, 100), Asked())
        held += 4.0 in found.variance.noise, 2.0 in found.std.noise
        empty += found.variance.value == 0
    assert 100 < empty < 300
    assert (held / 400 > 0.92).all()
