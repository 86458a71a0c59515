from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid.errors import BudgetExceeded, CohortTooSmall, ConfigError
from hybrid.privacy.mechanisms import (
    PaidNoise,
    SeededNoise,
    SystemNoise,
    adaptive_gaussian_sum,
    clip_and_noise,
    clip_and_sum,
    clip_rows,
    gaussian_epsilon,
    gaussian_sum,
    local_epsilon,
    quantile_noise_for,
    update_noise_multiplier,
)

SIZE = 3
REAL = st.floats(allow_nan=True, allow_infinity=True, width=64)
ROW = st.lists(REAL, min_size=SIZE, max_size=SIZE)


class Recorder:
    """A noise source that notes each scale it is asked for, and adds nothing."""

    def __init__(self):
        self.asked = []

    def gaussian(self, size, sd):
        self.asked.append((size, sd))
        return np.zeros(size)


def noiseless_sum(chunks, clip, size=SIZE):
    return released(chunks, Recorder(), clip=clip, noise_multiplier=0.0, size=size).sum


def released(chunks, noise, *, clip=1.0, noise_multiplier=1.0, minimum=1, size=SIZE):
    mechanism = gaussian_sum(clip_norm=clip, noise_multiplier=noise_multiplier, minimum=minimum)
    return mechanism.step(mechanism.init(size), lambda norm: clip_and_sum(chunks, size, norm), noise)[1]


def adaptive(**changes):
    settings = {
        "initial_clip": 1.0,
        "quantile": 0.5,
        "lr": 0.2,
        "noise_multiplier": 1.0,
        "quantile_noise": 5.0,
        "planned_cohort": 100.0,
        "minimum": 1,
    }
    return adaptive_gaussian_sum(**settings | changes)


def rows_of_norms(*norms):
    """(k, SIZE): one row a norm, along the first axis."""
    return np.array([[norm, 0.0, 0.0] for norm in norms])


class Draws:
    """A noise source of our own making: each draw is `values`, times the scale."""

    def __init__(self, *values):
        self.values, self.asked = np.array(values), []

    def gaussian(self, size, sd):
        self.asked.append((size, sd))
        return sd * self.values


@settings(max_examples=300)
@given(others=st.lists(ROW, min_size=1, max_size=5), person=ROW, clip=st.floats(1e-6, 1e6))
@example(others=[[1.0, 2.0, 3.0]], person=[math.nan, 0.0, 0.0], clip=1.0)
@example(others=[[1.0, 2.0, 3.0]], person=[math.inf, -math.inf, 0.0], clip=1.0)
@example(others=[[1.0, 2.0, 3.0]], person=[1e300, 1e300, -1e300], clip=1.0)
@example(others=[[1.0, 2.0, 3.0]], person=[1e150, 1e-300, 0.0], clip=1.0)
def test_one_person_moves_the_sum_by_at_most_the_clip_norm(others, person, clip):
    """Changed to nothing (zeros), whatever it reports, the sum of everybody moves by no more than `clip`."""
    with_person = noiseless_sum([np.array([*others, person])], clip)
    without = noiseless_sum([np.array([*others, [0.0] * SIZE])], clip)
    assert np.linalg.norm(with_person - without) <= clip * (1 + 1e-9)


def adaptive_round(rows, *, clip, quantile, noise_multiplier, quantile_noise):
    """(SIZE + 1,): what a round releases, each part over its noise; that is how far a draw of ones moves it."""
    settings = {"quantile": quantile, "noise_multiplier": noise_multiplier, "quantile_noise": quantile_noise}
    mechanism = adaptive(initial_clip=clip, lr=1e-3, planned_cohort=1.0, **settings)

    def run(draw):
        state, release = mechanism.step(mechanism.init(SIZE), lambda norm: clip_and_sum([rows], SIZE, norm), draw)
        return np.array([*release.sum, math.log(state.clip / clip) / -1e-3])

    noiseless = run(Draws(*[0.0] * (SIZE + 1)))
    return noiseless / (run(Draws(*[1.0] * (SIZE + 1))) - noiseless)


@settings(max_examples=200)
@given(
    others=st.lists(st.lists(st.floats(-100, 100), min_size=SIZE, max_size=SIZE), min_size=1, max_size=4),
    person=ROW,
    nothing=st.sampled_from([[0.0] * SIZE, [math.nan] * SIZE, [math.inf, 0.0, 0.0]]),
    clip=st.floats(0.1, 10.0),
    quantile=st.floats(0.05, 0.95),
    noise_multiplier=st.floats(0.3, 5.0),
    slack=st.floats(1.01, 10.0),
)
@example([[0.0] * SIZE], [3.0, 0.0, 0.0], [0.0] * SIZE, 3.0, 0.5, 1.0, 1.1)  # tight: the clip's norm, and below
@example([[0.0] * SIZE], [9.0, 0.0, 0.0], [0.0] * SIZE, 3.0, 0.8, 1.0, 1.1)  # tight: clipped, and above
def test_one_person_moves_sum_and_quantile_together_by_at_most_one_over_z(
    others, person, nothing, clip, quantile, noise_multiplier, slack
):
    """Whichever way a person is zeroed out, (sum over its noise, quantile over its noise) moves by 1 / z at most."""
    noise = {"noise_multiplier": noise_multiplier, "quantile_noise": slack * noise_multiplier / 2}
    with_person, without = (
        adaptive_round(np.array([*others, last]), clip=clip, quantile=quantile, **noise) for last in (person, nothing)
    )
    assert np.linalg.norm(with_person - without) <= (1 + 1e-6) / noise_multiplier


def test_the_bound_on_sum_and_quantile_is_reached():
    """A clipped person and nobody else, quantile 0.8: 1 / z = 1 / 3 exactly, so no noise is wasted."""
    noise = {"noise_multiplier": 3.0, "quantile_noise": 2.5}
    with_person, without = (
        adaptive_round(rows_of_norms(last), clip=2.0, quantile=0.8, **noise) for last in (50.0, 0.0)
    )
    assert np.linalg.norm(with_person - without) == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize("start", [3e4, 3e-3])
@pytest.mark.parametrize(("quantile", "low", "high"), [(0.5, 50, 51), (0.8, 80, 81), (0.1, 10, 11)])
@pytest.mark.parametrize("replies", [100, 30])
def test_the_clip_finds_the_quantile_from_above_and_from_below(start, quantile, low, high, replies):
    """Norms 1 to 100: just `quantile` of them are <= C where C is in [low, high), whoever else is missing, idle or
    broken. A step is by 20 % at most, and by 0.2 % for one norm: C comes to within 1 % of the interval.
    """
    mechanism = adaptive(initial_clip=start, quantile=quantile, planned_cohort=100.0 * 100 / replies)
    rows = np.vstack([rows_of_norms(*range(1, 101)), rows_of_norms(*[0.0] * 30, *[math.nan] * 30)])
    state = mechanism.init(SIZE)
    for _ in range(3000):
        state, release = mechanism.step(state, lambda clip: clip_and_sum([rows], SIZE, clip), Recorder())
    assert 0.99 * low <= state.clip < 1.01 * high
    assert release.clip == pytest.approx(state.clip, rel=0.02)


def test_a_step_of_the_clip_by_hand():
    """C = 2, three norms <= 2 and one above, quantile 1/2, lr 0.2, 10 planned, noise 5 on the count: the excess is
    ((3 - 1) / 2 + 5 * 0.4) / 10 = 0.3, so C becomes 2 exp(-0.06); the sum's noise is that of C = 2.
    """
    mechanism = adaptive(initial_clip=2.0, planned_cohort=10.0, noise_multiplier=3.0, quantile_noise=2.5)
    rows = rows_of_norms(0.5, 1.0, 2.0, 7.0)
    noise = Draws(1.0, 0.0, -1.0, 0.8)
    state, release = mechanism.step(mechanism.init(SIZE), lambda clip: clip_and_sum([rows], SIZE, clip), noise)
    assert state.clip == pytest.approx(2 * math.exp(-0.06))
    assert (release.clip, release.received, state.round) == (2.0, 4, 1)
    np.testing.assert_allclose(release.sum, [5.5 + 3.75 * 2.0, 0.0, -3.75 * 2.0])
    assert noise.asked == [(SIZE + 1, 1.0)]


def test_sum_and_quantile_are_paid_for_as_one_release():
    """One draw, so one entry in the ledger; below the minimum there is none."""
    paid = []
    noise = PaidNoise(Recorder(), pay=lambda: paid.append(1))
    mechanism = adaptive(minimum=2)
    state, _ = mechanism.step(mechanism.init(SIZE), lambda clip: clip_and_sum([np.ones((2, SIZE))], SIZE, clip), noise)
    assert paid == [1]
    with pytest.raises(CohortTooSmall, match="round 2: 1 answered, at least 2"):
        mechanism.step(state, lambda clip: clip_and_sum([np.ones((1, SIZE))], SIZE, clip), noise)
    assert paid == [1]


def test_the_noise_of_the_sum_is_what_the_quantile_leaves_it():
    """z = 3 and sigma_b = 2.5: z_update = (1/9 - 1/25)^(-1/2) = 15/4; 60,000 draws (chi-square, 5 errors)."""
    size = 60_000
    mechanism = adaptive(initial_clip=0.5, noise_multiplier=3.0, quantile_noise=2.5)
    cohort = clip_and_sum([np.zeros((1, size))], size, 0.5)
    _, release = mechanism.step(mechanism.init(size), lambda clip: cohort, SeededNoise(6))
    chi_square = float(np.sum((release.sum / (3.75 * 0.5)) ** 2))
    assert abs(chi_square - size) < 5 * math.sqrt(2 * size)


@settings(max_examples=100)
@given(noise_multiplier=st.floats(0.01, 100.0), planned=st.floats(0.1, 1e6))
def test_the_default_quantile_noise_is_enough_and_costs_little(noise_multiplier, planned):
    """(1 - 1/16)^(-1/2) = 1.0328: at most 3.3 % more noise on the sum; at least a twentieth of the cohort."""
    quantile_noise = quantile_noise_for(noise_multiplier, planned)
    assert quantile_noise >= planned / 20
    left = update_noise_multiplier(noise_multiplier, quantile_noise)
    assert noise_multiplier <= left <= 1.033 * noise_multiplier
    assert left**-2 + (2 * quantile_noise) ** -2 == pytest.approx(noise_multiplier**-2)


@pytest.mark.parametrize(("bit", "end"), [(1e300, 1e-6), (-1e300, 1e6)])
def test_no_noise_brings_the_clip_to_zero_or_infinity(bit, end):
    """However wild the draw, the clip stays within a factor of a million of where it began."""
    mechanism = adaptive(initial_clip=3.0, planned_cohort=1e-3)
    cohort = clip_and_sum([rows_of_norms(1.0)], SIZE, 3.0)
    state, _ = mechanism.step(mechanism.init(SIZE), lambda clip: cohort, Draws(0.0, 0.0, 0.0, bit))
    assert state.clip == pytest.approx(3.0 * end)
    state, _ = mechanism.step(state, lambda clip: cohort, Draws(0.0, 0.0, 0.0, -bit))
    assert state.clip == pytest.approx(3.0 / end)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("initial_clip", 0.0),
        ("initial_clip", math.inf),
        ("initial_clip", math.nan),
        ("quantile", 0.0),
        ("quantile", 1.0),
        ("lr", 0.0),
        ("lr", math.inf),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.nan),
        ("planned_cohort", 0.0),
        ("minimum", -1),
        ("quantile_noise", 0.5),
        ("quantile_noise", math.inf),
    ],
)
def test_an_adaptive_setting_outside_its_range_is_named(setting, value):
    """The error names it and what it got; a quantile noise of z / 2 leaves nothing for the sum."""
    with pytest.raises(ConfigError, match=f"{setting} must .*{value}"):
        adaptive(**{setting: value})


def test_nobody_who_contributes_zero_is_counted():
    """Of zero, NaN, infinite and misshapen updates only that they answered is known; (3, 4) at clip 5 is below."""
    rows = np.array([[0.0, 0.0], [math.nan, 1.0], [math.inf, 0.0], [3.0, 4.0], [30.0, 40.0]])
    clipped = clip_and_sum([rows, np.ones((1, 3)), np.ones(2)], size=2, clip=5.0)
    np.testing.assert_allclose(clipped.total, [6.0, 8.0])
    assert (clipped.received, clipped.below, clipped.above) == (7, 1, 1)


@pytest.mark.parametrize(
    "report",
    [
        np.full((1, SIZE + 1), 7.0),
        np.full((1, 1), 7.0),
        np.full((SIZE,), 7.0),
        np.full((1, SIZE, 1), 7.0),
        np.full((1, 0), 7.0),
        np.array(7.0),
        np.array([["a", "b", "c"]]),
        np.array([[1j, 2j, 3j]]),
        np.array([[None, None, None]]),
    ],
    ids=["wide", "narrow", "flat", "deep", "empty", "scalar", "text", "complex", "objects"],
)
def test_a_report_that_is_no_row_contributes_zero(report):
    """Broadcast, a narrow or scalar report would add itself to every coordinate, past the clip. It counts as one
    reply, however long it is: nobody stands in for a cohort.
    """
    others = np.array([[0.3, 0.0, 0.0]])
    release = released([others, report], Recorder())
    assert release.sum.tolist() == [0.3, 0.0, 0.0]
    assert release.received == 2


def test_chunks_are_streamed_and_change_nothing():
    """A cohort in chunks of one has the sum of the cohort at once; a generator is enough."""
    rows = np.random.default_rng(3).normal(size=(20, SIZE)).astype(np.float32)
    one_by_one = noiseless_sum((row[None] for row in rows), clip=1.0)
    np.testing.assert_allclose(one_by_one, noiseless_sum([rows], clip=1.0), rtol=1e-12)
    assert one_by_one.dtype == np.float64


def test_below_the_minimum_nothing_is_paid_or_drawn():
    """9 of at least 10 answered: the round is refused before the noise is paid for."""
    noise, paid = Recorder(), []
    with pytest.raises(CohortTooSmall, match="round 1: 9 answered, at least 10"):
        released([np.zeros((9, SIZE))], PaidNoise(noise, pay=lambda: paid.append(1)), minimum=10)
    assert (noise.asked, paid) == ([], [])


def test_noise_is_paid_for_before_it_is_drawn():
    """Where paying is refused, nothing is drawn and nothing released; else each draw is paid once."""

    def refuse():
        raise BudgetExceeded("no")

    noise, paid = Recorder(), []
    with pytest.raises(BudgetExceeded):
        released([np.zeros((1, SIZE))], PaidNoise(noise, pay=refuse))
    assert noise.asked == []
    released([np.zeros((1, SIZE))], PaidNoise(noise, pay=lambda: paid.append(len(noise.asked))))
    assert (paid, len(noise.asked)) == ([0], 1)


@pytest.mark.parametrize("noise", [SeededNoise(11), SystemNoise()], ids=["seeded", "system"])
def test_noise_is_gaussian_with_the_scale_asked_for(noise):
    """200,000 draws at sd 3: mean, variance and fourth moment (3 sd^4) within six standard errors."""
    n = 200_000
    draws = noise.gaussian(n, sd=3.0) / 3.0
    assert draws.shape == (n,)
    assert abs(draws.mean()) < 6 / math.sqrt(n)
    assert abs((draws**2).mean() - 1) < 6 * math.sqrt(2 / n)
    assert abs((draws**4).mean() - 3) < 6 * math.sqrt(96 / n)


def test_system_noise_never_repeats_itself():
    """Two draws of 1,000 share no value and do not correlate (six standard errors)."""
    noise = SystemNoise()
    draws = np.concatenate([noise.gaussian(1000, 1.0), noise.gaussian(1000, 1.0)])
    assert len(np.unique(draws)) == 2000
    assert abs(np.corrcoef(draws[:1000], draws[1000:])[0, 1]) < 6 / math.sqrt(1000)


def test_seeded_noise_repeats_by_stream():
    """The same seed, round and attempt give the same bits; another round or attempt shares none."""
    first = SeededNoise(7, 1, 1).gaussian(100, 1.0)
    assert first.tobytes() == SeededNoise(7, 1, 1).gaussian(100, 1.0).tobytes()
    for other in (SeededNoise(7, 1, 2), SeededNoise(7, 2, 1), SeededNoise(7, 11), SeededNoise(8, 1, 1)):
        assert not np.isin(other.gaussian(100, 1.0), first).any()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("clip_norm", 0.0),
        ("clip_norm", math.inf),
        ("clip_norm", math.nan),
        ("noise_multiplier", -0.1),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", math.inf),
        ("minimum", -1),
    ],
)
def test_a_setting_outside_its_range_is_named(setting, value):
    """The error names the setting and what it got."""
    with pytest.raises(ConfigError, match=f"{setting} must .*{value}"):
        gaussian_sum(**{"clip_norm": 1.0, "noise_multiplier": 1.0, "minimum": 1, setting: value})


def test_short_rows_stay_as_they_are():
    """Up to the clip norm not a bit changes, and the caller's array is never written to."""
    rows = np.array([[0.3, 0.4], [3.0, 4.0]], dtype=np.float32)
    before = rows.copy()
    clipped = clip_rows(rows, clip=0.5000001)
    assert clipped[0].tolist() == before[0].astype(np.float64).tolist()
    np.testing.assert_allclose(clipped[1], [0.3, 0.4], rtol=1e-6)
    np.testing.assert_array_equal(rows, before)


def test_a_released_embedding_is_clipped_then_noised():
    """(30, 40) clipped to 2 is (1.2, 1.6); the noise has sd sigma * clip = 1, a draw for each value."""
    embedding = np.array([[30.0, 40.0], [np.nan, 0.0]], dtype=np.float32)
    noised = clip_and_noise(embedding, clip=2.0, sigma=0.5, noise=SeededNoise(1))
    noise = SeededNoise(1).gaussian(4, 1.0).reshape(2, 2)
    assert noised.dtype == np.float32
    np.testing.assert_allclose(noised - noise, [[1.2, 1.6], [0.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("mu", "delta", "expected"),
    [
        (1.0, 0.126937, 1.0),  # Phi(-0.5) - e Phi(-1.5) = 0.308538 - 2.718282 * 0.066807
        (1.0, 0.4, 0.0),  # at epsilon 0 delta is 2 Phi(0.5) - 1 = 0.3829 already
        (math.sqrt(2) / 8.35, 1e-10, 0.9935),
        (math.sqrt(0.3), 1e-10, 3.4157),
        (math.sqrt(1000), 1e-6, 649.385),
        (0.0, 1e-6, 0.0),
        (math.inf, 1e-6, math.inf),
    ],
)
def test_the_exact_gaussian(mu, delta, expected):
    """Balle and Wang 2018, theorem 8, by hand or from published figures."""
    assert gaussian_epsilon(mu, delta) == pytest.approx(expected, abs=6e-5, rel=1e-6)


def test_the_local_epsilon_counts_both_ends_of_the_clip():
    """Two embeddings may lie 2 * clip apart: at sigma 2 (in clips) mu is 1."""
    assert local_epsilon(sigma=2.0, delta=0.126937) == pytest.approx(1.0, abs=1e-4)
