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
    clip_and_noise,
    clip_rows,
    gaussian_epsilon,
    gaussian_sum,
    local_epsilon,
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
    mechanism = gaussian_sum(clip_norm=clip, noise_multiplier=0.0, minimum=1)
    return mechanism.step(mechanism.init(size), chunks, Recorder())[1].sum


def released(chunks, noise, *, clip=1.0, noise_multiplier=1.0, minimum=1, size=SIZE):
    mechanism = gaussian_sum(clip_norm=clip, noise_multiplier=noise_multiplier, minimum=minimum)
    return mechanism.step(mechanism.init(size), chunks, noise)[1]


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


def test_defect_2_the_noise_is_scaled_to_the_norm_that_clipped():
    """Flower's adaptive wrappers scale noise to the next norm; here every round asks for noise_multiplier * clip."""
    noise = Recorder()
    mechanism = gaussian_sum(clip_norm=0.5, noise_multiplier=3.0, minimum=1)
    state = mechanism.init(SIZE)
    for _ in range(4):
        state, _ = mechanism.step(state, [np.full((2, SIZE), 9.0)], noise)
    assert noise.asked == [(SIZE, 1.5)] * 4
    assert state.round == 4


def test_defect_3_everybody_weighs_the_same():
    """Flower weighs by num-examples, which a device reports. Here no count enters: one of 100 moves the sum by its
    clipped row, (30, 40) to (1.2, 1.6), and the mean over the planned 100 by clip / 100.
    """
    rows = np.zeros((100, 2))
    rows[17] = [30.0, 40.0]
    moved = noiseless_sum([rows], clip=2.0, size=2)
    np.testing.assert_allclose(moved, [1.2, 1.6])
    assert np.linalg.norm(moved / 100) == pytest.approx(0.02)


@pytest.mark.parametrize("replies", [10, 60, 100])
def test_defect_4_missing_replies_leave_the_noise_as_it_is(replies):
    """Flower's noise shrinks with the replies, or the round is dropped. Here 10, 60 and 100 of 100 have the same:
    60,000 draws with standard deviation 1.2 * 0.5 (chi-square, five standard errors).
    """
    size = 60_000
    release = released(
        [np.zeros((replies, size))], SeededNoise(4, replies), clip=0.5, noise_multiplier=1.2, minimum=10, size=size
    )
    assert release.received == replies
    chi_square = float(np.sum((release.sum / 0.6) ** 2))
    assert abs(chi_square - size) < 5 * math.sqrt(2 * size)


def test_defect_4_one_bad_reply_does_not_drop_the_round():
    """In Flower one client's error drops the round; here the others are summed."""
    chunks = [np.array([[0.1, 0.0, 0.0]]), np.array([[math.nan, 0.0, 0.0]]), np.array([[0.2, 0.0, 0.0]])]
    release = released(chunks, Recorder(), minimum=3)
    np.testing.assert_allclose(release.sum, [0.3, 0.0, 0.0])
    assert release.received == 3


def test_defect_5_integers_are_clipped_and_scalars_do_not_escape():
    """In Flower a 0-d parameter passes unclipped and an integer buffer raises. Here (30, 40) as int64 has norm 50 and
    becomes (1.2, 1.6), and a 0-d report adds nothing.
    """
    release = released([np.array([[30, 40]], dtype=np.int64), np.array(10**6)], Recorder(), clip=2.0, size=2)
    np.testing.assert_allclose(release.sum, [1.2, 1.6])


def test_defect_6_a_zero_update_is_a_zero_and_nan_poisons_nothing():
    """In Flower a zero update raises ZeroDivisionError and a NaN makes the model NaN."""
    rows = np.array([[0.0, 0.0, 0.0], [math.nan, 1.0, 1.0], [math.inf, 0.0, 0.0], [0.0, 0.6, 0.8]])
    with np.errstate(all="raise"):
        release = released([rows], Recorder(), clip=5.0)
    assert release.sum.tolist() == [0.0, 0.6, 0.8]


def test_defect_7_the_noise_is_in_what_is_released():
    """With FedAdam Flower adds noise after the server optimiser. Here the sum leaves the mechanism noised: clipped
    sum plus the very draw, before any optimiser can see it.
    """
    release = released([np.array([[0.1, 0.2, 0.3]])], SeededNoise(5, 1), noise_multiplier=2.0)
    np.testing.assert_allclose(release.sum, np.array([0.1, 0.2, 0.3]) + SeededNoise(5, 1).gaussian(SIZE, 2.0))


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
