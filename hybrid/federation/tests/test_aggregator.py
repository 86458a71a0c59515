from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hybrid.errors import BudgetExceeded, CohortTooSmall, ConfigError
from hybrid.federation.aggregator import (
    BufferedAggregator,
    PaidMechanism,
    Round,
    SimulatedAggregator,
    groups,
    takes_part,
)
from hybrid.federation.buffer import Buffer
from hybrid.federation.engine import Engine
from hybrid.federation.fleet import Fleet, Trace, Work
from hybrid.federation.flights import Flights, Schedule
from hybrid.local_training import LocalTraining
from hybrid.network import Network
from hybrid.privacy.accountant import epsilon
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.matrix import optimised
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


MATRIX = optimised("banded", 8, 3)


def test_users_take_turns_so_that_nobody_comes_back_too_soon():
    """40 users, every third step: groups of 13 or 14, in three steps each user once, and the fourth is the first."""
    settings = Round(sampling=1.0, clip=1.0, noise_multiplier=1.0, minimum=0, matrix=MATRIX)
    asked = [takes_part(settings, USERS, seed=5, number=s + 1, attempt=1, step=s) for s in range(4)]
    assert sorted(len(users) for users in asked[:3]) == [13, 13, 14]
    assert sorted(np.concatenate(asked[:3])) == list(range(USERS))
    np.testing.assert_array_equal(asked[3], asked[0])
    assert (groups(5, USERS, 3) != groups(6, USERS, 3)).any()


def test_a_clip_cannot_adapt_with_noise_that_spans_rounds():
    """Earlier rounds' noise was drawn for another clip."""
    with pytest.raises(ConfigError, match="quantile must be None with a matrix"):
        Round(sampling=1.0, clip=1.0, noise_multiplier=1.0, minimum=0, quantile=0.5, matrix=MATRIX)


@pytest.mark.parametrize("kind", ["independent", "banded", "blt"])
def test_one_user_moves_all_rounds_together_by_at_most_the_sensitivity(aggregator, tiny_examples, kind):
    """Without noise, with each of 40 users dropped: C times all sums moves by clip times sensitivity at most, and the
    one who moves it most comes within a tenth of that.
    """
    matrix, whole = optimised(kind, 8, 3), tiny_examples(USERS)
    c = np.array([np.roll(matrix.factor.column(8), place) for place in range(8)]).T
    moved = []
    with_all = _noiseless_run(*aggregator(whole, folder="whole", noise_multiplier=0.0, matrix=matrix)[:2])
    for user in range(USERS):
        without = whole.with_labels(whole.user_of_row != user)
        one, flat, _ = aggregator(without, folder=f"without-{user}", noise_multiplier=0.0, matrix=matrix)
        moved.append(np.linalg.norm(np.tril(c) @ (_noiseless_run(one, flat) - with_all)))
    assert max(moved) <= 0.1 * matrix.sensitivity * (1 + 1e-6)
    assert max(moved) > 0.9 * 0.1 * matrix.sensitivity


def _noiseless_run(aggregator, flat):
    """(8, p): all sums before noise, from the same weights each time."""
    aggregator._mechanism._ledger.spend = lambda *_, **__: None
    return np.array([aggregator.run_round(number, flat).sum for number in range(1, 9)])


def test_a_whole_horizon_is_paid_once_and_written_step_by_step(aggregator):
    """Eight rounds are eight entries that cost one mechanism; a ninth is refused."""
    one, flat, ledger = aggregator(matrix=MATRIX)
    for number in range(1, 9):
        one.run_round(number, flat)
    assert [(entry.step, entry.round, entry.attempt) for entry in ledger.entries] == [(s, s, 1) for s in range(1, 9)]
    assert ledger.spent() == epsilon([MATRIX.event(1.0)], 1e-3)
    with pytest.raises(BudgetExceeded, match="rounds must be at most the 8"):
        one.run_round(9, flat)


def test_a_round_tried_again_is_the_next_step_of_the_horizon(aggregator):
    """Its cohort is the next group, its noise a new row, and the ledger charges nothing more."""
    one, flat, ledger = aggregator(matrix=MATRIX)
    first, second = one.run_round(1, flat).sum, one.run_round(1, flat).sum
    assert [(entry.step, entry.round, entry.attempt) for entry in ledger.entries] == [(1, 1, 1), (2, 1, 2)]
    assert (first != second).all()
    assert ledger.spent() == epsilon([MATRIX.event(1.0)], 1e-3)


def test_a_matrix_mechanism_repeats_with_its_seed(aggregator):
    """The same eight sums to the last bit; with another seed none."""
    sums = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        one, flat, _ = aggregator(folder=folder, seed=seed, matrix=MATRIX)
        sums.append(np.array([one.run_round(number, flat).sum for number in range(1, 9)]))
    np.testing.assert_array_equal(sums[0], sums[1])
    assert (sums[0] != sums[2]).all()


# Asynchronous.

EAGER = Trace(
    classes=[
        {
            "name": "any",
            "share": 1.0,
            "startup_seconds": 10.0,
            "seconds_per_example": 1.0,
            "download_bytes_per_second": 1e6,
            "upload_bytes_per_second": 1e6,
            "dropout": 0.1,
            "spread": 1.5,
            "availability": [1.0] * 24,
        }
    ],
    time_zones=[{"utc_offset_hours": 0, "share": 1}],
    round_minutes=10,
)


def schedule(examples, *, updates=4, separation=5, oldest=5):
    """Of devices that are always there, some of them far slower than others."""
    return Schedule(
        fleet=Fleet.draw(EAGER, examples.users, 0),
        work=Work(steps=1, download_bytes=0, upload_bytes=0, deadline_s=1000.0),
        buffer=Buffer(updates, oldest),
        separation=separation,
        at_once=12,
        examples=np.diff(examples.offsets),
        seed=0,
    )


def test_a_flush_is_the_weighted_sum_of_updates_clipped_before_the_weight(tiny_model, tiny_examples):
    """Each user's update from the version it began at, clipped to 0.1, times 1 / sqrt(1 + staleness); nothing else."""
    examples = tiny_examples(USERS)
    engine = Engine.build(Network.build(tiny_model()), examples, LocalTraining(1, 0.5))
    plan, clip = schedule(examples), 0.1
    one = BufferedAggregator(
        engine, None, Round(1.0, clip, 0.0, 0, matrix=optimised("independent", 8, 5)), plan, seed=0
    )
    rng, versions, flights, stale = np.random.default_rng(0), [], Flights.none(USERS), 0
    for number in range(1, 9):
        versions.append(engine.side.flat() + rng.normal(0, 0.1, engine.size).astype(np.float32))
        released = one.run_round(number, versions[-1]).sum
        flights, flush = plan.flush(flights)
        expected = np.zeros(engine.size)
        for user, began in zip(flush.users, flush.began, strict=True):
            for (update,) in engine.updates(versions[began], np.array([user])):  # none of a user without examples
                norm = np.linalg.norm(update.astype(np.float64))
                expected += update * min(1.0, clip / norm) / np.sqrt(number - began)  # number - began = 1 + staleness
        np.testing.assert_allclose(released, expected, atol=1e-6)
        stale += int((flush.staleness > 0).sum())
    assert stale > 0


def test_all_flushes_of_a_horizon_are_paid_for_by_the_first(tiny_model, tiny_examples, tmp_path):
    """One entry a flush, its step among them, of the matrix mechanism whose rounds they are; then none is left."""
    examples = tiny_examples(USERS)
    engine = Engine.build(Network.build(tiny_model()), examples, LocalTraining(1, 0.5))
    matrix = optimised("banded", 3, 5)
    with Ledger.open(tmp_path, budget_epsilon=1e9, delta=1e-3) as ledger:
        one = BufferedAggregator(engine, ledger, Round(1.0, 0.1, 1.0, 0, matrix=matrix), schedule(examples), seed=0)
        for number in (1, 2, 3):
            one.run_round(number, engine.side.flat())
        assert [(entry.round, entry.step, entry.event) for entry in ledger.entries] == [
            (number, number, matrix.event(1.0)) for number in (1, 2, 3)
        ]
        with pytest.raises(BudgetExceeded):
            one.run_round(4, engine.side.flat())
        assert ledger.spent().epsilon == epsilon([matrix.event(1.0)], 1e-3).epsilon


def test_only_versions_that_somebody_still_trains_from_are_kept(tiny_model, tiny_examples):
    """Fewer than devices on the way, however many flushes there were; and the log has one line a flush."""
    examples = tiny_examples(USERS)
    engine = Engine.build(Network.build(tiny_model()), examples, LocalTraining(1, 0.5))
    one = BufferedAggregator(
        engine, None, Round(1.0, 0.1, 0.0, 0, matrix=optimised("independent", 40, 5)), schedule(examples), seed=0
    )
    for number in range(1, 41):
        one.run_round(number, engine.side.flat())
        assert len(one.state()["versions"]) <= 12
    assert len(one.log.time_s) == len(one.log.staleness) == len(one.log.lost) == 40
    assert 30 * 4 < int(one.log.updates.sum()) <= 40 * 4
