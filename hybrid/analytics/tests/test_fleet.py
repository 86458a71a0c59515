"""A fleet is asked as a simulated population is: here devices that upload what `contributions` gives them."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hybrid.analytics.asking import ANALYZE, EVALUATE, Exact, People
from hybrid.analytics.estimates import shares_of
from hybrid.analytics.fleet import FleetAsk
from hybrid.analytics.metrics import evaluate
from hybrid.errors import BudgetExceeded, CohortTooSmall, ConfigError, PlanError
from hybrid.federation import aggregator as mechanism
from hybrid.federation.clock import ManualClock
from hybrid.federation.fleet_aggregator import Audience, FleetAggregator
from hybrid.plan import CheckIn, open_signed
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import gaussian_epsilon
from hybrid.query import Labels, Query, contributions
from hybrid.update import encode

KEY = Ed25519PrivateKey.generate()
AUDIENCE = Audience(model="kiosk", version=4, definition_hash="ab" * 32, round_s=60, wanted=50)
SAID = CheckIn(model="kiosk", version=4, runtime=2)
RANDOM = np.random.default_rng(1)
OFFSETS = np.r_[0, np.cumsum(RANDOM.integers(0, 6, 50))]
SCORES = RANDOM.uniform(0, 1, OFFSETS[-1]).astype(np.float32)
PEOPLE = People({"score": SCORES, "label": RANDOM.uniform(0, 1, OFFSETS[-1]) < SCORES}, OFFSETS)
COUNT = Query(parts=(Labels(),), rows=2)


@contextmanager
def fleet(ledger=None, asked=None):
    """An aggregator to whose every round everybody comes; `asked` counts those who were given a plan."""
    clock, over = ManualClock(), threading.Event()
    aggregator = FleetAggregator(AUDIENCE, None, ledger, KEY, clock=clock)

    def attend():
        rng = np.random.default_rng(0)
        while not over.is_set():
            if not clock.waited_for.wait(0.02):
                continue
            plan, payload = open_signed(aggregator.check_in(SAID).body, KEY.public_key())
            everybody = np.concatenate(list(contributions(plan.query, PEOPLE.columns, OFFSETS, payload)))
            for number, vector in enumerate(everybody):
                aggregator.upload(plan.id, f"{number:032x}", encode(vector.astype(np.float32), "float32", rng))
                asked is None or asked.append(number)
            clock.waited_for.clear()
            clock.forward(60)

    thread = threading.Thread(target=attend)
    thread.start()
    try:
        yield aggregator
    finally:
        over.set()
        thread.join(10)


def test_a_fleet_measures_what_a_simulation_does():
    """Two phases, without noise: every metric and both its intervals are those of the exact counts, to 1e-5."""
    with fleet() as aggregator:
        found = evaluate(FleetAsk(aggregator, purpose=EVALUATE, epsilon=None))
    exact = evaluate(Exact(PEOPLE))
    assert found.people == exact.people == 50
    for name, estimate in exact.metrics.items():
        np.testing.assert_allclose(found.metrics[name].value, estimate.value, atol=1e-5)
        for end in ("low", "high"):
            ours, theirs = getattr(found.metrics[name].full, end), getattr(estimate.full, end)
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_phases_are_paid_for_by_the_question_s_epsilon(tmp_path):
    """Two entries for the purpose; together they cost the epsilon of 0.5, and noise is as the shares say."""
    with Ledger.open(tmp_path, budget_epsilon=1, delta=1e-5) as ledger, fleet(ledger) as aggregator:
        ask = FleetAsk(aggregator, purpose=EVALUATE, epsilon=0.5)
        ask.begin(shares_of(1.0, full=True))
        evaluate(ask)
        assert [(e.purpose, e.round, e.attempt) for e in ledger.entries] == [("evaluate", 1, 1), ("evaluate", 2, 1)]
        assert ledger.spent().epsilon == pytest.approx(0.5, rel=5e-3)
        assert ledger.spent().epsilon <= 0.5
        answer = FleetAsk(aggregator, purpose=ANALYZE, epsilon=0.25)(COUNT)
    assert gaussian_epsilon(COUNT.norm / answer.sd, 1e-5) == pytest.approx(0.25, rel=5e-3)
    assert (answer.people, ledger.entries[-1].purpose) == (50, "analyze")


def test_a_query_past_the_budget_is_refused_and_no_device_is_asked(tmp_path):
    """Neither with both phases set aside first nor without."""
    asked = []
    with Ledger.open(tmp_path, budget_epsilon=0.3, delta=1e-5) as ledger, fleet(ledger, asked) as aggregator:
        ask = FleetAsk(aggregator, purpose=ANALYZE, epsilon=0.5)
        for refused in (lambda: ask.begin((0.5, 0.5)), lambda: ask(COUNT)):
            with pytest.raises(BudgetExceeded):
                refused()
        assert (asked, ledger.entries) == ([], [])
        FleetAsk(aggregator, purpose=ANALYZE, epsilon=0.25)(COUNT)
        assert len(asked) == 50


def test_what_dies_between_payment_and_release_stays_spent_and_is_never_drawn_again(tmp_path, monkeypatch):
    """The noise fails after the entry is written: the next query has another number, and both are charged."""

    class Dies:
        def gaussian(self, size, sd):
            raise KeyboardInterrupt

    with (
        monkeypatch.context() as patched,
        Ledger.open(tmp_path, budget_epsilon=1, delta=1e-5) as ledger,
        fleet(ledger) as aggregator,
    ):
        patched.setattr(mechanism, "SystemNoise", Dies)
        with pytest.raises(KeyboardInterrupt):
            FleetAsk(aggregator, purpose=ANALYZE, epsilon=0.25)(COUNT)
    with Ledger.open(tmp_path, budget_epsilon=1, delta=1e-5) as ledger, fleet(ledger) as aggregator:
        FleetAsk(aggregator, purpose=ANALYZE, epsilon=0.25)(COUNT)
        assert [(e.round, e.attempt) for e in ledger.entries] == [(1, 1), (2, 1)]


def test_a_phase_that_failed_is_asked_again_with_what_was_set_aside(tmp_path):
    """Fifty of a hundred answer: withheld. The budget has room for the one question, and it is still there."""
    with Ledger.open(tmp_path, budget_epsilon=0.25, delta=1e-5) as ledger, fleet(ledger) as aggregator:
        ask = FleetAsk(aggregator, purpose=ANALYZE, epsilon=0.25, minimum=100)
        ask.begin((1.0,))
        for _ in range(2):
            with pytest.raises(CohortTooSmall):
                ask(COUNT)
        assert ledger.entries == []


def test_a_query_that_no_device_takes_is_refused_before_anybody_is_asked():
    """Squares without what they are of."""
    asked = []
    with fleet(asked=asked) as aggregator, pytest.raises(PlanError):
        FleetAsk(aggregator, purpose=ANALYZE, epsilon=None)(COUNT.model_copy(update={"spread": (1.0,)}))
    assert asked == []


@pytest.mark.parametrize("wrong", [{"epsilon": 1.0}, {"epsilon": None, "minimum": 0}])
def test_settings_that_cannot_be_are_refused(wrong):
    """An epsilon without a ledger, and a release that nobody need be in."""
    with pytest.raises(ConfigError):
        FleetAsk(FleetAggregator(AUDIENCE, None, None, KEY), purpose=ANALYZE, **wrong)
