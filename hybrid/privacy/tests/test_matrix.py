"""Brute force and dense matrices stand beside what is computed in a stream."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from hybrid.errors import BudgetExceeded, CohortTooSmall, ConfigError
from hybrid.privacy.accountant import epsilon
from hybrid.privacy.matrix import (
    Banded,
    Buffered,
    Matrix,
    Participation,
    banded,
    buffered,
    matrix_sum,
    optimised,
    prefix_error,
    sensitivity,
)
from hybrid.privacy.mechanisms import SeededNoise, clip_and_sum

RATIO = st.floats(0, 1, allow_subnormal=False)
BANDED = st.lists(RATIO, max_size=5).map(lambda ratios: Banded((1.0, *np.cumprod(ratios).tolist())))
BUFFERED = st.lists(st.tuples(RATIO, st.floats(0, 0.999)), min_size=1, max_size=4).map(
    lambda pairs: Buffered(tuple(share / (len(pairs) + 1e-9) for share, _ in pairs), tuple(decay for _, decay in pairs))
)
FACTOR = BANDED | BUFFERED
PEOPLE = st.builds(Participation, rounds=st.integers(1, 7), separation=st.integers(1, 8))


def dense(factor, rounds):
    """C, (rounds, rounds), by its definition."""
    return np.tril(toeplitz(factor.column(rounds)))


def patterns(people):
    """Every choice of rounds of which no two are less than the separation apart."""
    for taken in product((False, True), repeat=people.rounds):
        places = np.flatnonzero(taken)
        if (np.diff(places) >= people.separation).all():
            yield places


def streamed(factor, z):
    """(n, p): the rows of C^-1 Z as they are drawn."""
    buffers, rows = factor.buffers(z.shape[1]), []
    for fresh in z:
        row, buffers = factor.draw(buffers, fresh)
        rows.append(row)
    return np.array(rows)


@settings(max_examples=60, deadline=None)
@given(FACTOR, PEOPLE)
def test_no_participation_moves_more_than_the_sensitivity(factor, people):
    """Over all patterns and all signs of a person's vectors in them: the largest norm is just the sensitivity."""
    c = dense(factor, people.rounds)
    worst = max(
        np.linalg.norm(c[:, places] @ signs)
        for places in patterns(people)
        for signs in product((-1.0, 1.0), repeat=len(places))
    )
    assert sensitivity(factor, people) == pytest.approx(worst, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(FACTOR, PEOPLE, st.integers(0, 2**32))
def test_vectors_that_turn_from_round_to_round_move_no_more(factor, people, seed):
    """Unit vectors of three dimensions, drawn anew in each round of each pattern."""
    c, rng = dense(factor, people.rounds), np.random.default_rng(seed)
    for places in patterns(people):
        vectors = rng.normal(size=(len(places), 3))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        assert np.linalg.norm(c[:, places] @ vectors) <= sensitivity(factor, people) * (1 + 1e-9)


def test_bands_that_do_not_overlap_cost_the_root_of_the_participations():
    """1 + 1/4 + 1/16 = 21/16 a participation, four of them in 12 rounds with 3 between: sqrt(21) / 2."""
    assert sensitivity(Banded((1.0, 0.5, 0.25)), Participation(12, 3)) == pytest.approx(math.sqrt(21) / 2)


def test_the_horizon_cuts_what_comes_after_it():
    """Of the last round's column only the 1 is left: in 2 rounds apart by 1, columns (1, 1/2) and (0, 1)."""
    assert sensitivity(Banded((1.0, 0.5)), Participation(2, 1)) == pytest.approx(math.hypot(1, 1.5))


@settings(deadline=None)
@given(FACTOR, st.integers(1, 12), st.integers(0, 2**32))
def test_rows_drawn_one_by_one_are_those_of_the_inverse(factor, rounds, seed):
    """C times the rows is Z, for any C and Z; what is remembered never grows."""
    z = np.random.default_rng(seed).normal(size=(rounds, 2))
    rows = streamed(factor, z)
    np.testing.assert_allclose(dense(factor, rounds) @ rows, z, atol=1e-9 * (1 + np.abs(rows).max()))


@pytest.mark.parametrize(("factor", "memory"), [(Banded((1.0, 0.5, 0.25)), 2), (Buffered((0.5,) * 2, (0.5,) * 2), 2)])
def test_what_is_remembered_stays_as_large(factor, memory):
    """Two vectors, after one row as after fifty."""
    buffers = factor.buffers(7)
    for _ in range(50):
        assert buffers.shape == (memory, 7)
        _, buffers = factor.draw(buffers, np.ones(7))


@pytest.mark.parametrize("factor", [Banded((1.0, 0.6, 0.3)), Buffered((0.5, 0.2), (0.9, 0.3))])
def test_released_noise_has_the_covariance_of_the_inverse(factor):
    """Over 200,000 coordinates with z = 2 and clip 0.5: C^-1 C^-T within five standard errors of 0.0032."""
    rounds, size = 5, 200_000
    mechanism = matrix_sum(
        clip_norm=0.5, noise_multiplier=2.0, minimum=0, matrix=Matrix(factor, Participation(rounds, 1), 1.0)
    )
    state, released = mechanism.init(size), []
    for number in range(rounds):
        state, release = mechanism.step(state, lambda clip: clip_and_sum([], size, clip), SeededNoise(1, number))
        released.append(release.sum)
    inverse = np.linalg.inv(dense(factor, rounds))
    np.testing.assert_allclose(np.cov(released), inverse @ inverse.T, atol=5 * 2 * math.sqrt(2 / size))


@settings(max_examples=30, deadline=None)
@given(FACTOR, PEOPLE, st.sampled_from([0.0, 0.5, 0.9]))
def test_the_error_is_that_of_dense_matrices(factor, people, momentum):
    """B = A C^-1, A by its definition: the mean and the largest of its rows' squares, times the sensitivity."""
    n = people.rounds
    step = np.tril(toeplitz(momentum ** np.arange(n)))
    b = np.tril(np.ones((n, n))) @ step @ np.linalg.inv(dense(factor, n))
    squares = (b**2).sum(axis=1)
    error, sens = prefix_error(factor, people, momentum), sensitivity(factor, people)
    assert error.mean == pytest.approx(sens * math.sqrt(squares.mean()), rel=1e-6)
    assert error.worst == pytest.approx(sens * math.sqrt(squares.max()), rel=1e-6)


@pytest.mark.parametrize("find", [banded, buffered])
@pytest.mark.parametrize(("rounds", "separation"), [(64, 64), (200, 8), (100, 20), (60, 1)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_factor_near_the_optimised_one_is_better(find, rounds, separation, momentum):
    """Each number of it moved by 1 % either way, where the conditions allow it: the error is no less, or by a hair."""
    people = Participation(rounds, separation)
    factor = find(people, 4, momentum)
    least = prefix_error(factor, people, momentum).mean
    for near in nearby(factor):
        assert prefix_error(near, people, momentum).mean > least * (1 - 1e-4)


def nearby(factor):
    fields = ("coefficients",) if isinstance(factor, Banded) else ("scales", "decays")
    for field in fields:
        values = getattr(factor, field)
        for place, scale in product(range(len(values)), (0.99, 1.01)):
            moved = (*values[:place], values[place] * scale, *values[place + 1 :])
            others = {name: getattr(factor, name) for name in fields} | {field: moved}
            try:
                yield type(factor)(**others)
            except ConfigError:
                continue


@pytest.mark.parametrize("rounds", [16, 64, 256])
def test_one_participation_comes_near_the_least_error_of_any_factorisation(rounds):
    """No factorisation has less than the sum of A's singular values over n; ours of all bands or 4 buffers, 8 % more.

    |A|_* <= |B|_F |C|_F <= |B|_F sqrt(n) max column; A's singular values are 1 / (2 sin((2j - 1) pi / (4n + 2))).
    """
    people = Participation(rounds, rounds)
    bound = sum(0.5 / math.sin((2 * j - 1) * math.pi / (4 * rounds + 2)) for j in range(1, rounds + 1)) / rounds
    for factor in (banded(people, rounds), buffered(people, 4)):
        assert bound <= prefix_error(factor, people).mean <= 1.08 * bound


@pytest.mark.parametrize("kind", ["banded", "blt"])
@pytest.mark.parametrize("separation", [4, 16])
def test_correlated_noise_leaves_less_than_independent_noise_of_the_same_cost(kind, separation):
    """At equal sensitivity over noise, prefix sums of 200 rounds are at most 0.65 as far off."""
    matrix, plain = (optimised(each, 200, separation) for each in (kind, "independent"))
    at_cost_1 = [prefix_error(each.factor, each.participation).mean for each in (matrix, plain)]
    assert at_cost_1[0] < 0.65 * at_cost_1[1]


def test_where_everybody_takes_part_each_time_nothing_is_gained():
    """Separation 1: the best C is the identity, but for rounding."""
    people = Participation(50, 1)
    plain = prefix_error(Banded((1.0,)), people).mean
    for factor in (banded(people, 8), buffered(people, 2)):
        assert prefix_error(factor, people).mean == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("separation", [3, 8, 100])
def test_independent_noise_costs_each_participation(separation):
    """The identity: as k plain releases to one person, by any accountant."""
    matrix = optimised("independent", 24, separation)
    assert matrix.factor == Banded((1.0,))
    assert matrix.sensitivity == pytest.approx(math.sqrt(matrix.participation.most))
    assert matrix.participation.most == {3: 8, 8: 3, 100: 1}[separation]


@pytest.mark.parametrize("kind", ["independent", "banded", "blt"])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("separation", [1, 2, 5])
def test_the_shortest_horizons_have_their_mechanism_too(kind, rounds, separation):
    """Its factor meets the conditions and leaves no more than independent noise, or by a hair."""
    matrix, people = optimised(kind, rounds, separation), Participation(rounds, separation)
    assert matrix.sensitivity == sensitivity(matrix.factor, people)
    plain = prefix_error(Banded((1.0,)), people).mean
    assert prefix_error(matrix.factor, people).mean <= plain * 1.001


def test_memory_is_what_was_asked_for_or_follows_the_separation():
    """Bands of a memory and 1; by default as many as the separation, at most 32; buffers, by default 4."""
    bands = [len(optimised("banded", 200, b, memory=m).factor.coefficients) for b, m in ((8, 2), (8, None), (90, None))]
    buffers = [len(optimised("blt", 200, 8, memory=m).factor.scales) for m in (2, None)]
    assert (bands, buffers) == ([3, 8, 32], [2, 4])


# The mechanism.

HALVES = Matrix(Banded((1.0, 0.5)), Participation(3, 2), sensitivity(Banded((1.0, 0.5)), Participation(3, 2)))


class Ones:
    """A noise source whose every draw is its scale."""

    def gaussian(self, size, sd):
        return np.full(size, sd)


def stepped(mechanism, state, rows, noise):
    return mechanism.step(state, lambda clip: clip_and_sum([np.array(rows)], state.size, clip), noise)


def test_a_release_is_the_clipped_sum_and_one_row_of_noise():
    """z = 3, clip 2, so Z = 6 each time; C of 1 and 1/2: 6, 6 - 3 = 3, 6 - 1.5 = 4.5; (3, 4) clips to (1.2, 1.6)."""
    mechanism = matrix_sum(clip_norm=2.0, noise_multiplier=3.0, minimum=1, matrix=HALVES)
    state = mechanism.init(2)
    for noise in (6.0, 3.0, 4.5):
        state, release = stepped(mechanism, state, [[3.0, 4.0]], Ones())
        np.testing.assert_allclose(release.sum, [1.2 + noise, 1.6 + noise])
        assert (release.received, release.clip) == (1, 2.0)


def test_a_horizon_is_released_once_and_no_more():
    """Of three steps the fourth is refused, before anybody's update or any noise is asked for."""
    mechanism = matrix_sum(clip_norm=1.0, noise_multiplier=1.0, minimum=0, matrix=HALVES)
    state = mechanism.init(1)
    for _ in range(3):
        state, _ = stepped(mechanism, state, [[1.0]], Ones())
    with pytest.raises(BudgetExceeded, match="rounds must be at most the 3 that were reserved"):
        mechanism.step(state, None, None)


def test_a_cohort_too_small_leaves_its_step_to_the_next():
    """Nothing is drawn: the step is tried again as if it had not been."""
    mechanism = matrix_sum(clip_norm=1.0, noise_multiplier=1.0, minimum=2, matrix=HALVES)
    state = mechanism.init(1)
    with pytest.raises(CohortTooSmall):
        stepped(mechanism, state, [[1.0]], None)
    assert stepped(mechanism, state, [[1.0], [1.0]], Ones())[0].round == 1


def test_a_step_without_anybody_is_released_as_noise():
    """An empty round is a step as any other: its row of noise is what later rows take back from."""
    mechanism = matrix_sum(clip_norm=1.0, noise_multiplier=1.0, minimum=0, matrix=HALVES)
    state, release = mechanism.step(mechanism.init(1), lambda clip: clip_and_sum([], 1, clip), Ones())
    assert release.sum.tolist() == [1.0]
    assert stepped(mechanism, state, [[0.0]], Ones())[1].sum.tolist() == [0.5]


def test_all_releases_cost_one_gaussian_release():
    """Columns (1, 1/2, 0) and (0, 0, 1): sensitivity 3/2; z = 6 is mu = 1/4, as sixteen plain releases of z = 16."""
    assert HALVES.sensitivity == pytest.approx(1.5)
    spent = epsilon([HALVES.event(6.0)], 1e-6)
    assert spent.method == "exact Gaussian"
    assert spent.epsilon == pytest.approx(epsilon_of_mu(0.25, 1e-6), rel=1e-9)


def epsilon_of_mu(mu, delta):
    """By bisection on Balle and Wang's theorem 8, in plain floating point."""
    phi = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
    low, high = 0.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        over = phi(mu / 2 - middle / mu) - math.exp(middle) * phi(-mu / 2 - middle / mu) > delta
        low, high = (middle, high) if over else (low, middle)
    return high


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Banded(()), "coefficients must begin with 1"),
        (lambda: Banded((0.5,)), "coefficients must begin with 1"),
        (lambda: Banded((1.0, 0.2, 0.3)), "never ascend"),
        (lambda: Banded((1.0, -0.1)), "never be negative"),
        (lambda: Banded((1.0, math.nan)), "never ascend"),
        (lambda: Buffered((0.6, 0.5), (0.1, 0.1)), "at most 1 together"),
        (lambda: Buffered((0.5,), (1.0,)), r"decays as many and in \[0, 1\)"),
        (lambda: Buffered((0.5,), ()), "as many"),
        (lambda: Buffered((math.nan,), (0.5,)), "scales must be >= 0"),
        (lambda: Participation(0, 1), "rounds must be at least 1, got 0"),
        (lambda: Participation(1, 0), "separation must be at least 1, got 0"),
        (lambda: banded(Participation(9, 3), 0), "bands must be at least 1, got 0"),
        (lambda: buffered(Participation(9, 3), 2, 1.0), r"momentum must be in \[0, 1\)"),
        (lambda: matrix_sum(clip_norm=0, noise_multiplier=1, minimum=0, matrix=HALVES), "clip_norm must be"),
        (lambda: matrix_sum(clip_norm=1, noise_multiplier=-1, minimum=0, matrix=HALVES), "noise_multiplier must be"),
    ],
)
def test_what_the_theorems_do_not_cover_is_refused(build, message):
    """The message names the setting, what it must be and what it got."""
    with pytest.raises(ConfigError, match=message):
        build()
