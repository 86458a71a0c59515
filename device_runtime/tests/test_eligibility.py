from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_runtime.eligibility import CONDITIONS, THERMAL, Decision, Readings, Reason, both, decide
from device_runtime.protocol import NEXT, OVER, Event, State, advance
from hybrid.plan import Policy

POLICY = Policy()  # charging, 30 % charge, idle, unmetered, nominal, 64 MiB, a day between, one a day
GOOD = Readings(
    consent=True, charging=True, battery=0.3, idle=True, metered=False, thermal="nominal", free_bytes=64 << 20
)
DAY_MS = 86_400_000
NOW = 1_700_000_000_000
ANYTHING = Policy(charging=False, battery=0, idle=False, unmetered=False, thermal="serious", free_mb=0)


def reasons(readings: Readings, policy: Policy = POLICY, history: tuple[int, ...] = ()) -> list[str]:
    return [str(reason) for reason in decide(policy, readings, history, NOW).reasons]


def test_a_device_that_meets_every_condition_exactly_may_take_part():
    """At 30 % of charge with 64 MiB free, and never before."""
    assert decide(POLICY, GOOD, (), NOW) == Decision(())
    assert decide(POLICY, GOOD, (), NOW).eligible


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"charging": False}, "not_charging"),
        ({"charging": None}, "charging_unknown"),
        ({"battery": 0.29}, "battery_low"),
        ({"battery": float("nan")}, "battery_low"),
        ({"battery": 30.0}, "battery_low"),
        ({"battery": None}, "battery_unknown"),
        ({"idle": False}, "in_use"),
        ({"idle": None}, "idle_unknown"),
        ({"metered": True}, "metered"),
        ({"metered": None}, "metered_unknown"),
        ({"thermal": "fair"}, "too_warm"),
        ({"thermal": "critical"}, "too_warm"),
        ({"thermal": "lukewarm"}, "too_warm"),
        ({"thermal": None}, "thermal_unknown"),
        ({"free_bytes": (64 << 20) - 1}, "low_space"),
        ({"free_bytes": None}, "space_unknown"),
        ({"consent": False}, "no_consent"),
    ],
    ids=str,
)
def test_each_reading_alone_speaks_against_it(change: dict[str, object], reason: str):
    """What is too little, and what the host cannot tell, are two words."""
    assert reasons(replace(GOOD, **change)) == [reason]


def test_without_consent_nothing_else_is_looked_at():
    """However much else speaks against it, or for it, and whatever the policy leaves out."""
    assert reasons(Readings()) == ["no_consent"]
    assert reasons(Readings(), ANYTHING, (NOW + 1,)) == ["no_consent"]


def test_what_a_host_cannot_tell_is_said_of_each_reading():
    """A host that knows nothing but the consent: every condition's word, in the table's order."""
    assert reasons(Readings(consent=True)) == [
        "charging_unknown",
        "battery_unknown",
        "idle_unknown",
        "metered_unknown",
        "thermal_unknown",
        "space_unknown",
    ]
    assert Readings(idle=False).unknown == ("charging", "battery", "metered", "thermal", "free_bytes")


def test_a_condition_that_a_policy_leaves_out_is_not_asked():
    """The warmth is: no policy allows a device that is about to stop for it."""
    assert reasons(Readings(consent=True, thermal="serious"), ANYTHING) == []
    assert reasons(Readings(consent=True, thermal="critical"), ANYTHING) == ["too_warm"]


@pytest.mark.parametrize(("allowed", "measured"), product(("nominal", "fair", "serious"), THERMAL))
def test_it_may_be_as_warm_as_the_policy_allows(allowed: str, measured: str):
    """By their order from cool to warm."""
    order = {"nominal": 0, "fair": 1, "serious": 2, "critical": 3}
    warm = reasons(replace(GOOD, thermal=measured), Policy(thermal=allowed))
    assert warm == (["too_warm"] if order[measured] > order[allowed] else [])


def test_separation_is_counted_from_the_last_participation():
    """One day to the millisecond."""
    twice = Policy(participations=10)
    assert reasons(GOOD, twice, (NOW - DAY_MS,)) == []
    assert reasons(GOOD, twice, (NOW - DAY_MS + 1,)) == ["too_soon"]
    assert reasons(GOOD, twice, (NOW - DAY_MS + 1, NOW - 9 * DAY_MS)) == ["too_soon"]
    assert reasons(GOOD, twice, (NOW,)) == ["too_soon"]


def test_participations_are_counted_over_the_period():
    """Three within ten seconds, no matter how they lie in it."""
    policy = Policy(separation_s=0, participations=3, period_s=10)
    within = (NOW - 9_999, NOW - 5_000, NOW)
    assert reasons(GOOD, policy, within) == ["too_often"]
    assert reasons(GOOD, policy, within[1:]) == []
    assert reasons(GOOD, policy, (NOW - 10_000, *within[1:])) == []


def test_a_clock_that_went_back_is_a_reason_of_its_own():
    """One millisecond is enough; the times before are no longer counted."""
    assert reasons(GOOD, POLICY, (NOW + 1, NOW)) == ["clock_behind"]


@given(
    st.builds(
        Readings,
        consent=st.just(True),
        charging=st.none() | st.booleans(),
        battery=st.none() | st.floats(0, 1),
        idle=st.none() | st.booleans(),
        metered=st.none() | st.booleans(),
        thermal=st.none() | st.sampled_from(THERMAL),
        free_bytes=st.none() | st.integers(0, 1 << 40),
    ),
    st.builds(Policy, charging=st.booleans(), idle=st.booleans(), unmetered=st.booleans(), battery=st.floats(0, 1)),
)
def test_knowing_less_never_makes_a_device_eligible(readings: Readings, policy: Policy):
    """Whatever a host says: where it falls silent about one thing, no reason goes but that thing's own."""
    known = decide(policy, readings, (), NOW)
    for condition in CONDITIONS:
        silent = decide(policy, replace(readings, **{condition.reading: None}), (), NOW)
        own = {condition.refused, condition.unknown}
        assert set(known.reasons) - own == set(silent.reasons) - own
        assert known.eligible or not silent.eligible


@given(st.lists(st.integers(0, 2 * NOW), max_size=8), st.integers(0, NOW))
def test_the_order_of_the_history_does_not_matter(history: list[int], now_ms: int):
    """A store may give it in any."""
    policy = Policy(separation_s=1e6, participations=2, period_s=1e7)
    assert decide(policy, GOOD, history, now_ms) == decide(policy, GOOD, sorted(history), now_ms)


def test_two_policies_hold_together():
    """A plan's and the host app's own: each reason once."""
    strict, lax = Decision((Reason.IN_USE, Reason.METERED)), Decision((Reason.METERED,))
    assert both(lax, strict).reasons == (Reason.METERED, Reason.IN_USE)
    assert both(Decision(), Decision()).eligible


LINES = {
    "idle": {"asked": "checked_in", "found": "ready", "ended": "dropped"},
    "checked_in": {"offered": "planned", "ended": "dropped"},
    "planned": {"begun": "training", "ended": "dropped"},
    "training": {"trained": "ready", "ended": "dropped"},
    "ready": {"sent": "uploading", "ended": "dropped"},
    "uploading": {"lost": "ready", "taken": "done", "ended": "dropped"},
    "done": {},
    "dropped": {},
}


@pytest.mark.parametrize(("state", "event"), product(State, Event))
def test_a_participation_goes_on_as_the_table_says_and_no_other_way(state: State, event: Event):
    """All 72 pairs, 14 of which lead on; written here a second time, by hand."""
    expected = LINES[state].get(event)
    if expected is None:
        with pytest.raises(ValueError, match=f"^a participation that is {state} cannot be {event}$"):
            advance(state, event)
    else:
        assert advance(state, event) == expected


def test_the_table_has_no_line_that_is_not_tested_above():
    """As many as are written there, and none out of an end."""
    assert len(NEXT) == sum(map(len, LINES.values())) == 14
    assert {state for state, _ in NEXT} | OVER == set(State)


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_whatever_happens_an_update_is_sent_only_after_it_was_kept(events: list[Event]):
    """Any walk, with refused events left out: it was ready before each attempt, and it ends for good.

    It trains at most once, and is done only after an attempt.
    """
    state, path = State.IDLE, [State.IDLE]
    for event in events:
        if (state, event) in NEXT:
            state = advance(state, event)
            path.append(state)
    for before, after in pairwise(path):
        assert before not in OVER
        assert after is not State.UPLOADING or before is State.READY
        assert after is not State.DONE or before is State.UPLOADING
    assert path.count(State.TRAINING) <= 1
