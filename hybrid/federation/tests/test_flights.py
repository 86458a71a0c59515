"""Who begins when, and in which flush an update is: numbers worked out by hand, and properties on random fleets."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import ConfigError
from hybrid.federation.buffer import Buffer
from hybrid.federation.fleet import Fleet, Trace, Work
from hybrid.federation.flights import LIMIT_S, TICK_S, Flights, Schedule


def trace(**changes):
    """One class of devices that are always there, take 1 s an example, and never drop out."""
    plain = {
        "name": "plain",
        "share": 1.0,
        "seconds_per_example": 1.0,
        "download_bytes_per_second": 1.0,
        "upload_bytes_per_second": 1.0,
        "dropout": 0.0,
        "availability": [1.0] * 24,
    }
    zones = [{"utc_offset_hours": 0, "share": 1}]
    return Trace(classes=[plain | changes], time_zones=zones, round_minutes=60)


def schedule(examples, *, updates, separation=1, at_once=100, oldest=10, deadline_s=math.inf, seed=0, **changes):
    """Devices with so many examples."""
    return Schedule(
        fleet=Fleet.draw(trace(**changes), len(examples), seed),
        work=Work(steps=1, download_bytes=0, upload_bytes=0, deadline_s=min(deadline_s, 1e9)),
        buffer=Buffer(updates, oldest),
        separation=separation,
        at_once=at_once,
        examples=np.asarray(examples),
        seed=seed,
    )


def flushes(plan, count):
    """The first so many."""
    flights, found = Flights.none(plan.fleet.users), []
    for _ in range(count):
        flights, flush = plan.flush(flights)
        found.append(flush)
    return found


def test_a_flush_happens_when_the_last_of_its_updates_comes_and_the_slow_come_to_a_later_one():
    """Of four that begin at the first tick, two take 3 s, one 7 and one 100: nobody waits for the last."""
    first, second = flushes(schedule([3, 100, 7, 3], updates=2, separation=1, oldest=1), 2)
    assert (sorted(first.users), first.time_s, first.staleness.tolist()) == ([0, 3], 3.0, [0, 0])
    # The other two have begun at version 0 and come to the second flush, one flush late.
    assert (second.users.tolist(), second.time_s, second.staleness.tolist()) == ([2, 1], 100.0, [1, 1])


def test_who_begins_after_a_flush_begins_at_the_version_after_it():
    """Devices with 3 examples, one place: each flush is of one update, which began after the flush before."""
    found = flushes(schedule([3, 3, 3], updates=1, at_once=1, oldest=0), 4)
    assert [flush.began.tolist() for flush in found] == [[0], [1], [2], [3]]
    assert [flush.time_s for flush in found] == [TICK_S * step + 3 for step in range(4)]


def test_an_update_that_is_too_stale_is_lost():
    """One takes 100 s, the others 3: after more flushes than are allowed its update is not taken."""
    plan = schedule([100, 3, 3, 3, 3], updates=1, separation=1, oldest=2)
    found = flushes(plan, 60)
    assert all(0 not in flush.users for flush in found if flush.time_s < 200)
    assert sum(flush.lost for flush in found) >= 1
    assert max(flush.staleness.max() for flush in found) <= 2


def test_a_device_that_is_slower_than_the_deadline_sends_nothing_and_frees_its_place():
    """Two places, one of them taken by a slow device for 10 s, again and again."""
    found = flushes(schedule([100, 3, 3], updates=1, at_once=2, deadline_s=10.0, oldest=1), 30)
    assert all(0 not in flush.users for flush in found)
    assert sum(flush.lost for flush in found) >= 3


@given(
    users=st.integers(1, 60),
    updates=st.integers(1, 12),
    separation=st.integers(1, 12),
    at_once=st.integers(1, 80),
    oldest=st.integers(0, 12),
    spread=st.floats(0, 2),
    dropout=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=150)
def test_nobody_is_in_two_flushes_that_are_closer_than_the_separation(
    users, updates, separation, at_once, oldest, spread, dropout, seed
):
    """Whatever the fleet is: sensitivity rests on it. And each flush is full or a day long, and nobody too stale."""
    if updates * (separation + oldest) > users:
        with pytest.raises(ConfigError, match=r"buffer x \(separation \+ max_staleness\) must be at most"):
            schedule(np.ones(users), updates=updates, separation=separation, oldest=oldest)
        return
    examples = np.random.default_rng(seed).integers(0, 40, users)
    plan = schedule(
        examples,
        updates=updates,
        separation=separation,
        at_once=at_once,
        oldest=oldest,
        seed=seed,
        spread=spread,
        dropout=dropout,
    )
    last = np.full(users, -separation)
    before = 0.0
    for flush in flushes(plan, 12):
        assert len(set(flush.users.tolist())) == len(flush.users) <= updates
        assert len(flush.users) == updates or flush.time_s >= before + LIMIT_S
        assert (flush.number - last[flush.users] >= separation).all()
        last[flush.users] = flush.number
        assert (flush.staleness >= 0).all()
        assert (flush.staleness <= oldest).all()
        assert flush.time_s >= before
        before = flush.time_s


def test_a_flush_to_which_nobody_comes_is_over_after_a_day():
    """Nobody is ever there: each is empty, and time goes on."""
    found = flushes(schedule([1, 1], updates=2, oldest=0, availability=[0.0] * 24), 2)
    assert [(len(flush.users), flush.time_s) for flush in found] == [(0, LIMIT_S), (0, 2 * LIMIT_S)]


def test_a_device_comes_again_only_after_the_last_flush_that_it_might_have_been_in():
    """One device, flushes of one update a day at most, two apart and one late: it begins at versions 0, 3, 6."""
    found = flushes(schedule([3, 3, 3], updates=1, separation=2, oldest=1, at_once=1), 9)
    for user in range(3):
        began = [int(flush.began[0]) for flush in found if flush.users.tolist() == [user]]
        assert np.diff(began).tolist() == [3, 3]


def test_it_goes_on_from_any_flush_as_it_would_have():
    """All that the next flush needs is in `Flights`."""
    plan = schedule(np.arange(40) % 7, updates=4, separation=3, oldest=5, spread=1.0, dropout=0.2)
    flights = Flights.none(40)
    for _ in range(5):
        flights, _ = plan.flush(flights)
    again = [plan.flush(flights)[1] for _ in range(2)]
    assert again[0].users.tolist() == again[1].users.tolist()
    assert again[0].time_s == again[1].time_s


def test_the_weight_of_an_update_is_one_where_it_is_fresh_and_never_more():
    """1 / sqrt(1 + staleness): 1, 1/2 after three flushes, 1/3 after eight."""
    buffer = Buffer(10)
    assert [buffer.weight(staleness) for staleness in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]


@pytest.mark.parametrize(("field", "value"), [("updates", 0), ("oldest", -1)])
def test_a_buffer_outside_its_range_is_refused(field, value):
    """By the field's name."""
    with pytest.raises(ConfigError, match=f"{field} must be at least"):
        Buffer(**{"updates": 1, field: value})
