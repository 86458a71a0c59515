from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hybrid.errors import BudgetExceeded, CohortTooSmall, ConfigError
from hybrid.federation.aggregator import PaidMechanism, Round, SimulatedAggregator
from hybrid.federation.engine import Engine
from hybrid.local_training import LocalTraining
from hybrid.network import Network
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import ClippedSum

USERS = 40


@pytest.fixture
def aggregator(tiny_model, tiny_examples, tmp_path):
    """(**settings) -> an aggregator over 40 users, its weights, and its ledger."""
    ledgers = []

    def build(examples=None, seed=3, folder="run", budget=1e9, tower=None, **changes):
        network = Network.build(tiny_model(**{"device_tower": tower} if tower else {}))
        engine = Engine.build(network, examples or tiny_examples(USERS), LocalTraining(1, 0.5))
        settings = Round(**{"sampling": 0.5, "clip": 0.1, "noise_multiplier": 1.0, "minimum": 1} | changes)
        ledgers.append(Ledger.open(tmp_path / folder, budget_epsilon=budget, delta=1e-3))
        return SimulatedAggregator(engine, ledgers[-1], settings, seed=seed), engine.side.flat(), ledgers[-1]

    yield build
    for ledger in ledgers:
        ledger.close()


def test_a_round_is_in_the_ledger_with_what_it_cost(aggregator):
    """One entry: the round, its noise, its sampling, its clip."""
    one, flat, ledger = aggregator()
    one.run_round(1, flat)
    (entry,) = ledger.entries
    assert (entry.purpose, entry.round, entry.attempt) == ("train", 1, 1)
    assert (entry.noise_multiplier, entry.sampling, entry.clip) == (1.0, 0.5, 0.1)


def test_a_cohort_too_small_costs_nothing(aggregator):
    """41 of 40 cannot take part: the round fails, and the ledger has no entry."""
    one, flat, ledger = aggregator(minimum=USERS + 1)
    with pytest.raises(CohortTooSmall):
        one.run_round(1, flat)
    assert ledger.entries == []


def test_nothing_is_released_that_the_ledger_does_not_pay(aggregator):
    """Noise of 0.01 clips in one round costs far more than epsilon 1: refused, and nothing spent."""
    one, flat, ledger = aggregator(noise_multiplier=0.01, budget=1.0)
    with pytest.raises(BudgetExceeded):
        one.run_round(1, flat)
    assert ledger.entries == []


def test_a_seed_repeats_a_run_and_another_does_not(aggregator):
    """The same seed gives the same sum to the last bit."""
    sums = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        one, flat, _ = aggregator(folder=folder, seed=seed)
        sums.append(one.run_round(1, flat).sum)
    np.testing.assert_array_equal(sums[0], sums[1])
    assert (sums[0] != sums[2]).all()


def test_a_round_run_again_is_a_new_attempt_with_other_noise(aggregator):
    """Two sums with the same noise would cancel it: the second attempt pays again, and differs everywhere."""
    one, flat, ledger = aggregator(sampling=1.0)
    first, second = one.run_round(1, flat).sum, one.run_round(1, flat).sum
    assert [entry.attempt for entry in ledger.entries] == [1, 2]
    assert (first != second).all()


def test_one_user_changed_to_nothing_moves_the_sum_by_at_most_the_clip_norm(aggregator, tiny_examples):
    """Without noise, each of 40 users' rows dropped in turn moves the sum by 0.1 at most, and some by just that."""
    whole = tiny_examples(USERS)
    one, flat, _ = aggregator(whole, folder="whole", noise_multiplier=0.0, sampling=1.0, budget=1e300)
    with_all = _noiseless(one, flat)
    moved = []
    for user in range(USERS):
        without = whole.with_labels(whole.user_of_row != user)
        other, _, _ = aggregator(without, folder=f"without-{user}", noise_multiplier=0.0, sampling=1.0)
        moved.append(np.linalg.norm(_noiseless(other, flat) - with_all))
    assert max(moved) <= 0.1 + 1e-6
    assert max(moved) == pytest.approx(0.1, rel=1e-3)


class _Wild(nn.Module):
    """Of the one device feature: infinite for large values by `exp`, for zeros by `log`."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(1, 3)

    def forward(self, rows):
        return self.linear(self.function(rows[:, :1].abs()))


@pytest.mark.parametrize("function", [torch.exp, torch.log])
def test_one_user_whose_tower_overflows_moves_nobody_else(aggregator, tiny_examples, function):
    """Without noise, any user dropped moves the sum by 0.1 at most; the first, of endless age, moves it by nothing."""
    whole = tiny_examples(USERS)
    whole = replace(whole, device=np.where(whole.user_of_row[:, None] == whole.user_of_row[0], 1e30, whole.device))
    whole = replace(whole, device=whole.device.astype(np.float32))
    noiseless = {"tower": lambda: _Wild(function), "noise_multiplier": 0.0, "sampling": 1.0}
    one, flat, _ = aggregator(whole, folder="whole", **noiseless)
    with_all = _noiseless(one, flat)
    moved = []
    for user in range(USERS):
        other, _, _ = aggregator(whole.with_labels(whole.user_of_row != user), folder=f"without-{user}", **noiseless)
        moved.append(np.linalg.norm(_noiseless(other, flat) - with_all))
    assert max(moved) <= 0.1 + 1e-6
    assert np.median(moved) > 0.01
    assert function is torch.log or moved[whole.user_of_row[0]] == pytest.approx(0, abs=1e-6)


def _noiseless(aggregator, flat):
    """The sum before noise: no budget pays for it, so the ledger is told that it did."""
    aggregator._mechanism._ledger.spend = lambda *_, **__: None
    return aggregator.run_round(1, flat).sum


def test_noise_needs_a_ledger_that_pays():
    """Without one only an oracle may be run, whose sums have none."""
    settings = Round(sampling=0.5, clip=1.0, noise_multiplier=0.5, minimum=0)
    with pytest.raises(ConfigError, match=r"noise_multiplier must be 0 without a ledger, got 0\.5"):
        PaidMechanism(settings, None, seed=0, size=2)
    oracle = PaidMechanism(replace(settings, noise_multiplier=0.0), None, seed=0, size=2)
    total = ClippedSum(np.array([1.0, 2.0]), received=3, below=3, above=0)
    np.testing.assert_array_equal(oracle.release(1, oracle.next_attempt(1), lambda clip: total).sum, [1.0, 2.0])


def test_each_user_takes_part_by_its_own_coin(aggregator):
    """Over 60 rounds the participants are Binomial(40, 1/2): mean 20 +- 1.6 (4 sd), variance 10 +- 7 (4 sd)."""
    one, flat, _ = aggregator()
    one._mechanism._ledger.spend = lambda *_, **__: None
    received = [one.run_round(number, flat).received for number in range(1, 61)]
    assert np.mean(received) == pytest.approx(20, abs=1.6)
    assert np.var(received) == pytest.approx(10, abs=7)
