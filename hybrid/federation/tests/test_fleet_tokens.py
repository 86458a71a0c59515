"""Tokens at a fleet's aggregator: one update of each."""

import shutil
from contextlib import contextmanager
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.blind_rsa import blind_sign
from hybrid.errors import CohortTooSmall, IssuerError
from hybrid.federation.aggregator import Round
from hybrid.federation.buffer import Buffer
from hybrid.federation.clock import ManualClock
from hybrid.federation.fleet_aggregator import FleetAggregator, Refused
from hybrid.federation.rounds import Answer, OpenSum, Uploads
from hybrid.federation.tests.test_fleet_aggregator import (
    FLAT,
    KEY,
    NOISY,
    QUIET,
    ROUND_S,
    SAID,
    TRUST,
    asking,
    body,
    name,
    task,
)
from hybrid.federation.tests.test_fleet_buffer import Scripted
from hybrid.plan import Local, TrainPlan, open_signed
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.matrix import optimised
from hybrid.tokens import TOKEN_BYTES, Window, encode_key, new_key

NEW = SAID.model_copy(update={"runtime": 3})
POOL = [new_key() for _ in range(4)]  # each takes a tenth of a second


class Issuer:
    """Opens windows, and gives tokens to anybody: who gets one is not the aggregator's to know."""

    def __init__(self):
        self.keys, self.turns, self.broken = {}, [], False
        self._pool = cycle(POOL)

    def open(self, turn):
        if self.broken:
            raise IssuerError("the issuer cannot be reached")
        self.turns.append(turn)
        scope, number = ("spring", len(self.turns)) if turn is None else (turn.training, turn.first_step)
        key = self.keys.setdefault((scope, number), next(self._pool))
        return Window(issuer="issuer.example", scope=scope, number=number, key=encode_key(key.public_key()).hex())

    def token(self, window):
        asked = window.ask()
        return window.finish(asked, blind_sign(self.keys[window.scope, window.number], asked.blinded))


def plan_of(aggregator):
    plan, _ = open_signed(aggregator.check_in(NEW).body, TRUST)
    return plan


def built(settings=QUIET, ledger=None, **fields):
    issuer, clock = Issuer(), ManualClock()
    return issuer, FleetAggregator(task(), settings, ledger, KEY, windows=issuer, clock=clock, **fields), clock


@contextmanager
def opened():
    """An aggregator in a round, its issuer, its plan and what comes of it."""
    issuer, aggregator, clock = built()
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
        yield issuer, aggregator, plan_of(aggregator), release


def test_an_update_with_a_token_of_its_window_is_counted_once_each_time_it_comes():
    """The token is before the update, and the same upload is answered as before."""
    with opened() as (issuer, aggregator, plan, release):
        sent = issuer.token(plan.token) + body(3, 4)
        assert aggregator.body_bytes(plan.id) == TOKEN_BYTES + len(body(3, 4)) == len(sent)
        assert [aggregator.upload(plan.id, name(1), sent).status for _ in range(3)] == [200, 200, 200]
    np.testing.assert_array_equal(release.result().sum, [3, 4])
    assert not aggregator.refused


def test_a_token_is_spent_once():
    """Under another id, with the same update or with another: refused and counted, and nothing says whose it was."""
    with opened() as (issuer, aggregator, plan, release):
        token = issuer.token(plan.token)
        assert aggregator.upload(plan.id, name(1), token + body(3, 4)).status == 200
        assert aggregator.upload(plan.id, name(2), token + body(3, 4)).status == 409
        assert aggregator.upload(plan.id, name(3), token + body(1, 1)).status == 409
        assert aggregator.upload(plan.id, name(1), token + body(1, 1)).status == 409
    np.testing.assert_array_equal(release.result().sum, [3, 4])
    assert aggregator.refused == {Refused.SPENT: 2, Refused.REPLAYED: 1}


def test_an_update_without_a_token_of_its_window_is_refused():
    """None, one of the round before, one of another issuer's key, and bytes that are none."""
    issuer, aggregator, clock = built()
    with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S):
        earlier = issuer.token(plan_of(aggregator).token)
    with clock.during(lambda: aggregator.run_round(2, FLAT), ROUND_S) as release:
        plan = plan_of(aggregator)
        forged = plan.token.ask().signed + bytes(256)
        other = Issuer()
        other.keys[plan.token.scope, plan.token.number] = POOL[-1]
        foreign = other.token(plan.token.model_copy(update={"key": encode_key(POOL[-1].public_key()).hex()}))
        for number, token in enumerate((earlier, forged, foreign, bytes(TOKEN_BYTES))):
            assert aggregator.upload(plan.id, name(number), token + body(1, 1)).status == 403
        assert aggregator.upload(plan.id, name(9), body(1, 1)).status == 400
    np.testing.assert_array_equal(release.result().sum, [0, 0])
    assert aggregator.refused == {Refused.FORGED: 4, Refused.MALFORMED: 1}


def test_a_refused_token_is_not_spent():
    """A full sum, or an update of another form, costs its sender nothing."""
    with opened() as (issuer, aggregator, plan, release):
        token = issuer.token(plan.token)
        assert aggregator.upload(plan.id, name(1), token + body(1, 1)[:-1]).status == 400
        assert aggregator.upload(plan.id, name(1), token + body(1, 1)).status == 200
    np.testing.assert_array_equal(release.result().sum, [1, 1])


def test_a_device_that_knows_no_tokens_is_given_no_plan_that_asks_for_one():
    with opened() as (_, aggregator, _, _):
        assert aggregator.check_in(SAID.model_copy(update={"runtime": 2})).status == 204
        assert aggregator.check_in(NEW).status == 200


def test_all_of_a_cohort_have_the_same_window_and_key():
    """The same signed bytes: an issuer that would tell devices by keys of their own is not asked for them."""
    with opened() as (_, aggregator, _, _):
        assert len({aggregator.check_in(NEW).body for _ in range(5)}) == 1


def test_each_attempt_is_a_window_of_its_own(tmp_path):
    """One that was withheld too: who spent its token in it may come to the next with another one. So are queries."""
    minimum = Round(sampling=1.0, clip=5.0, noise_multiplier=2.0, minimum=2)
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        issuer, aggregator, clock = built(minimum, ledger)
        with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
            first = plan_of(aggregator)
            aggregator.upload(first.id, name(1), issuer.token(first.token) + body(1, 1))
        with pytest.raises(CohortTooSmall):
            release.result()
        with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S) as release:
            second = plan_of(aggregator)
            for number in (1, 2):
                sent = issuer.token(second.token) + body(1, 1)
                assert aggregator.upload(second.id, name(10 + number), sent).status == 200
        assert release.result().received == 2
        with clock.during(asking(aggregator), ROUND_S):
            query = plan_of(aggregator)
    assert [plan.token.number for plan in (first, second, query)] == [1, 2, 3]
    assert issuer.turns == [None] * 3


def test_without_an_issuer_to_be_reached_no_device_is_asked(tmp_path):
    """Nothing is spent, and the round can be run again."""
    with Ledger.open(tmp_path, budget_epsilon=50, delta=1e-5) as ledger:
        issuer, aggregator, clock = built(NOISY, ledger)
        issuer.broken = True
        with pytest.raises(IssuerError):
            aggregator.run_round(1, FLAT)
        assert (aggregator.check_in(NEW).status, ledger.entries) == (204, [])
        issuer.broken = False
        with clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S):
            assert aggregator.check_in(NEW).status == 200


def turns(noise=0.0):
    return Round(1.0, 5.0, noise, 0, matrix=optimised("independent", 9, 3))


def test_where_devices_take_turns_the_window_is_the_step(tmp_path):
    """Of the horizon, and with its separation; a step that was not released is used up, and its window with it."""
    issuer, aggregator, clock = built(turns(), noise_state=tmp_path / "noise.state")
    for number in (1, 2):
        with clock.during(lambda number=number: aggregator.run_round(number, FLAT), ROUND_S):
            plan = plan_of(aggregator)
            assert (
                (plan.token.scope, plan.token.number)
                == (plan.turn.training, plan.turn.first_step)
                == (
                    issuer.turns[0].training,
                    number,
                )
            )


def test_a_step_that_a_crash_left_open_is_the_same_window_and_counts_a_token_once(tmp_path):
    """What was spent in it is forgotten, and the sum that it went into too: one release holds one update."""
    issuer, state = Issuer(), tmp_path / "noise.state"
    dying = FleetAggregator(task(), turns(), None, KEY, noise_state=state, windows=issuer, clock=ManualClock())
    with dying._clock.during(lambda: dying.run_round(1, FLAT), ROUND_S):
        plan = plan_of(dying)
        sent = issuer.token(plan.token) + body(3, 4)
        assert dying.upload(plan.id, name(1), sent).status == 200
        shutil.copy(state, tmp_path / "left.state")
    clock = ManualClock()
    after = FleetAggregator(
        task(), turns(), None, KEY, noise_state=tmp_path / "left.state", windows=issuer, clock=clock
    )
    with clock.during(lambda: after.run_round(1, FLAT), ROUND_S) as release:
        again = plan_of(after)
        assert again.token == plan.token
        assert after.upload(plan.id, name(1), sent).status == 404  # an honest device is told that its plan is gone
        assert after.upload(again.id, name(2), sent).status == 200
        assert after.upload(again.id, name(3), sent).status == 409
    np.testing.assert_array_equal(release.result().sum, [3, 4])


def test_a_token_that_was_spent_in_one_flush_is_spent_in_the_next(tmp_path):
    """Updates of one plan may be in several sums; its window ends with the last of them."""
    clock, issuer = Scripted(), Issuer()
    aggregator = FleetAggregator(
        task(wanted=1000),
        turns(),
        None,
        KEY,
        noise_state=tmp_path / "noise.state",
        buffer=Buffer(2, 2),
        windows=issuer,
        clock=clock,
    )
    tokens, found = [], {}

    def first():
        plan = found["plan"] = plan_of(aggregator)
        tokens.extend(issuer.token(plan.token) for _ in range(3))
        for number in (0, 1):
            assert aggregator.upload(plan.id, name(number), tokens[number] + body(1, 1)).status == 200

    def second():
        plan = found["plan"]
        assert aggregator.upload(plan.id, name(7), tokens[0] + body(1, 1)).status == 409
        assert aggregator.upload(plan.id, name(8), tokens[2] + body(1, 1)).status == 200

    clock.happens = first
    assert aggregator.run_round(1, FLAT).received == 2
    clock.happens = second
    assert aggregator.run_round(2, FLAT).received == 1
    assert (issuer.turns[0].last_step - issuer.turns[0].first_step, issuer.turns[1].first_step) == (2, 2)


@settings(max_examples=60, deadline=None)
@given(sent=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=30))
def test_however_uploads_come_each_token_is_in_the_sum_once(sent):
    """(upload, token) in any order: what is counted is each token's first upload whose id is new."""
    issuer = Issuer()
    local, about = Local(steps=1, lr=0.1), {"model": "m", "version": 1, "definition_hash": "ab" * 32}
    plan = TrainPlan(id="0" * 32, clip=5.0, parameters=2, expires_ms=10, local=local, token=issuer.open(None), **about)
    uploads, total = Uploads(plan), OpenSum(2)
    tokens = TOKENS.setdefault("tokens", [issuer.token(plan.token) for _ in range(4)])
    ids, spent = {}, {}
    for upload, token in sent:
        answer = uploads.take(name(upload), tokens[token] + body(token, 1), 0, total)
        if upload in ids:
            expected = Answer.REPEATED if ids[upload] == token else Answer.OTHER_BYTES
        else:
            expected = Answer.SPENT if token in spent else Answer.COUNTED
        assert answer is expected
        if answer is Answer.COUNTED:
            ids[upload] = spent[token] = token
    np.testing.assert_allclose(total.close().total, [sum(spent), len(spent)])


TOKENS = {}
