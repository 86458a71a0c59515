"""Queries are paid for, noised, and bounded."""

import math
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.analytics.asking import ANALYZE, EVALUATE, Exact, People, Simulated, next_question
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.privacy.accountant import GaussianEvent, noise_multiplier_for
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import gaussian_epsilon
from hybrid.query import Labels, Moments, Query

COUNT = Query(parts=(Labels(),), rows=2)
PEOPLE = People({"label": [0, 1, 1, 1]}, np.array([0, 1, 1, 4]))


@pytest.fixture
def ledger(tmp_path):
    with Ledger.open(tmp_path, budget_epsilon=1.0, delta=1e-5) as opened:
        yield opened


def test_the_sum_is_of_clipped_vectors():
    """(1, 0), nobody, (0, 2) with two rows taken; with a clip of 1 the last is (0, 1)."""
    assert PEOPLE.sum(COUNT).tolist() == [1, 2]
    assert PEOPLE.sum(COUNT.model_copy(update={"clip": 1.0})).tolist() == [1, 1]
    assert PEOPLE.of(np.array([False, True, True])).sum(COUNT).tolist() == [0, 2]


def test_a_query_costs_what_it_was_given(ledger):
    """One query with all of epsilon 0.5: its ledger says 0.5, and its noise is the clip over the mu of that epsilon."""
    answer = Simulated(PEOPLE, ledger, purpose=ANALYZE, epsilon=0.5, seed=0)(COUNT)
    assert ledger.spent().epsilon == pytest.approx(0.5, rel=2e-3)
    assert ledger.spent().epsilon <= 0.5
    assert gaussian_epsilon(COUNT.norm / answer.sd, 1e-5) == pytest.approx(0.5, rel=2e-3)
    (entry,) = ledger.entries
    assert (entry.purpose, entry.clip, entry.sampling, entry.round) == ("analyze", 2.0, 1.0, 1)


def test_phases_together_cost_what_was_given(ledger):
    """Shares of 0.7 and 0.3 have noise of 1 / sqrt(0.7) and 1 / sqrt(0.3), and compose to the whole."""
    ask = Simulated(PEOPLE, ledger, purpose=EVALUATE, epsilon=1.0, seed=0)
    ask.begin((0.7, 0.3))
    first, second = ask(COUNT, share=0.7), ask(COUNT, share=0.3)
    assert second.sd / first.sd == pytest.approx(math.sqrt(7 / 3))
    assert 0.995 < ledger.spent().epsilon <= 1.0


def test_a_query_past_the_budget_is_refused_and_nothing_written(ledger, tmp_path):
    """Epsilon 0.8 after 0.8, of 1: neither phase is asked, and the ledger is as it was."""
    Simulated(PEOPLE, ledger, purpose=ANALYZE, epsilon=0.8, seed=0)(COUNT)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(BudgetExceeded):
        Simulated(PEOPLE, ledger, purpose=ANALYZE, epsilon=0.8, seed=0).begin((0.5, 0.5))
    with pytest.raises(BudgetExceeded):
        Simulated(PEOPLE, ledger, purpose=ANALYZE, epsilon=0.8, seed=0)(COUNT)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_noise_is_drawn_after_the_ledger_is_written(ledger, monkeypatch):
    """Where the disk refuses the entry, no noise is drawn and nothing is returned."""
    ask = Simulated(PEOPLE, ledger, purpose=ANALYZE, epsilon=0.5, seed=0)
    drawn = []
    monkeypatch.setattr("hybrid.privacy.mechanisms.SeededNoise.gaussian", lambda *a, **k: drawn.append(a))
    monkeypatch.setattr(Ledger, "spend", lambda *a, **k: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        ask(COUNT)
    assert drawn == []


def test_a_process_that_is_killed_between_spend_and_release_has_spent(tmp_path):
    """kill -9 as noise is drawn, twice: both queries are in the ledger, and the third is a question of its own."""
    code = (
        "import os, signal, sys; from pathlib import Path; import numpy as np\n"
        "from hybrid.analytics.asking import People, Simulated; from hybrid.privacy import mechanisms\n"
        "from hybrid.privacy.ledger import Ledger; from hybrid.query import Labels, Query\n"
        "mechanisms.SeededNoise.gaussian = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ledger = Ledger.open(Path(sys.argv[1]), budget_epsilon=1.0, delta=1e-5)\n"
        "people = People({'label': [0, 1]}, np.array([0, 1, 2]))\n"
        "Simulated(people, ledger, purpose='analyze', epsilon=0.3, seed=0)(Query(parts=(Labels(),)))\n"
    )
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
        assert killed.returncode == -signal.SIGKILL
    with Ledger.open(tmp_path, budget_epsilon=1.0, delta=1e-5) as ledger:
        assert [(entry.purpose, entry.round) for entry in ledger.entries] == [("analyze", 1), ("analyze", 2)]
        assert ledger.spent().epsilon == pytest.approx(gaussian_epsilon(math.sqrt(2) * _mu(0.3), 1e-5), rel=2e-3)
        assert next_question(ledger, "analyze") == 3


def _mu(epsilon):
    """Of one Gaussian release that costs so much at delta 1e-5."""
    return 1 / noise_multiplier_for(epsilon, 1e-5, 1.0, 1)


def test_no_two_queries_have_the_same_noise(ledger):
    """The same query twice, and another purpose with the same seed, have three noises."""
    ask = Simulated(PEOPLE, ledger, purpose=ANALYZE, epsilon=0.1, seed=0)
    other = Simulated(PEOPLE, ledger, purpose=EVALUATE, epsilon=0.1, seed=0)
    totals = {ask(COUNT).total[0], ask(COUNT).total[0], other(COUNT).total[0]}
    assert len(totals) == 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30), st.integers(1, 4), st.floats(0.1, 10))
def test_one_person_moves_the_sum_by_at_most_the_norm(values, rows, clip):
    """With everybody's rows but one person's, and with hers: the sums differ by at most what is accounted."""
    query = Query(parts=(Moments(column="x", low=0, high=1),), rows=rows, clip=clip)
    others = [0.5, 0.25]
    without = People({"x": np.array(others)}, np.array([0, 1, 2, 2]))
    with_her = People({"x": np.array(others + values)}, np.array([0, 1, 2, 2 + len(values)]))
    assert np.linalg.norm(with_her.sum(query) - without.sum(query)) <= query.norm * (1 + 1e-9)


def test_the_ledger_composes_training_queries_and_evaluations(tmp_path):
    """40 rounds, ten queries and two evaluations of two phases: one Gaussian release, of the root of all mu^2."""
    with Ledger.open(tmp_path, budget_epsilon=8.0, delta=1e-5) as ledger:
        query = Simulated(PEOPLE, ledger, purpose=ANALYZE, epsilon=0.2, seed=0)
        for _ in range(10):
            answer = query(COUNT)
        for _ in range(2):
            measured = Simulated(PEOPLE, ledger, purpose=EVALUATE, epsilon=0.5, seed=0)
            measured.begin((0.85, 0.15))
            phases = [measured(COUNT, share=0.85), measured(COUNT, share=0.15)]
        ledger.reserve([GaussianEvent(10.0, count=40)])
        for number in range(1, 41):
            ledger.spend(GaussianEvent(10.0), purpose="train", clip=1.0, round_number=number)
        squares = [40 / 10.0**2, 10 * (COUNT.norm / answer.sd) ** 2]
        squares += [2 * (COUNT.norm / phase.sd) ** 2 for phase in phases]
        assert ledger.spent().epsilon == pytest.approx(gaussian_epsilon(math.sqrt(sum(squares)), 1e-5), rel=1e-6)


def test_an_oracle_adds_no_noise():
    """`Exact` gives the sum itself, and says that its noise is 0."""
    answer = Exact(PEOPLE)(COUNT)
    assert (answer.total.tolist(), answer.sd, answer.people) == ([1, 2], 0.0, 3)


@pytest.mark.parametrize("shares", [(), (0.0,), (0.7, 0.4)])
def test_shares_are_of_one_whole(shares):
    """None, nothing, or more than all."""
    with pytest.raises(ConfigError, match="shares"):
        Exact(PEOPLE).begin(shares)
