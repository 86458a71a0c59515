import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.federation.pace import LONGEST_S, MEMORY, Arrivals, wait_s

ROUND_S = 60.0


def test_a_small_fleet_comes_within_half_of_the_next_round():
    waits = [wait_s(10, ROUND_S, wanted=100, fleet=100, toss=toss) for toss in (0.0, 0.5, 1.0)]
    assert waits == [10, 25, 40]


def test_a_large_fleet_is_away_for_as_many_rounds_as_it_is_larger():
    """Of 1,000 devices 100 are wanted: each comes every tenth round, that is, after ten rounds on average."""
    assert wait_s(0, ROUND_S, wanted=100, fleet=1000, toss=0.5) == 10 * ROUND_S


@given(st.floats(0, 1e9), st.floats(1e-3, 1e6), st.floats(1e-3, 1e9), st.floats(0, 1e12), st.floats(0, 1))
def test_a_wait_is_never_sooner_than_the_round_nor_longer_than_a_day(opens_s, round_s, wanted, fleet, toss):
    wait = wait_s(opens_s, round_s, wanted=wanted, fleet=fleet, toss=toss)
    assert min(opens_s, LONGEST_S) <= wait <= LONGEST_S


@pytest.mark.parametrize("away_s", [10.0, 600.0])
def test_arrivals_tell_how_many_devices_there_are(away_s):
    """500 devices that come every `away_s` seconds, in turn, for ten times the memory."""
    arrivals = Arrivals(600.0, 0.0)
    for step in range(int(500 * 6000 / away_s)):
        arrivals.add(step * away_s / 500, away_s)
    assert arrivals.fleet(6000.0) == pytest.approx(500, rel=0.01)


def arrivals_a_round(devices: int, wanted: int, rounds: int) -> np.ndarray:
    """Devices that do as they are told, up to a quarter later; how many come to each round."""
    random = np.random.default_rng(7)
    arrivals = Arrivals(MEMORY * ROUND_S, 0.0)
    queue = [(at, device) for device, at in enumerate(random.uniform(0, ROUND_S, devices))]
    heapq.heapify(queue)
    came = np.zeros(rounds)
    while queue[0][0] < rounds * ROUND_S:
        now_s, device = heapq.heappop(queue)
        came[int(now_s // ROUND_S)] += 1
        opens_s = ROUND_S - now_s % ROUND_S
        away_s = wait_s(opens_s, ROUND_S, wanted=wanted, fleet=arrivals.fleet(now_s), toss=random.random())
        arrivals.add(now_s, away_s)
        heapq.heappush(queue, (now_s + away_s * random.uniform(1, 1.25), device))
    return came


def test_as_many_come_as_a_round_wants_from_a_fleet_whose_size_nobody_knows():
    """20,000 devices that all come in the first minute; after some rounds about 500 come to each."""
    came = arrivals_a_round(20_000, 500, 200)
    assert came[0] == 20_000
    assert 350 < came[100:].mean() < 650
    assert came[100:].max() < 1200


def test_a_small_fleet_comes_to_nearly_every_round():
    """50 devices where 500 are wanted."""
    assert arrivals_a_round(50, 500, 40)[1:].mean() > 45
