"""The figures to compare with were worked out outside this project; their sources stand in each test."""

from __future__ import annotations

import math

import pytest

from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.privacy.accountant import GaussianEvent, MatrixEvent, Spent, epsilon, noise_multiplier_for, rdp_epsilon


def test_two_plain_releases_cost_the_exact_gaussian():
    """z = 8.35, two releases on one person, delta = 1e-10: epsilon 0.9935 (Balle and Wang 2018)."""
    spent = epsilon([GaussianEvent(8.35, count=2)], delta=1e-10)
    assert spent.method == "exact Gaussian"
    assert spent.epsilon == pytest.approx(0.9935, abs=6e-5)


def test_plain_releases_compose_by_their_squared_mu():
    """mu^2 = 0.1 + 0.2 = 0.3 (rho 0.15), delta = 1e-10: epsilon 3.4157, however the spend is split."""
    events = [GaussianEvent(1 / math.sqrt(0.1)), GaussianEvent(1 / math.sqrt(0.2))]
    assert epsilon(events, delta=1e-10).epsilon == pytest.approx(3.4157, abs=6e-5)


def test_poisson_sampling_costs_what_moments_accountants_say():
    """z = 1, q = 0.01, T = 1000, delta = 1e-6: RDP 2.44; PRV is tighter."""
    events = [GaussianEvent(1.0, sampling=0.01, count=1000)]
    assert rdp_epsilon(events, delta=1e-6) == pytest.approx(2.44, abs=5e-3)
    spent = epsilon(events, delta=1e-6)
    assert spent.method == "PRV"
    assert 2.0 < spent.epsilon < 2.44


def test_without_sampling_the_same_releases_protect_nobody():
    """z = 1, T = 1000, delta = 1e-6, unsampled: 666 by RDP, about 649 exactly."""
    events = [GaussianEvent(1.0, count=1000)]
    assert rdp_epsilon(events, delta=1e-6) == pytest.approx(666, abs=0.5)
    assert epsilon(events, delta=1e-6) == Spent(pytest.approx(649, abs=0.5), "exact Gaussian")


@pytest.mark.parametrize(
    ("sampling", "noise_multiplier", "rounds", "delta", "referee"),
    [(0.01, 1.0, 1000, 1e-6, 2.1245), (0.5, 10.0, 100, 1e-6, 2.2820), (0.1, 1.0, 1, 1e-6, 2.1817)],
)
def test_prv_agrees_with_an_independent_accountant(sampling, noise_multiplier, rounds, delta, referee):
    """Google's dp-accounting 0.6.0 (PLD, grid 1e-4) gives `referee`: ours is not below it and at most 2 % above."""
    spent = epsilon([GaussianEvent(noise_multiplier, sampling, rounds)], delta)
    assert spent.method == "PRV"
    assert referee <= spent.epsilon <= 1.02 * referee


@pytest.mark.parametrize(
    ("events", "delta", "referee"),
    [
        ([GaussianEvent(2.34, 0.4, 70), GaussianEvent(8.0)], 1e-5, 7.3034),
        ([GaussianEvent(2.0, 0.01, 500), GaussianEvent(5.0)], 1e-6, 0.98977),
        ([GaussianEvent(1.0, 0.01, 1000), GaussianEvent(1.0)], 1e-6, 5.38922),
        (  # a training, ten queries, and two evaluations of two phases
            [
                GaussianEvent(8.0, 0.25, 200),
                *[GaussianEvent(z, count=n) for z, n in ((20.0, 10), (16.0, 2), (40.0, 2))],
            ],
            2.3e-5,
            1.82419,
        ),
    ],
)
def test_plain_releases_among_sampled_ones_are_composed_as_tightly(events, delta, referee):
    """dp-accounting 0.6.0 (PLD, grid 1e-4) gives `referee`: ours is 0 to 2 % above it, and below RDP."""
    spent = epsilon(events, delta)
    assert spent.method == "PRV"
    assert referee <= spent.epsilon <= 1.02 * referee
    assert spent.epsilon < rdp_epsilon(events, delta)
    assert spent.epsilon > max(epsilon([event], delta).epsilon for event in events)


def test_the_order_and_grouping_of_events_change_nothing():
    """A ledger that reads its lines back finds the same epsilon to the last bit."""
    a, b = GaussianEvent(3.0, 0.1, 5), GaussianEvent(2.0, 0.1)
    assert epsilon([a, b, b], 1e-5) == epsilon([b, GaussianEvent(2.0, 0.1), *[GaussianEvent(3.0, 0.1)] * 5], 1e-5)


def test_nothing_released_costs_nothing_and_no_noise_costs_everything():
    """The two ends of the scale."""
    assert epsilon([], delta=1e-6).epsilon == 0
    assert epsilon([GaussianEvent(0.0, sampling=0.5)], delta=1e-6).epsilon == math.inf


@pytest.mark.parametrize(
    ("target", "delta", "sampling", "rounds"),
    [
        (1.0, 1e-6, 0.01, 1000),
        (8.0, 1e-5, 0.4, 50),
        (100.0, 1e-5, 0.1, 10),
        (0.1, 1e-9, 1.0, 100),
        (8.0, 1e-9, 0.1, 100),
    ],
)
def test_the_noise_multiplier_keeps_the_budget_and_wastes_little(target, delta, sampling, rounds):
    """Its epsilon is within the target; with 0.2 % less noise it it would not be, or by a hair."""
    noise_multiplier = noise_multiplier_for(target, delta, sampling, rounds)
    assert epsilon([GaussianEvent(noise_multiplier, sampling, rounds)], delta).epsilon <= target
    assert epsilon([GaussianEvent(noise_multiplier / 1.002, sampling, rounds)], delta).epsilon > 0.995 * target


def test_what_is_released_besides_is_paid_by_the_same_budget():
    """epsilon 3.4157 at delta 1e-10 is mu^2 = 0.3: with 0.1 of it spent, five rounds have 0.04 each, so z = 5."""
    besides = [GaussianEvent(1 / math.sqrt(0.1))]
    assert noise_multiplier_for(3.4157, 1e-10, 1.0, 5, besides=besides) == pytest.approx(5.0, rel=2e-3)
    split = [GaussianEvent(1 / math.sqrt(0.05)), GaussianEvent(1 / math.sqrt(0.05))]
    assert noise_multiplier_for(3.4157, 1e-10, 1.0, 5, besides=iter(split)) == pytest.approx(5.0, rel=2e-3)


@pytest.mark.parametrize(
    ("target", "sampling", "besides"),
    [
        (8.0, 0.4, [GaussianEvent(8.0)]),  # sampled rounds beside a plain query
        (4.0, 0.1, [GaussianEvent(1.5, 0.1, 3)]),
        (4.0, 1.0, [GaussianEvent(1.5, 0.1, 3)]),  # plain rounds beside sampled releases
        (8.0, 0.4, [GaussianEvent(0.62)]),  # nearly all of the budget
    ],
)
def test_rounds_and_what_is_besides_keep_the_budget_and_waste_little(target, sampling, besides):
    """Together they are within the target, and with 0.2 % less noise they would not be, or by a hair."""
    noise_multiplier = noise_multiplier_for(target, 1e-5, sampling, 70, besides=besides)
    assert noise_multiplier > noise_multiplier_for(target, 1e-5, sampling, 70)
    assert epsilon([GaussianEvent(noise_multiplier, sampling, 70), *besides], 1e-5).epsilon <= target
    assert epsilon([GaussianEvent(noise_multiplier / 1.002, sampling, 70), *besides], 1e-5).epsilon > 0.995 * target


@pytest.mark.parametrize("sampling", [0.4, 1.0])
@pytest.mark.parametrize("besides", [GaussianEvent(0.5), GaussianEvent(0.0), GaussianEvent(0.3, 0.5)])
def test_what_is_besides_may_leave_nothing(sampling, besides):
    """Each costs more than epsilon 8 alone: refused, since no noise on the rounds could help."""
    with pytest.raises(BudgetExceeded, match="besides the 70 rounds costs"):
        noise_multiplier_for(8.0, 1e-5, sampling, 70, besides=[besides])


@pytest.mark.parametrize(
    ("wrong", "setting"),
    [
        (lambda: GaussianEvent(-1.0), "noise_multiplier"),
        (lambda: GaussianEvent(math.nan), "noise_multiplier"),
        (lambda: GaussianEvent(1.0, sampling=0.0), "sampling"),
        (lambda: GaussianEvent(1.0, count=0), "count"),
        (lambda: epsilon([], delta=1.0), "delta"),
        (lambda: noise_multiplier_for(0.0, 1e-6, 0.1, 10), "epsilon"),
        (lambda: noise_multiplier_for(1.0, 0.0, 0.1, 10), "delta"),
    ],
)
def test_a_setting_outside_its_range_is_named(wrong, setting):
    """The error names the setting and what it got."""
    with pytest.raises(ConfigError, match=setting):
        wrong()


def matrix(**changes):
    return MatrixEvent(**{"noise_multiplier": 6.0, "sensitivity": 1.5, "rounds": 30, "separation": 4} | changes)


def test_a_matrix_mechanism_costs_its_sensitivity_over_its_noise():
    """1.5 / 6 is mu = 1/4, as one plain release of z = 4 or four of z = 8, however many rounds it has."""
    for event in (matrix(), matrix(rounds=9000)):
        assert epsilon([event], 1e-6) == epsilon([GaussianEvent(4.0)], 1e-6)
    assert epsilon([matrix()], 1e-6).epsilon == pytest.approx(epsilon([GaussianEvent(8.0, count=4)], 1e-6).epsilon)


def test_a_matrix_mechanism_composes_with_what_is_besides():
    """With plain releases by the squared mu; with sampled ones by PRV or RDP, as the plain release it costs."""
    together = epsilon([matrix(), matrix(), GaussianEvent(8.0)], 1e-6)
    assert together.method == "exact Gaussian"
    assert together.epsilon == pytest.approx(epsilon([GaussianEvent(8.0, count=9)], 1e-6).epsilon)
    sampled = GaussianEvent(2.0, 0.01, 500)
    assert epsilon([sampled, matrix()], 1e-6) == epsilon([sampled, GaussianEvent(4.0)], 1e-6)


def test_a_matrix_mechanism_takes_part_as_often_as_its_separation_lets_it():
    """30 rounds, 4 apart: in rounds 1, 5, ..., 29, which are eight."""
    assert matrix().participations == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sensitivity": 0.0}, "sensitivity must be finite and > 0, got 0.0"),
        ({"sensitivity": math.inf}, "sensitivity must be"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"separation": 0}, "separation must be at least 1, got 0"),
    ],
)
def test_a_matrix_event_out_of_range_is_refused(changes, message):
    """The message names the attribute and what it got."""
    with pytest.raises(ConfigError, match=message):
        matrix(**changes)
