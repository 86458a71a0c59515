"""What a step's noise comes to, and how large a buffer must be, worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.federation.noise import BufferSize, buffer_for, least_noise, most_updates, step_noise
from hybrid.privacy.accountant import noise_multiplier_for
from hybrid.spec import Training

DELTA = 1e-5
FLUSHES = Training(rounds=12, max_staleness=0, server_optimizer="SGD")
UNIT = noise_multiplier_for(2.0, DELTA, 1.0, 1)  # of one release that costs epsilon 2


def test_by_coins_a_steps_noise_is_the_noise_over_the_cohort():
    """sampling 1/2 of 100 people: the multiplier over 50."""
    by_coins = Training(rounds=10, sampling=0.5)
    assert step_noise(by_coins, 100, 2.0, DELTA) == noise_multiplier_for(2.0, DELTA, 0.5, 10) / 50


def test_with_independent_noise_it_is_the_noise_over_the_buffer():
    """12 flushes, 4 apart: three participations, so sqrt(3) times one release's noise, over K = 20."""
    size = BufferSize.of(FLUSHES, 20, 80, coming=1.0, epsilon=2.0, delta=DELTA)
    assert (size.separation, size.participations) == (4, 3)
    assert size.noise_multiplier == pytest.approx(math.sqrt(3) * UNIT)
    assert size.step_noise == pytest.approx(math.sqrt(3) * UNIT / 20)


@pytest.mark.parametrize("noise", ["banded", "blt"])
def test_correlated_noise_counts_for_less_although_its_multiplier_is_larger(noise):
    """At the same epsilon and buffer."""
    correlated = FLUSHES.model_copy(update={"noise": noise, "separation": 4})
    plain, better = (
        BufferSize.of(each, 20, 80, coming=1.0, epsilon=2.0, delta=DELTA) for each in (FLUSHES, correlated)
    )
    assert better.noise_multiplier > plain.noise_multiplier
    assert better.step_noise < 0.9 * plain.step_noise


def test_stale_updates_make_the_separation_shorter():
    """80 people, K = 10: 8 flushes between two participations, of which 3 may be the first one's staleness."""
    late = FLUSHES.model_copy(update={"max_staleness": 3})
    assert BufferSize.of(late, 10, 80, coming=1.0, epsilon=2.0, delta=DELTA).separation == 5
    assert most_updates(late, 80, 1.0) == 20


def test_half_the_people_coming_halves_the_separation():
    """80 people, K = 20: 4 flushes if all come, 2 if half do; and six participations in place of three."""
    size = BufferSize.of(FLUSHES, 20, 80, coming=0.5, epsilon=2.0, delta=DELTA)
    assert (size.separation, size.participations) == (2, 6)


@given(people=st.integers(1, 400), most=st.floats(0.001, 1.0), coming=st.floats(0.1, 1.0))
@settings(deadline=None, max_examples=50)
def test_the_buffer_for_a_target_is_quiet_enough_and_no_larger_than_that(people, most, coming):
    """One update fewer is too noisy; and where even all are, there is none."""
    limits = {"coming": coming, "epsilon": 2.0, "delta": DELTA}
    found = buffer_for(FLUSHES, people, most_noise=most, **limits)
    if found is None:
        everybody = math.floor(coming * people)
        assert not everybody or BufferSize.of(FLUSHES, everybody, people, **limits).step_noise > most
        return
    assert found.step_noise <= most
    if found.updates > 1:
        assert BufferSize.of(FLUSHES, found.updates - 1, people, **limits).step_noise > most


def test_a_buffer_is_found_where_with_the_largest_everybody_comes_all_the_time():
    """80 people, 12 flushes, updates up to 3 late: K = 20 leaves a separation of 1, K = 16 one of 2.

    So a person is in 12 flushes or in 6, and the noise of a mean goes by the root of that over K: 0.173 or 0.153. No
    other K has less than 16 has (13, with a separation of 3, has 2 / 13 = 0.154).
    """
    late = FLUSHES.model_copy(update={"max_staleness": 3})
    limits = {"coming": 1.0, "epsilon": 2.0, "delta": DELTA}
    quietest, largest = (BufferSize.of(late, updates, 80, **limits) for updates in (16, 20))
    assert largest.updates == most_updates(late, 80, 1.0)
    np.testing.assert_allclose(largest.step_noise / quietest.step_noise, math.sqrt(12 / 6) * 16 / 20)
    assert buffer_for(late, 80, most_noise=quietest.step_noise, **limits) == quietest
    assert buffer_for(late, 80, most_noise=0.99 * quietest.step_noise, **limits) is None


def test_the_noise_of_a_buffer_is_what_its_training_would_draw():
    """The same multiplier as `least_noise`, for the buffer and separation that are shown."""
    size = BufferSize.of(FLUSHES, 20, 80, coming=1.0, epsilon=2.0, delta=DELTA)
    chosen = FLUSHES.model_copy(update={"buffer": size.updates, "separation": size.separation})
    assert least_noise(chosen, 2.0, DELTA, sampling=1.0) == size.noise_multiplier
