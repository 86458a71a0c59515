import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import (
    BudgetExceeded,
    CohortTooSmall,
    ConfigError,
    Halted,
    NotFound,
    PlanError,
    RoundEnded,
    RoundStopped,
)
from hybrid.federation.aggregator import Round
from hybrid.federation.buffer import Buffer
from hybrid.federation.clock import ManualClock
from hybrid.federation.fleet_aggregator import IDLE_S, Audience, FleetAggregator, Refused, Task
from hybrid.plan import CheckIn, Halt, Local, Policy, QueryPlan, TrainPlan, open_signed
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.matrix import optimised
from hybrid.query import Histogram, Labels, Query
from hybrid.update import head

KEY = Ed25519PrivateKey.generate()
TRUST = KEY.public_key()
ROUND_S = 60.0
FLAT = np.array([0.5, -1.0], np.float32)
SAID = CheckIn(model="kiosk", version=4, runtime=1)
QUIET = Round(sampling=1.0, clip=5.0, noise_multiplier=0.0, minimum=0)
NOISY = Round(sampling=0.5, clip=5.0, noise_multiplier=2.0, minimum=0)


def task(**fields):
    about = {"model": "kiosk", "version": 4, "definition_hash": "ab" * 32, "local": Local(steps=1, lr=0.1)}
    return Task(**about | {"parameters": 2, "round_s": ROUND_S, "wanted": 10} | fields)


def built(settings=QUIET, ledger=None, **fields):
    clock = ManualClock()
    return FleetAggregator(task(**fields), settings, ledger, KEY, clock=clock), clock


def body(*values):
    return head(len(values), "float32") + np.array(values, "<f4").tobytes()


def plan_of(aggregator):
    reply = aggregator.check_in(SAID)
    assert reply.status == 200
    plan, weights = open_signed(reply.body, TRUST)
    assert isinstance(plan, TrainPlan)
    return plan, weights


def name(number):
    return f"{number:032x}"


def test_who_checks_in_to_an_open_round_is_given_its_plan_and_weights():
    """All get the same signed bytes: as the task says, with the round's clip, sampling and end."""
    settings = Round(sampling=0.25, clip=0.5, noise_multiplier=0.0, minimum=0)
    aggregator, clock = built(settings, policy=Policy(separation_s=7), examples=(2, 9), upload="int8")
    begins_ms = clock.at_ms
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S):
        plan, weights = plan_of(aggregator)
        assert aggregator.check_in(SAID).body is aggregator.check_in(SAID).body
    np.testing.assert_array_equal(weights, FLAT)
    assert (plan.model, plan.version, plan.sampling, plan.clip, plan.upload) == ("kiosk", 4, 0.25, 0.5, "int8")
    assert (plan.policy.separation_s, plan.examples, plan.expires_ms) == (7, (2, 9), begins_ms + 60_000)


def test_a_round_releases_the_sum_of_what_came_before_its_end():
    aggregator, clock = built()
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
        plan, _ = plan_of(aggregator)
        assert aggregator.upload(plan.id, name(1), body(30, 40)).status == 200
        assert aggregator.upload(plan.id, name(2), body(1, 1)).status == 200
        assert aggregator.upload(plan.id, name(2), body(1, 1)).status == 200
    assert not aggregator.refused
    np.testing.assert_allclose(release.result().sum, [4, 5])
    assert aggregator.upload(plan.id, name(3), body(1, 1)).status == 410
    assert aggregator.upload(plan.id, name(2), body(1, 1)).status == 200  # it was counted, and still is
    assert aggregator.refused == {Refused.STALE: 1}


def test_each_attempt_has_a_plan_of_its_own_and_late_uploads_are_none_of_the_next():
    aggregator, clock = built()
    plans = []
    for number in (1, 2, 3):
        with clock.during(lambda number=number: aggregator.run_round(number, FLAT), ROUND_S) as release:
            plans.append(plan_of(aggregator)[0].id)
            aggregator.upload(plans[0], name(9), body(1, 1))
    assert len(set(plans)) == 3
    np.testing.assert_array_equal(release.result().sum, [0, 0])
    statuses = [aggregator.upload(plan, name(8), body(1, 1)).status for plan in [*plans, name(7)]]
    assert statuses == [410, 410, 410, 404]
    # The first round's repeat was known during the second round, and stale in the third.
    assert aggregator.refused == {Refused.STALE: 4, Refused.UNKNOWN_PLAN: 1}


def test_below_its_minimum_a_round_is_withheld_and_nothing_is_spent(tmp_path):
    """The next attempt is the first that is in the ledger; who sends what is not finite is counted like anybody."""
    settings = Round(sampling=1.0, clip=5.0, noise_multiplier=2.0, minimum=2)
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        aggregator, clock = built(settings, ledger)
        for sent in ([body(1, 1)], [body(1, 1), body(np.nan, 1)]):
            with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
                plan, _ = plan_of(aggregator)
                for number, content in enumerate(sent):
                    aggregator.upload(plan.id, name(number), content)
            if len(sent) == 1:
                with pytest.raises(CohortTooSmall):
                    release.result()
                assert ledger.entries == []
        assert release.result().received == 2
        assert [(entry.round, entry.attempt) for entry in ledger.entries] == [(1, 1)]


def test_a_round_run_again_is_another_attempt_with_other_noise(tmp_path):
    """Two entries for round 1; the noise, of standard deviation 2 x 5, is not the same, and not the seed's."""
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        aggregator, clock = built(NOISY, ledger)
        sums = []
        for _ in range(2):
            with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
                pass
            sums.append(release.result().sum)
        assert [(entry.round, entry.attempt, entry.sampling) for entry in ledger.entries] == [(1, 1, 0.5), (1, 2, 0.5)]
    assert np.abs(sums[0] - sums[1]).min() > 0
    assert np.abs(sums).max() < 100


def test_the_noise_of_a_fleet_has_the_declared_deviation(tmp_path):
    """4,000 weights, z = 2, clip 5: N(0, 10^2); within five deviations of the sample's own, 10 / sqrt(8000)."""
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        aggregator, clock = built(NOISY, ledger, parameters=4000)
        with clock.during(lambda: aggregator.run_round(1, np.zeros(4000, np.float32)), ROUND_S) as release:
            pass
    assert abs(release.result().sum.std() - 10) < 5 * 10 / np.sqrt(8000)


def test_a_round_over_budget_is_refused_and_not_released(tmp_path):
    with Ledger.open(tmp_path, budget_epsilon=0.01, delta=1e-5) as ledger:
        aggregator, clock = built(NOISY, ledger)
        with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
            pass
        with pytest.raises(BudgetExceeded):
            release.result()
        assert ledger.entries == []


def test_a_halt_reaches_who_checks_in_and_ends_the_round_unreleased(tmp_path):
    """Those with another version are not stopped; no round is opened afterwards, and nothing was spent."""
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        aggregator, clock = built(NOISY, ledger)
        with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
            aggregator.halt([3, 4], "it is wrong")
            with pytest.raises(Halted, match="version 4 was halted"):
                release.result(10)
        assert ledger.entries == []
        aggregator.stop("its process ends")  # which does not hide that it was halted
        with pytest.raises(Halted, match="no round is opened now: version 4 was halted"):
            aggregator.run_round(2, FLAT)
    message, _ = open_signed(aggregator.check_in(SAID).body, TRUST)
    assert message == Halt(model="kiosk", versions=(3, 4), reason="it is wrong")
    assert aggregator.check_in(SAID.model_copy(update={"version": 5})).status == 204


def test_an_aggregator_that_is_stopped_ends_its_round_and_opens_no_other():
    aggregator, clock = built()
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
        aggregator.stop("its process ends")
        for asked in (lambda: release.result(10), lambda: aggregator.run_round(2, FLAT)):
            with pytest.raises(RoundStopped, match="its process ends") as stopped:
                asked()
            assert not isinstance(stopped.value, Halted)


def test_one_round_is_ended_and_the_next_is_run(tmp_path):
    """What came is forgotten and what comes is refused; nothing is released or spent; ending it again says so."""
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        aggregator, clock = built(NOISY, ledger)
        with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
            plan, _ = plan_of(aggregator)
            assert aggregator.upload(plan.id, name(1), body(1, 1)).status == 200
            assert aggregator.open_plan == plan.id
            aggregator.end_plan(plan.id, "wrong clip")
            assert aggregator.check_in(SAID).status == 204
            assert aggregator.upload(plan.id, name(2), body(1, 1)).status == 410
            with pytest.raises(RoundEnded, match="wrong clip"):
                release.result(10)
        assert ledger.entries == []
        with pytest.raises(NotFound, match="it is over, or never was"):
            aggregator.end_plan(plan.id, "wrong clip")
        with clock.during(lambda: aggregator.run_round(2, FLAT), ROUND_S) as release:
            assert aggregator.upload(plan_of(aggregator)[0].id, name(3), body(1, 1)).status == 200
        assert release.result().received == 1


def test_with_a_buffer_all_that_waits_in_it_goes_with_the_plan(tmp_path):
    """Two of three updates wait; the flush after it is of the three that came later, 1 each, and closes with them."""
    settings = Round(1.0, 5.0, 0.0, 0, matrix=optimised("independent", 9, 3))
    buffer, clock = Buffer(updates=3, oldest=1), ManualClock()
    aggregator = FleetAggregator(
        task(), settings, None, KEY, noise_state=tmp_path / "noise.state", buffer=buffer, clock=clock
    )
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S):
        first, _ = plan_of(aggregator)
    for number in (1, 2):
        assert aggregator.upload(first.id, name(number), body(1, 1)).status == 200
    aggregator.end_plan(first.id, "wrong clip")
    assert aggregator.open_plan is None
    assert aggregator.upload(first.id, name(3), body(1, 1)).status == 410
    with clock.during(lambda: aggregator.run_round(2, FLAT), ROUND_S) as release:
        second, _ = plan_of(aggregator)
        for number in (4, 5, 6):
            assert aggregator.upload(second.id, name(number), body(1, 1)).status == 200
        np.testing.assert_allclose(release.result(10).sum, [3, 3])


def test_halted_training_gives_nobody_a_plan_until_it_is_resumed(tmp_path):
    """The open round ends unreleased, nothing is spent, no other is opened; then the same round is run."""
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        aggregator, clock = built(NOISY, ledger)
        with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
            plan, _ = plan_of(aggregator)
            aggregator.suspend("loss rose")
            assert (aggregator.suspended, aggregator.open_plan) == ("loss rose", None)
            reply = aggregator.check_in(SAID)
            assert (reply.status, reply.retry_after_s) == (204, IDLE_S)
            assert aggregator.upload(plan.id, name(1), body(1, 1)).status == 410
            with pytest.raises(RoundStopped, match="loss rose"):
                release.result(10)
        with pytest.raises(RoundStopped, match="no round is opened now: loss rose"):
            aggregator.run_round(1, FLAT)
        assert ledger.entries == []
        aggregator.resume()
        with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
            assert plan_of(aggregator)[0].id != plan.id
        assert release.result().received == 0
        assert [(entry.round, entry.attempt) for entry in ledger.entries] == [(1, 1)]


def test_who_has_another_model_or_version_is_given_nothing():
    aggregator, clock = built()
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S):
        for other in ({"version": 5}, {"model": "else"}):
            reply = aggregator.check_in(SAID.model_copy(update=other))
            assert (reply.status, reply.body, reply.retry_after_s) == (204, b"", IDLE_S)


def test_who_comes_too_late_for_a_round_comes_back_for_the_next():
    """From nine tenths of a round on; the next opens when it ends, and a small fleet comes in its first half."""
    aggregator, clock = built()
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S):
        clock.forward(53)
        assert aggregator.check_in(SAID).status == 200
        clock.forward(2)
        reply = aggregator.check_in(SAID)
        assert reply.status == 204
        assert 5 <= reply.retry_after_s <= 5 + ROUND_S / 2


def test_where_no_round_has_been_open_for_long_devices_stay_away_for_an_hour():
    aggregator, clock = built()
    assert aggregator.check_in(SAID).retry_after_s <= ROUND_S / 2
    clock.forward(10 * ROUND_S + 1)
    assert aggregator.check_in(SAID).retry_after_s == IDLE_S


def test_one_round_at_a_time():
    aggregator, clock = built()
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S), pytest.raises(ConfigError, match="open already"):
        aggregator.run_round(2, FLAT)


@pytest.mark.parametrize("flat", [np.zeros(3, np.float32), np.array([np.nan, 0], np.float32)])
def test_weights_that_are_none_open_no_round(flat):
    aggregator, _ = built()
    with pytest.raises(PlanError):
        aggregator.run_round(1, flat)
    assert aggregator.check_in(SAID).status == 204


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (Round(0.5, 1.0, 0.0, minimum=3), "minimum must be 0"),
        (Round(1.0, 1.0, 0.0, minimum=3, quantile=0.5, planned_cohort=9), "clip_quantile"),
        (Round(1.0, 1.0, 1.0, minimum=3), "without a ledger"),
    ],
)
def test_settings_that_no_fleet_can_keep_are_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        FleetAggregator(task(), settings, None, KEY)


# Queries

COUNT = Query(parts=(Labels(),), rows=5)  # norm 5
NEW = SAID.model_copy(update={"runtime": 2})
ABOUT = {"model": "kiosk", "version": 4, "definition_hash": "ab" * 32}


def asking(aggregator, query=COUNT, payload=None, *, noise=0.0, minimum=0, number=1):
    about = {"purpose": "analyze", "number": number, "noise_multiplier": noise, "minimum": minimum}
    return lambda: aggregator.ask(query, payload, **about)


def question_of(aggregator):
    plan, payload = open_signed(aggregator.check_in(NEW).body, TRUST)
    assert isinstance(plan, QueryPlan)
    return plan, payload


def test_a_query_is_a_round_between_those_of_a_training():
    """Answers are clipped to its own norm, an update of the round before is none of them; then training goes on."""
    aggregator, clock = built(policy=Policy(separation_s=7), seconds=9)
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S):
        training, _ = plan_of(aggregator)
    with clock.during(asking(aggregator), ROUND_S) as release:
        plan, _ = question_of(aggregator)
        assert aggregator.upload(plan.id, name(1), body(30, 40)).status == 200
        assert aggregator.upload(plan.id, name(2), body(1, 0)).status == 200
        assert aggregator.upload(training.id, name(3), body(1, 1)).status == 410
    assert (plan.query, plan.policy.separation_s, plan.seconds) == (COUNT, 7, 9)
    np.testing.assert_allclose(release.result().sum, [4, 4])
    assert release.result().received == 2
    with clock.during(lambda: aggregator.run_round(2, FLAT), ROUND_S) as after:
        aggregator.upload(plan_of(aggregator)[0].id, name(4), body(1, 1))
    np.testing.assert_allclose(after.result().sum, [1, 1])


def test_a_device_that_does_not_know_queries_is_given_none():
    """It is told when to come back, and is given the next round of the training."""
    aggregator, clock = built()
    with clock.during(asking(aggregator), ROUND_S):
        reply = aggregator.check_in(SAID)
        assert (reply.status, reply.body) == (204, b"")
        assert reply.retry_after_s is not None
        assert aggregator.check_in(NEW).status == 200
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S):
        assert aggregator.check_in(SAID).status == aggregator.check_in(NEW).status == 200


def test_a_query_is_in_the_ledger_by_its_purpose(tmp_path):
    """With its norm as the clip and nobody sampled; a second attempt at the same number is another entry."""
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        aggregator, clock = built(NOISY, ledger)
        for _ in range(2):
            with clock.during(asking(aggregator, noise=3.0), ROUND_S):
                pass
        found = [(e.purpose, e.round, e.attempt, e.noise_multiplier, e.sampling, e.clip) for e in ledger.entries]
    assert found == [("analyze", 1, 1, 3.0, 1.0, 5.0), ("analyze", 1, 2, 3.0, 1.0, 5.0)]


def test_below_its_minimum_a_query_is_withheld_and_nothing_is_spent(tmp_path):
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        aggregator, clock = built(NOISY, ledger)
        with clock.during(asking(aggregator, noise=3.0, minimum=2), ROUND_S) as release:
            aggregator.upload(question_of(aggregator)[0].id, name(1), body(1, 0))
        with pytest.raises(CohortTooSmall):
            release.result()
        assert ledger.entries == []


def test_an_aggregator_without_a_training_asks_queries():
    """Its audience is asked, payload and all; there is nothing to train."""
    clock = ManualClock()
    aggregator = FleetAggregator(Audience(**ABOUT, round_s=ROUND_S, wanted=10), None, None, KEY, clock=clock)
    spread, payload = COUNT.model_copy(update={"spread": (1.0,)}), np.array([0.5, 0.25, 0], np.float32)
    with clock.during(asking(aggregator, spread, payload), ROUND_S) as release:
        plan, found = question_of(aggregator)
        aggregator.upload(plan.id, name(1), body(0.75))
    assert (found.tolist(), release.result().sum.tolist()) == ([0.5, 0.25, 0], [0.75])
    with pytest.raises(ConfigError, match="only asks queries"):
        aggregator.run_round(1, FLAT)
    with pytest.raises(ConfigError, match="task and settings go together"):
        FleetAggregator(task(), None, None, KEY)


def test_a_payload_that_is_none_of_the_query_opens_no_round():
    aggregator, _ = built()
    with pytest.raises(PlanError, match="0 finite numbers"):
        asking(aggregator, payload=np.zeros(3, np.float32))()
    assert aggregator.check_in(NEW).status == 204


def test_a_halt_ends_a_query_too():
    aggregator, clock = built()
    with clock.during(asking(aggregator), ROUND_S) as release:
        aggregator.halt([4], "it is wrong")
        with pytest.raises(Halted):
            release.result(10)


def test_beside_a_buffer_no_query_is_asked(tmp_path):
    """Whose flushes go on between rounds."""
    settings = Round(1.0, 5.0, 0.0, 0, matrix=optimised("independent", 9, 3))
    file, buffer = tmp_path / "noise.state", Buffer(updates=2, oldest=1)
    aggregator = FleetAggregator(task(), settings, None, KEY, noise_state=file, buffer=buffer)
    with pytest.raises(ConfigError, match="buffer must be None"):
        asking(aggregator)()


REPLIES = st.one_of(
    st.lists(st.floats(width=32), min_size=2, max_size=2).map(lambda pair: body(*pair)),
    st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=2).map(
        lambda bits: head(2, "float32") + struct.pack("<2I", *bits)
    ),
    st.binary(max_size=40),
    st.integers(0, 40).map(lambda size: head(2, "float32") + b"\xff" * size),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(REPLIES, max_size=4), st.sampled_from([None, 0.25]))
def test_one_device_moves_a_released_sum_by_its_bound_at_most(replies, clip):
    """Whatever it sends, under one id: any numbers, any bits, too much, too little; another's answer stays whole."""
    aggregator, clock = built()
    query = COUNT.model_copy(update={"clip": clip})
    with clock.during(asking(aggregator, query), ROUND_S) as release:
        plan, _ = question_of(aggregator)
        aggregator.upload(plan.id, name(1), body(0, 0.125))
        for reply in replies:
            aggregator.upload(plan.id, name(2), reply)
    moved = np.linalg.norm(release.result().sum - [0, 0.125])
    assert moved <= query.norm * (1 + 1e-12)


JOURNALS = Query(parts=(Histogram(column="left", edges=(0.5,)),), week="2026-W47")
REPORTS = CheckIn(model="kiosk", runtime=4)


def test_a_query_about_journals_is_for_who_comes_to_report_whatever_version_it_has():
    """And no other plan is: neither a training's nor a query's; a device that knows no weeks is given none."""
    aggregator, clock = built()
    with clock.during(asking(aggregator, JOURNALS), ROUND_S):
        plan, _ = open_signed(aggregator.check_in(REPORTS).body, TRUST)
        assert plan.query == JOURNALS
        for said in (SAID, NEW, NEW.model_copy(update={"runtime": 4}), REPORTS.model_copy(update={"runtime": 3})):
            assert aggregator.check_in(said).status == 204
        assert aggregator.check_in(REPORTS.model_copy(update={"model": "other"})).status == 204
    for other in (asking(aggregator), lambda: aggregator.run_round(1, FLAT)):
        with clock.during(other, ROUND_S):
            assert aggregator.check_in(REPORTS).status == 204
            assert aggregator.check_in(NEW).status == 200
