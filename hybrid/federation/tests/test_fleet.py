import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import ConfigError
from hybrid.federation.fleet import (
    HOUR,
    PHONES,
    Fleet,
    Tally,
    Trace,
    Work,
    _splitmix64,
    finishing,
    over_selection,
    turnout,
)

ALWAYS = [1.0] * 24
NIGHT = [0.5] * 7 + [0.1] * 15 + [0.5] * 2  # from 23:00 to 06:00 a half, from 07:00 to 21:00 a tenth
WORK = Work(steps=2, download_bytes=1000, upload_bytes=1000, deadline_s=10.0)


def device_class(**changes):
    """A class whose devices are always there, never drop out and are equally fast."""
    plain = {
        "name": "plain",
        "share": 1.0,
        "seconds_per_example": 0.5,
        "download_bytes_per_second": 500,
        "upload_bytes_per_second": 250,
        "dropout": 0.0,
        "availability": ALWAYS,
    }
    return plain | changes


def trace(*classes, **changes):
    """A trace of these classes, in UTC, with a round each hour from midnight."""
    plain = {
        "classes": list(classes) or [device_class()],
        "time_zones": [{"utc_offset_hours": 0, "share": 1}],
        "round_minutes": 60,
    }
    return Trace(**plain | changes)


def attend(fleet, number=1, seed=0, sampling=1.0, work=WORK, examples=None):
    """One round, its coins and drop-outs by a seed."""
    rng = np.random.default_rng([seed, number])
    coins = rng.random(fleet.users)
    examples = np.ones(fleet.users, np.int64) if examples is None else examples
    return fleet.round(number, coins, sampling=sampling, work=work, examples=examples, rng=rng)


# The trace and its file.


def test_the_phones_of_this_package_are_a_trace():
    """It loads; most of its fleet is away at noon, and three to five times as many are there at the peak."""
    phones = Trace.load(PHONES)
    shares = np.array([one.share for one in phones.classes])
    day = phones.available_share(np.arange(24) * HOUR) @ shares
    assert day.max() < 0.5
    assert 3 < day.max() / day.min() < 5


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        (
            "dropout = 0.05 ",
            "dropout = 1.5 ",
            r"phones.toml: Trace.classes.0.dropout: .* less than or equal to 1, got 1.5",
        ),
        ("share = 0.5\n", "share = 0.6\n", r"phones.toml: Trace: the shares of classes must sum to 1, got 1.1"),
        ("0.20, 0.23, 0.24, 0.24,", "0.24,", r"phones.toml: Trace.classes.2.availability: .* at least 24 items"),
        ("round_minutes = 10.0", "round_minutes = 0", r"phones.toml: Trace.round_minutes: .* greater than 0, got 0"),
        ("start_hour = 0.0", "start_hour = nan", r"phones.toml: Trace.start_hour: .*finite number, got nan"),
        ("start_hour", "start_our", r"phones.toml: Trace.start_our: Extra inputs are not permitted"),
        ('"slow"', '"fast"', r"phones.toml: Trace: classes must have distinct names, got \['fast', 'middle', 'fast'\]"),
        ("= -8.0", "= -13.0", r"phones.toml: Trace.time_zones.0.utc_offset_hours: .* or equal to -12, got -13.0"),
        ("habit = 0.6", "habit =", r"phones.toml must be TOML: .*line"),
    ],
)
def test_a_wrong_trace_fails_with_the_file_the_field_and_what_it_must_be(tmp_path, written, instead, message):
    """The phones with one thing written otherwise: the message names it."""
    file = tmp_path / "phones.toml"
    text = PHONES.read_text()
    assert written in text
    file.write_text(text.replace(written, instead))
    with pytest.raises(ConfigError, match=message):
        Trace.load(file)


def test_a_trace_that_is_not_there_is_a_config_error(tmp_path):
    """The message names the file."""
    with pytest.raises(ConfigError, match=r"trace '.*none.toml' must be a readable file, got FileNotFoundError"):
        Trace.load(tmp_path / "none.toml")


def test_availability_is_that_of_each_full_hour_and_linear_in_between():
    """0.2 at 00:00 and 0.6 at 01:00: 0.4 at 00:30; 0.8 at 23:00: 0.5 at 23:30; days repeat."""
    curve = [0.2, 0.6, *[0.0] * 21, 0.8]
    share = trace(device_class(availability=curve)).available_share(np.array([0, 0.5, 1, 23, 23.5, 24.5]) * HOUR)
    np.testing.assert_allclose(share[:, 0], [0.2, 0.4, 0.6, 0.8, 0.5, 0.4])


def test_each_time_zone_has_its_own_hour():
    """At 08:00 UTC it is 00:00 for a quarter (curve 1), 13:30 for the others (half-way to 0.4): 0.25 + 0.75 x 0.2."""
    zones = [{"utc_offset_hours": -8, "share": 0.25}, {"utc_offset_hours": 5.5, "share": 0.75}]
    curve = [1.0, *[0.0] * 13, 0.4, *[0.0] * 9]
    away = trace(device_class(availability=curve), time_zones=zones)
    np.testing.assert_allclose(away.available_share([8 * HOUR]), [[0.4]])


def test_rounds_start_by_the_clock():
    """From 22:30, every 20 minutes: round 1 at 81,000 s, round 7 two hours later."""
    late = trace(start_hour=22.5, round_minutes=20)
    assert (late.start_s(1), late.start_s(7)) == (81_000, 88_200)


# Who finishes.


def test_whoever_is_there_and_whose_coin_falls_finishes_if_and_only_if_its_work_fits():
    """Down 1000/500 = 2 s, up 1000/250 = 4 s, 2 steps x 0.5 s an example: 4 examples take 10 s, 5 take 11 s."""
    fleet = Fleet.draw(trace(), 6, seed=1)
    attendance = fleet.round(
        1,
        np.array([0.0, 0.49, 0.5, 0.9, 0.1, 0.2]),
        sampling=0.5,
        work=WORK,
        examples=np.array([0, 4, 4, 0, 5, 4]),
        rng=np.random.default_rng(0),
    )
    assert attendance.selected.tolist() == [0, 1, 4, 5]
    assert attendance.finished.tolist() == [0, 1, 5]


def test_a_round_lasts_until_its_deadline_whoever_came():
    """It closes by the clock: 10 s, though every device is done after 7, and with no device as well."""
    for users in (0, 5):
        assert attend(Fleet.draw(trace(), users, seed=1)).seconds == 10.0


def test_start_up_counts():
    """1 s to start, 6 s of network, 3 examples in 3 s: in time; with 2 s to start it is not."""
    for startup, finished in ((1.0, 1), (2.0, 0)):
        fleet = Fleet.draw(trace(device_class(startup_seconds=startup)), 1, seed=1)
        assert len(attend(fleet, examples=np.array([3])).finished) == finished


def test_slowness_is_log_normal_with_median_one():
    """Of 100,000 devices with spread 0.5: the logarithm has mean 0 +- 4 x 0.5/sqrt(n), sd 0.5 +- 4 x 0.5/sqrt(2n)."""
    n = 100_000
    logarithm = np.log(Fleet.draw(trace(device_class(spread=0.5)), n, seed=2).slowness)
    assert logarithm.mean() == pytest.approx(0, abs=4 * 0.5 / math.sqrt(n))
    assert logarithm.std() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * n))


def test_the_share_that_drops_out_is_the_class_s():
    """Of 100,000 selected 30 % are lost, +- 4 sd; a class that always drops out never finishes."""
    n = 100_000
    lost = n - len(attend(Fleet.draw(trace(device_class(dropout=0.3)), n, seed=2)).finished)
    assert lost == pytest.approx(0.3 * n, abs=4 * math.sqrt(n * 0.3 * 0.7))
    assert len(attend(Fleet.draw(trace(device_class(dropout=1.0)), n, seed=2)).finished) == 0


def test_shares_of_classes_and_time_zones_are_those_of_the_trace():
    """Of 100,000 devices a fifth is of the second class, and a quarter of either class of the first zone, +- 4 sd."""
    n = 100_000
    zones = [{"utc_offset_hours": -8, "share": 0.25}, {"utc_offset_hours": 1, "share": 0.75}]
    fleet = Fleet.draw(
        trace(device_class(share=0.8), device_class(name="other", share=0.2), time_zones=zones), n, seed=4
    )
    others = fleet.device_class == 1
    assert others.sum() == pytest.approx(0.2 * n, abs=4 * math.sqrt(n * 0.2 * 0.8))
    for of_class in (others, ~others):
        there = (fleet.time_zone[of_class] == 0).sum()
        assert there == pytest.approx(0.25 * of_class.sum(), abs=4 * math.sqrt(of_class.sum() * 0.25 * 0.75))


# When devices are there.


def test_at_every_hour_the_share_that_is_available_is_the_curve():
    """50,000 devices, 48 hours and half hours, with and without habits: each within 4 sd of the trace."""
    n, all_of_them = 50_000, np.arange(50_000)
    curve = [0.3 + 0.25 * math.cos(2 * math.pi * (hour - 2) / 24) for hour in range(24)]
    for habit in (0.0, 0.7):
        fleet = Fleet.draw(trace(device_class(availability=curve), habit=habit), n, seed=5)
        for time_s in np.arange(0, 48, 1.5) * HOUR:
            p = fleet.trace.available_share(time_s).item()
            there = fleet.available(all_of_them, time_s).sum()
            assert there == pytest.approx(n * p, abs=4 * math.sqrt(n * p * (1 - p))), time_s


def test_a_phone_that_charges_overnight_stays_there_past_midnight():
    """From 23:00 to 06:00 the very same devices are there, among them all that were there at noon before."""
    everybody = np.arange(10_000)
    fleet = Fleet.draw(trace(device_class(availability=NIGHT)), len(everybody), seed=6)
    evening = fleet.available(everybody, 23 * HOUR)
    for hour in (23.5, 24, 24.1, 27, 30):
        np.testing.assert_array_equal(fleet.available(everybody, hour * HOUR), evening)
    noon = fleet.available(everybody, 12 * HOUR)
    assert noon.any()
    assert evening[noon].all()


@pytest.mark.parametrize(("habit", "both"), [(0.0, 0.25), (0.5, 0.3125), (1.0, 0.5)])
def test_habit_brings_the_same_phones_back(habit, both):
    """A half are there a night; two nights: 1/4 if drawn anew, 1/2 if by habit; by habit on half the days, 1/4 of the
    pairs of days are: 1/4 x 1/2 + 3/4 x 1/4."""
    n = 50_000
    fleet = Fleet.draw(trace(device_class(availability=NIGHT), habit=habit), n, seed=7)
    first, second = (fleet.available(np.arange(n), (24 * day + 2) * HOUR) for day in (3, 4))
    assert (first & second).sum() == pytest.approx(both * n, abs=4 * math.sqrt(n * both * (1 - both)))


def test_availability_is_a_function_of_device_and_time_alone():
    """Asked for some devices, in another order, later or again, each answers as it did."""
    fleet = Fleet.draw(Trace.load(PHONES), 5_000, seed=8)
    whole = fleet.available(np.arange(5_000), 30 * HOUR)
    fleet.available(np.arange(5_000), 90 * HOUR)
    some = np.array([4_321, 17, 900])
    np.testing.assert_array_equal(fleet.available(some, 30 * HOUR), whole[some])


def test_days_are_drawn_by_splitmix64():
    """The outputs that are published for the seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _splitmix64(np.uint64(1234567), np.arange(1, 4)).tolist() == published


# Repeatability and privacy.


def test_a_seed_repeats_a_fleet_and_its_rounds_and_another_does_not():
    """The same columns and attendances to the last bit; another seed gives others."""
    phones = Trace.load(PHONES)
    one, again, other = (Fleet.draw(phones, 2_000, seed) for seed in (9, 9, 10))
    for column in fields(Fleet)[1:-1]:
        np.testing.assert_array_equal(getattr(one, column.name), getattr(again, column.name))
    alike = [Fleet.draw(trace(device_class(availability=NIGHT)), 2_000, seed) for seed in (9, 10)]
    there, elsewhere = (fleet.available(np.arange(2_000), 0.0) for fleet in alike)  # differ in their days alone
    assert there.tolist() != elsewhere.tolist()
    for number in (1, 50, 200):
        first, second, third = (attend(fleet, number) for fleet in (one, again, other))
        np.testing.assert_array_equal(first.selected, second.selected)
        np.testing.assert_array_equal(first.finished, second.finished)
        assert first.selected.tolist() != third.selected.tolist()


def test_no_device_takes_part_with_a_higher_probability_than_is_charged():
    """400 rounds at q = 0.2: nobody more than 80 + 5 sd of 8 times; those always there 80 in the mean, +- 4 sd."""
    rounds, q = 400, 0.2
    fleet = Fleet.draw(
        trace(device_class(share=0.5), device_class(name="nightly", share=0.5, availability=NIGHT), habit=0.6),
        500,
        seed=11,
    )
    counts = np.zeros(500)
    for number in range(1, rounds + 1):
        counts[attend(fleet, number, sampling=q).selected] += 1
    sd = math.sqrt(rounds * q * (1 - q))
    assert counts.max() <= rounds * q + 5 * sd
    always = counts[fleet.device_class == 0]
    assert always.mean() == pytest.approx(rounds * q, abs=4 * sd / math.sqrt(len(always)))


def test_one_person_decides_nobody_else_s_attendance():
    """Another number of examples, or another coin, of one user leaves everybody else where they were."""
    fleet = Fleet.draw(Trace.load(PHONES), 3_000, seed=12)
    coins, examples = np.random.default_rng(0).random(3_000), np.full(3_000, 20)
    work = Work(steps=2, download_bytes=300_000, upload_bytes=25_000, deadline_s=30)

    def finished(coins, examples):
        rng = np.random.default_rng(1)
        return fleet.round(1, coins, sampling=0.5, work=work, examples=examples, rng=rng).finished

    before = finished(coins, examples)
    user = before[len(before) // 2]
    away, busy = coins.copy(), examples.copy()
    away[user], busy[user] = 0.99, 10**9
    expected = before[before != user]
    np.testing.assert_array_equal(finished(away, examples), expected)
    np.testing.assert_array_equal(finished(coins, busy), expected)


def test_the_exact_count_beside_the_sum_would_break_what_is_charged():
    """Why counts are oracle. Everybody else contributes +1, one person -1 or, zeroed, 0; clip 1, z = 1, q = 0.05. The
    sum less the count is noise, and where that person's coin fell -2 or -1: whatever N, at epsilon 1 the event "below
    -3.5" needs a delta of 2.1e-3, where Poisson sampling is charged 1.2e-5."""
    q, e = 0.05, math.e

    def below(x, mean):
        return 0.5 * math.erfc((mean - x) / math.sqrt(2))

    with_person, zeroed = ((1 - q) * below(-3.5, 0) + q * below(-3.5, mean) for mean in (-2, -1))
    assert with_person - e * zeroed == pytest.approx(2.1e-3, rel=0.02)
    above = 0.5 + math.log((e - (1 - q)) / q)  # where the likelihood ratio of (1-q) N(0,1) + q N(1,1) to N(0,1) is e
    charged = (1 - q - e) * below(-above, 0) + q * below(1 - above, 0)
    assert charged == pytest.approx(1.2e-5, rel=0.02)


PHONE_FLEET = Fleet.draw(Trace.load(PHONES), 400, seed=13)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    number=st.integers(1, 10_000),
    sampling=st.floats(0.01, 1.0),
    deadline_s=st.floats(1.0, 300.0),
)
def test_the_finished_are_among_the_selected_who_are_available_and_whose_coin_fell(seed, number, sampling, deadline_s):
    """And longer deadlines and more sampling lose nobody."""
    rng = np.random.default_rng(seed)
    coins, examples = rng.random(400), rng.integers(0, 100, 400)

    def attendance(sampling, deadline_s):
        work = Work(steps=3, download_bytes=10**6, upload_bytes=10**5, deadline_s=deadline_s)
        drops = np.random.default_rng(seed)
        return PHONE_FLEET.round(number, coins, sampling=sampling, work=work, examples=examples, rng=drops)

    one = attendance(sampling, deadline_s)
    fell = np.flatnonzero(coins < sampling)
    there = PHONE_FLEET.available(fell, one.start_s)
    assert one.selected.tolist() == fell[there].tolist()
    assert set(one.finished) <= set(one.selected)
    assert set(one.finished) <= set(attendance(sampling, 2 * deadline_s).finished)
    assert set(one.finished) <= set(attendance(min(1, 2 * sampling), deadline_s).finished)


# Over-selection.


def test_the_probability_to_finish_is_worked_out_from_the_trace():
    """A half there, a fifth lost, 8 s for the median and a deadline one sd of the logarithm above it: 0.5 x 0.8 x
    0.841345."""
    late = trace(device_class(availability=[0.5] * 24, dropout=0.2, spread=0.5))
    work = Work(steps=2, download_bytes=1000, upload_bytes=1000, deadline_s=8.0 * math.exp(0.5))
    np.testing.assert_allclose(finishing(late, rounds=[1], work=work, examples=2), [0.5 * 0.8 * 0.841345], rtol=1e-6)


def test_the_probability_to_finish_is_the_mean_over_rounds_and_examples():
    """At 00:00 a half is there, at 12:00 a tenth; 4 examples fit in 10 s and 5 do not: 0.3 x 1/2."""
    hourly = trace(device_class(availability=NIGHT))
    np.testing.assert_allclose(finishing(hourly, rounds=[1, 13], work=WORK, examples=[4, 5]), [0.15])


def test_over_selection_is_the_wanted_over_those_who_would_finish():
    """A quarter of 1,000 would finish: for 100 the coin is 0.4; for 300 it is 1, capped, and 250 are expected."""
    quarter = trace(device_class(availability=[0.5] * 24, dropout=0.5))
    enough = over_selection(quarter, users=1000, wanted=100, rounds=[1], work=WORK, examples=1)
    assert (enough.sampling, enough.expected, enough.capped) == (0.4, 100, False)
    few = over_selection(quarter, users=1000, wanted=300, rounds=[1], work=WORK, examples=1)
    assert (few.sampling, few.expected, few.capped) == (1.0, 250, True)


@pytest.mark.parametrize("number", [1, 60, 110])
def test_over_selection_hits_the_wanted_cohort(number):
    """Of 200,000 phones with 20 examples each 2,000 finish, +- 4 sd, by night and by day."""
    phones, users, wanted = Trace.load(PHONES), 200_000, 2_000
    work = Work(steps=5, download_bytes=300_000, upload_bytes=25_000, deadline_s=40)
    plan = over_selection(phones, users=users, wanted=wanted, rounds=[number], work=work, examples=20)
    assert not plan.capped
    attendance = attend(
        Fleet.draw(phones, users, seed=14), number, sampling=plan.sampling, work=work, examples=np.full(users, 20)
    )
    assert len(attendance.finished) == pytest.approx(wanted, abs=4 * math.sqrt(wanted))


def test_over_selection_for_a_whole_day_is_met_in_the_mean_of_the_day():
    """144 rounds from midnight to midnight: 300 a round in the mean, +- 4 standard errors over the 20,000 devices."""
    phones, users, wanted, day = Trace.load(PHONES), 20_000, 300, range(1, 145)
    work = Work(steps=5, download_bytes=300_000, upload_bytes=25_000, deadline_s=40)
    plan = over_selection(phones, users=users, wanted=wanted, rounds=day, work=work, examples=20)
    fleet, times = Fleet.draw(phones, users, seed=15), np.zeros(users)
    for number in day:
        times[attend(fleet, number, sampling=plan.sampling, work=work, examples=np.full(users, 20)).finished] += 1
    error = math.sqrt(users) * times.std() / len(day)
    assert times.sum() / len(day) == pytest.approx(wanted, abs=4 * error)
    assert error < 0.05 * wanted


# What is refused.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Work(0, 1, 1, 1.0), "steps must be at least 1, got 0"),
        (lambda: Work(1, 1, -1, 1.0), "upload_bytes must be at least 0, got -1"),
        (lambda: Work(1, 1, 1, math.inf), "deadline_s must be finite and > 0, got inf"),
        (lambda: attend(PHONE_FLEET, sampling=0.0), r"sampling in \(0, 1\], got 1 and 0.0"),
        (lambda: attend(PHONE_FLEET, number=0), "round must be >= 1 .* got 0"),
        (lambda: attend(PHONE_FLEET, examples=np.ones(399)), r"examples must have shape \(400,\), got \(399,\)"),
        (
            lambda: attend(PHONE_FLEET, work=Work(1, 1, 1, 601.0)),
            "deadline_s must be at most 600, the trace's round_minutes, got 601",
        ),
        (
            lambda: over_selection(trace(), users=9, wanted=1, rounds=[1], work=WORK, examples=5),
            "deadline_s must be long enough for some device of the trace to finish, got 10: none does",
        ),
        (
            lambda: over_selection(trace(), users=9, wanted=0, rounds=[1], work=WORK, examples=1),
            "wanted .* got 9 and 0",
        ),
        (
            lambda: turnout(PHONE_FLEET, [], sampling=1, expected=[0, 0, 0], examples=np.ones(400)),
            "tallies must be of at least one round, got none",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_range(call, message):
    """Each message names the setting, what it must be and what it got."""
    with pytest.raises(ConfigError, match=message):
        call()


# The report.


def test_a_turnout_sums_up_rounds():
    """Fast phones hold 3 rows and always finish, slow ones 5 and never: all the slow that are selected are lost."""
    both = trace(device_class(name="fast", share=0.5), device_class(name="slow", share=0.5, startup_seconds=100.0))
    fleet = Fleet.draw(both, 1_000, seed=16)
    fast = fleet.device_class == 0
    examples = np.where(fast, 3, 5)
    attendances = [attend(fleet, number, sampling=0.5, examples=examples) for number in (1, 2)]
    expected = finishing(both, rounds=[1, 2], work=WORK, examples=4)
    report = turnout(
        fleet,
        [Tally.of(fleet, one, examples) for one in attendances],
        sampling=0.5,
        expected=expected,
        examples=examples,
    )
    selected = np.concatenate([one.selected for one in attendances])
    of_fast, of_slow = fast[selected].sum(), (~fast)[selected].sum()
    assert report.rounds == 2
    assert report.oracle_selected == len(selected) / 2
    assert report.oracle_finished == of_fast / 2
    assert report.oracle_lost == pytest.approx(of_slow / len(selected))
    assert report.oracle_examples == pytest.approx((3 * fast.sum() + 5 * (~fast).sum()) / 1_000)
    assert report.oracle_examples_finished == 3
    first, second = report.oracle_by_class
    assert (first.name, first.share, first.selected, first.finished) == ("fast", fast.mean(), of_fast / 2, of_fast / 2)
    assert (second.name, second.expected, second.finished) == ("slow", 0, 0)
    assert first.expected == 250  # 0.5 x 1,000 x a half, all of whom finish
