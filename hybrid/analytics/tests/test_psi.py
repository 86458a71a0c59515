import numpy as np
import pytest

from hybrid.analytics import psi as module
from hybrid.analytics.psi import Noised, Psi, index, psi

EVEN = np.array([0.25, 0.25, 0.25, 0.25])
TILTED = np.array([0.1, 0.2, 0.3, 0.4])
BY_HAND = 0.15 * np.log(2.5) + 0.05 * np.log(1.25) + 0.05 * np.log(1.2) + 0.15 * np.log(1.6)  # 0.228


def drawn(seed, shares, people, sd):
    rng = np.random.default_rng(seed)
    return Noised(rng.multinomial(people, shares) + rng.normal(0, sd, len(shares)), sd)


def pair(seed, before, after, people, sd):
    return drawn((seed, 0), before, people, sd), drawn((seed, 1), after, people, sd)


def test_the_index_is_the_sum_of_differences_times_log_ratios():
    """(0.5, 0.5) against (0.2, 0.8): 0.3 log(2.5) + 0.3 log(1.6) = 0.3 log 4."""
    assert index(np.array([0.5, 0.5]), np.array([0.2, 0.8])) == pytest.approx(0.3 * np.log(4))
    assert index(EVEN, TILTED) == pytest.approx(BY_HAND)
    assert index(EVEN, EVEN) == 0


def test_of_many_people_without_noise_it_is_the_index_of_their_shares():
    """A million people: chance adds 3 (1/n + 1/n) = 6e-6, and the interval is about 0.01 wide."""
    found = psi(Noised(1e6 * EVEN, 0.0), Noised(1e6 * TILTED, 0.0))
    assert found.value == pytest.approx(BY_HAND, abs=2e-3)
    assert found.low < BY_HAND < found.high
    assert found.high - found.low < 0.01


def test_without_drift_noise_alarms_nobody_and_the_interval_begins_at_nought(monkeypatch):
    """1,000 seeds with a noise that alone makes an index of 2 x 4 x 4 x 20^2 / 800^2 = 0.02: no alarm, 5 % above 0."""
    monkeypatch.setattr(module, "DRAWS", 200)  # half the time
    found = [psi(*pair(seed, EVEN, EVEN, 800, 20.0)) for seed in range(1000)]
    assert np.mean([one.verdict in ("moved", "drifted") for one in found]) <= 0.005
    assert np.mean([one.low > 0 for one in found]) <= 0.05
    naive = [index(*(side.shares for side in pair(seed, EVEN, EVEN, 800, 20.0))) for seed in range(200)]
    assert np.mean([one.value for one in found]) < 0.5 * np.mean(naive)


def test_a_shift_is_found_and_covered():
    """100 seeds of a shift by 0.228: the mean is within 5 %, and few low ends are above it, or high ends below."""
    found = [psi(*pair(seed, EVEN, TILTED, 2000, 30.0)) for seed in range(100)]
    assert np.mean([one.value for one in found]) == pytest.approx(BY_HAND, rel=0.05)
    assert np.mean([one.low > BY_HAND for one in found]) <= 0.05
    assert np.mean([one.high < BY_HAND for one in found]) <= 0.05
    assert np.mean([one.verdict == "moved" for one in found]) > 0.6


def test_what_was_empty_counts_as_a_floor():
    """Nobody, then half: with the floor 0.001 it is 0.5 log(2) + 0.5 log(500) = 3.45, in place of infinity."""
    found = psi(Noised(np.array([500.0, 500.0, -3.0]), 0.3), Noised(np.array([250.0, 250.0, 500.0]), 0.3), apart=1)
    assert found.value == pytest.approx(3.45, rel=0.02)
    assert found.verdict == "drifted"


def test_rare_neighbours_count_together():
    """Sixty of a hundred cells hold nobody: noise of 100 empty cells would make an index, their group's makes none."""
    shares = np.concatenate([np.zeros(60), np.full(40, 1 / 40)])
    found = [psi(*pair(seed, shares, shares, 5000, 15.0)) for seed in range(20)]
    assert {one.verdict for one in found} == {"stable"}


def test_categories_are_put_together_by_their_size():
    """A text that nobody had and a quarter has is seen among fifty rare ones, which are no neighbours."""
    before = np.concatenate([[0.9], np.full(50, 0.002)])
    after = 0.75 * before
    after[25] += 0.25
    found = psi(*pair(0, before, after, 5000, 10.0), ordered=False)
    assert found.verdict == "drifted"


def test_where_noise_drowns_the_counts_nothing_is_said():
    """Ten people in a noise of 30 a cell: no value, no end, and "unclear"."""
    found = psi(*pair(0, EVEN, TILTED, 10, 30.0))
    assert found == Psi(None, 0.0, None)
    assert found.verdict == "unclear"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.0, 0.2, "stable"), (0.1, 0.9, "moved"), (0.25, 0.3, "drifted"), (0.05, 0.3, "unclear")],
)
def test_the_lower_end_decides(low, high, verdict):
    """0.1 and 0.25; an interval from below the first to above the second says neither."""
    assert Psi(low, low, high).verdict == verdict
