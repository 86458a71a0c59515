from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid.analytics.labels import PURPOSE, NoisedCounts, label_rates, noised_label_counts
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import SeededNoise

GROUPS = 3
USER = st.lists(st.tuples(st.integers(-1, GROUPS), st.sampled_from([0.0, 1.0, 0.5, math.nan])), max_size=8)


class NoNoise:
    """Notes the scale of each draw and adds nothing."""

    def __init__(self):
        self.asked = []

    def gaussian(self, size, sd):
        self.asked.append((size, sd))
        return np.zeros(size)


def counts(users, *, clip=1e9, noise_multiplier=1.0, noise=None, pay=lambda: None, groups=GROUPS, **options):
    """Of users given as lists of (group, label)."""
    rows = [row for user in users for row in user]
    return noised_label_counts(
        np.array([group for group, _ in rows], dtype=np.int64),
        np.array([label for _, label in rows], dtype=np.float32),
        np.cumsum([0, *map(len, users)]),
        number_of_groups=groups,
        clip=clip,
        noise_multiplier=noise_multiplier,
        noise=noise or NoNoise(),
        pay=pay,
        **options,
    )


def noised_vector(counted):
    """What has independent noise of the same scale on each coordinate: negatives and positives."""
    return np.concatenate([(counted.rows - counted.positives).ravel(), counted.positives.ravel()])


def test_rows_and_positives_are_counted_by_group():
    """Two users: group 0 has three rows and two positives, group 1 one row and none, group 2 nothing."""
    counted = counts([[(0, 1), (0, 0)], [(0, 1), (1, 0)]])
    assert counted.rows.tolist() == [[3, 1, 0]]
    assert counted.positives.tolist() == [[2, 0, 0]]


def test_a_row_of_no_group_or_with_no_label_counts_nowhere():
    """An unknown group, a group beyond the last, NaN and 0.5 are left out; the user's other row stays."""
    counted = counts([[(-1, 1), (GROUPS, 1), (1, math.nan), (1, 0.5), (1, 1)]])
    assert counted.rows.tolist() == [[0, 1, 0]]
    assert counted.positives.tolist() == [[0, 1, 0]]


def test_a_user_is_clipped_as_a_whole():
    """Three rows of one kind and four of another have norm 5: at clip 2.5 they count 1.5 and 2; the other user, of
    norm 1, counts whole.
    """
    counted = counts([[(0, 1)] * 3 + [(1, 0)] * 4, [(1, 1)]], clip=2.5)
    np.testing.assert_allclose(counted.rows, [[1.5, 3.0, 0.0]])
    np.testing.assert_allclose(counted.positives, [[1.5, 1.0, 0.0]])


@settings(max_examples=200)
@given(
    others=st.lists(USER, min_size=1, max_size=4),
    person=USER,
    clip=st.floats(0.1, 20.0),
    place=st.integers(0, 4),
    folds=st.integers(1, 3),
)
@example(others=[[]], person=[(0, 1.0)] * 8, clip=3.0, place=0, folds=2)
def test_one_user_moves_the_counts_of_all_folds_together_by_at_most_the_clip(others, person, clip, place, folds):
    """Whoever's rows vanish, in whichever fold, (negatives, positives) of all groups and folds move by `clip` at most:
    against noise of noise_multiplier * clip on each, what one Gaussian event says.
    """
    place = min(place, len(others))
    fold = np.arange(len(others) + 1) % folds
    with_person, without = (
        counts([*others[:place], rows, *others[place:]], clip=clip, fold=fold, folds=folds) for rows in (person, [])
    )
    assert np.linalg.norm(noised_vector(with_person) - noised_vector(without)) <= clip * (1 + 1e-9)


def test_noise_is_one_draw_of_its_scale_for_every_fold_and_group():
    """sd 1.5 * 4 = 6 on each of 2 x 10,000 x 2 counts, independent: chi-square, lag and fold correlation, 5 errors."""
    groups = 10_000
    noise = NoNoise()
    counts([[(0, 1)], []], clip=4.0, noise_multiplier=1.5, noise=noise, groups=groups, fold=np.array([0, 1]), folds=2)
    assert noise.asked == [(2 * groups * 2, 6.0)]
    counted = counts(
        [[], []], clip=4.0, noise_multiplier=1.5, noise=SeededNoise(1), groups=groups, fold=np.array([0, 1]), folds=2
    )
    assert counted.sd == 6.0
    negatives, positives = (counted.rows - counted.positives) / 6, counted.positives / 6
    for draws in (*negatives, *positives):
        assert abs(np.sum(draws**2) - groups) < 5 * math.sqrt(2 * groups)
    for one, other in ((negatives[0], positives[0]), (negatives[0], negatives[1]), (positives[0], positives[1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(groups)


def test_one_event_pays_for_all_folds_before_any_noise_is_drawn(tmp_path):
    """Three folds, one entry of the ledger; where the budget has no room, nothing is drawn."""
    noise, event = NoNoise(), GaussianEvent(4.0)
    with Ledger.open(tmp_path, budget_epsilon=1.0, delta=1e-5) as ledger:

        def pay():
            ledger.spend(event, purpose=PURPOSE, clip=2.0, round_number=1, attempt=ledger.next_attempt(PURPOSE, 1))

        users = {"users": [[(0, 1)], [(1, 0)], [(2, 1)]], "fold": np.arange(3), "folds": 3, "pay": pay, "noise": noise}
        counts(**users, clip=2.0, noise_multiplier=4.0)
        (entry,) = ledger.entries
        assert (entry.purpose, entry.noise_multiplier, entry.sampling, entry.clip) == ("label-rates", 4.0, 1.0, 2.0)
        with pytest.raises(BudgetExceeded):
            counts(**users, clip=2.0, noise_multiplier=4.0)
    assert noise.asked == [(3 * GROUPS * 2, 8.0)]


def test_folds_count_their_own_users_and_out_of_fold_counts_the_others():
    """Users 0 and 2 are in fold 0, user 1 in fold 1: out of fold 0 is user 1, out of fold 1 are the two."""
    counted = counts([[(0, 1)], [(1, 1), (1, 0)], [(0, 0)]], fold=np.array([0, 1, 0]), folds=2, clip=10.0)
    assert counted.rows.tolist() == [[2, 0, 0], [0, 2, 0]]
    assert counted.out_of_fold().rows.tolist() == [[0, 2, 0], [2, 0, 0]]
    assert counted.out_of_fold().positives.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert counted.together().rows.tolist() == [[2, 2, 0]]


def test_the_noise_of_folds_adds_up():
    """Noise of sd 2 in each of 5 folds: 2 * 2 in four of them together, 2 * sqrt(5) in all."""
    counted = NoisedCounts(np.zeros((5, 2)), np.zeros((5, 2)), sd=2.0)
    assert (counted.out_of_fold().sd, counted.together().sd) == (4.0, pytest.approx(2 * math.sqrt(5)))
    with pytest.raises(ConfigError, match="folds must be at least 2"):
        NoisedCounts(np.zeros((1, 2)), np.zeros((1, 2)), sd=2.0).out_of_fold()


def test_a_rate_is_drawn_to_the_overall_rate_by_hand():
    """Two groups of 1,000,000 rows make the overall rate 0.5; strength 100, noise of sd 10, so 50 of (p - n / 2).
    A group with 400 rows and 300 positives: t^2 = 0.25 / 100, and 0.5 + 100 / (400 + 100 + 50 / (0.0025 * 400)).
    """
    rows = np.array([[1e6, 1e6, 400.0]])
    positives = np.array([[0.6e6, 0.4e6, 300.0]])
    rates = label_rates(NoisedCounts(rows, positives, sd=10.0), strength=100.0)
    assert rates[0, 2] == pytest.approx(0.5 + 100 / 550, abs=1e-3)
    np.testing.assert_allclose(rates[0, :2], [0.6, 0.4], atol=1e-4)


@settings(max_examples=300)
@given(
    cells=st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=6),
    sd=st.one_of(st.just(0.0), st.floats(1e-3, 1e5)),
    strength=st.one_of(st.none(), st.floats(1e-3, 1e6)),
)
@example([(0.0, 0.0)], 0.0, None)
@example([(2e-153, 31.0)], 0.0, None)  # its square is less than any number but 0
@example([(1e-9, 31.0), (1e6, 1e6)], 0.0, 1.0)
@example([(-5.0, 3.0), (-1.0, -2.0)], 4.0, None)
@example([(10.0, 10.0), (10.0, 10.0)], 0.0, None)
def test_rates_are_in_range_whatever_the_noise_did(cells, sd, strength):
    """Negative counts, more positives than rows, nothing at all: every rate is finite and in [0, 1]."""
    rows, positives = (np.array(column)[None] for column in zip(*cells, strict=True))
    with np.errstate(all="raise", under="ignore"):
        rates = label_rates(NoisedCounts(rows, positives, sd), strength=strength)
    assert rates.shape == rows.shape
    assert ((rates >= 0) & (rates <= 1)).all()


def test_a_group_without_rows_has_the_overall_rate():
    """Also one whose rows the noise made negative."""
    counted = NoisedCounts(np.array([[1e5, 1e5, 0.0, -3.0]]), np.array([[2e4, 4e4, 0.0, 2.0]]), sd=1.0)
    np.testing.assert_allclose(label_rates(counted)[0, 2:], 0.3, atol=1e-3)


def test_shrinkage_brings_rates_closer_to_the_truth_than_counts_or_the_overall_rate():
    """400 groups of 1 to 1,000 rows whose true rates are Beta(6, 14), noise of sd 30: root mean square errors."""
    rng = np.random.default_rng(5)
    size, truth = rng.integers(1, 1000, 400), rng.beta(6, 14, 400)
    positives = rng.binomial(size, truth).astype(float)
    noise = rng.normal(0, 30, (2, 400))
    counted = NoisedCounts((size + noise.sum(axis=0))[None], (positives + noise[1])[None], sd=30.0)
    plain = np.clip(counted.positives / np.maximum(counted.rows, 1), 0, 1)

    def error(rates):
        return float(np.sqrt(np.mean((rates - truth) ** 2)))

    found = error(label_rates(counted))
    assert found < 0.6 * error(plain)
    assert found < 0.8 * error(0.3)
    best = min(error(label_rates(counted, strength=strength)) for strength in (2, 5, 10, 20, 40, 80, 160))
    assert found < 1.05 * best


def test_the_strength_is_found_where_noise_is_as_large_as_the_counts():
    """20,000 groups of 50 rows with rates Beta(6, 14), noise of sd 30: r (1 - r) / t^2 = 6 + 14 + 1 rows, so the rates
    are those of strength 21, to within a tenth of what shrinkage moves.
    """
    rng = np.random.default_rng(8)
    positives = rng.binomial(50, rng.beta(6, 14, 20_000)).astype(float)
    noise = rng.normal(0, 30, (2, 20_000))
    counted = NoisedCounts((50 + noise.sum(axis=0))[None], (positives + noise[1])[None], sd=30.0)
    found, expected = label_rates(counted), label_rates(counted, strength=21.0)
    assert np.abs(found - expected).mean() < 0.1 * np.abs(expected - 0.3).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "clip must be finite"),
        ({"clip": math.nan}, "clip must be finite"),
        ({"noise_multiplier": -1.0}, "noise_multiplier finite and >= 0"),
        ({"groups": 0}, "number_of_groups must be at least 1, got 0"),
        ({"folds": 2}, r"fold must hold a number in \[0, 2\) for each of 2 users"),
        ({"fold": np.array([0, 2]), "folds": 2}, "fold must hold"),
        ({"fold": np.array([0]), "folds": 1}, "fold must hold"),
        ({"folds": 0}, "fold must hold"),
    ],
)
def test_a_setting_outside_its_range_is_named(options, message):
    """And nothing is paid."""
    paid = []
    with pytest.raises(ConfigError, match=message):
        counts([[(0, 1)], [(1, 0)]], pay=lambda: paid.append(1), **options)
    assert paid == []


@pytest.mark.parametrize(
    ("groups", "labels", "offsets", "message"),
    [
        ([0, 1], [1, 0], [0, 1], "offsets must ascend from 0 to the 2 rows"),
        ([0, 1], [1, 0], [0, 2, 1, 2], "offsets must ascend"),
        ([0, 1], [1], [0, 2], "groups and labels must be"),
        ([0.5, 1.0], [1, 0], [0, 2], "groups must be integers, got float64"),
    ],
)
def test_rows_that_do_not_fit_are_refused(groups, labels, offsets, message):
    """Before anything is paid; strength alike."""
    columns = (np.array(groups), np.array(labels), np.array(offsets))
    settings = {"number_of_groups": 2, "clip": 1.0, "noise_multiplier": 1.0}
    with pytest.raises(ConfigError, match=message):
        noised_label_counts(*columns, **settings, noise=NoNoise(), pay=lambda: pytest.fail("paid"))
    with pytest.raises(ConfigError, match="strength must be finite and > 0, got 0"):
        label_rates(NoisedCounts(np.zeros((1, 2)), np.zeros((1, 2)), 1.0), strength=0)
