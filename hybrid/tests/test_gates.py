import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest

from hybrid.errors import ConfigError
from hybrid.gates import (
    SHADOWED,
    Counted,
    Gates,
    grown,
    is_more,
    judge,
    judge_auc,
    judge_budget,
    judge_inversion,
    judge_pair,
    judge_shadow,
    read,
)

GATES = Gates(least=100)
EDGES = (0.01, 0.1, 0.2, 1.0, math.inf)


def counted(requests=1000, failed=0, fallen=0, slow=0, high=0) -> Counted:
    """Of as many rows; `slow` of the requests took 0.5 s and the others 5 ms, `high` of the predictions are 0.9."""
    seconds = {edge: float(requests - slow if edge < 1 else requests) for edge in EDGES}
    predictions = {edge: float(requests - high if edge < 1 else requests) for edge in (0.5, math.inf)}
    return Counted(requests, failed, requests, fallen, seconds, {}, predictions)


def outcomes(canary: Counted, default: Counted = counted()) -> dict[str, str]:  # noqa: B008
    return {verdict.gate: verdict.outcome for verdict in judge(GATES, canary, default)}


def test_a_canary_like_the_default_passes():
    """Also where both are as bad."""
    assert set(outcomes(counted()).values()) == {"passes"}
    assert set(outcomes(counted(failed=300, fallen=300), counted(failed=300, fallen=300)).values()) == {"passes"}


@pytest.mark.parametrize(
    ("worse", "gate"),
    [({"failed": 60}, "errors"), ({"fallen": 80}, "fallbacks"), ({"slow": 120}, "slower"), ({"high": 500}, "drift")],
)
def test_each_fault_fails_its_gate_and_no_other(worse, gate):
    """Of a thousand: 6 % errors, 8 % fallbacks, 12 % slow ones, half of the predictions elsewhere."""
    assert outcomes(counted(**worse)) == dict.fromkeys(("errors", "fallbacks", "slower", "drift"), "passes") | {
        gate: "fails"
    }


def test_what_answers_nothing_at_all_fails_after_a_few_requests():
    """Four of four, were one in a hundred allowed, are a chance of one in a hundred million."""
    assert outcomes(counted(requests=3, failed=3))["errors"] == "waits"
    assert outcomes(counted(requests=4, failed=4))["errors"] == "fails"


def test_with_few_requests_nothing_passes():
    """Of either: beside what shall it be judged?"""
    assert set(outcomes(counted(requests=99)).values()) == {"waits"}
    few = outcomes(counted(), counted(requests=99))
    assert (few["slower"], few["drift"]) == ("waits", "waits")


def test_what_nobody_notices_is_not_slow():
    """20 ms are more than twice 5 ms, and less than 50."""
    seconds = {0.01: 0.0, 0.02: 1000.0, 0.05: 1000.0, math.inf: 1000.0}
    canary = Counted(1000, 0, 1000, 0, seconds, {}, counted().predictions)
    assert outcomes(canary)["slower"] == "passes"


def test_a_slow_version_that_holds_up_all_requests_is_seen_by_its_batches():
    """A worker's batches wait for one another: requests of both take half a second; 120 of its 1000 batches do."""
    both = {edge: float(1000 if edge >= 1 else 0) for edge in EDGES}
    slow, quick = counted(slow=120).seconds, counted().seconds
    canary, default = (replace(counted(), seconds=both, forward=forward) for forward in (slow, quick))
    assert outcomes(canary, default)["slower"] == "fails"
    assert outcomes(default, default)["slower"] == "passes"


@given(of=st.integers(1, 2000), share=st.floats(0.001, 0.5))
def test_as_many_as_allowed_are_never_too_many(of, share):
    """Nor is one more: who is just allowed is taken back by nobody's bad luck."""
    assert not is_more(math.floor(of * share), of, share)
    assert is_more(of, of, share) == (share**of < 1e-6)


@pytest.mark.parametrize(
    ("difference", "outcome"),
    [
        (None, "waits"),
        ({"noise": [None, None], "full": None}, "waits"),
        ({"noise": [-0.02, -0.015], "full": [-0.03, -0.011]}, "fails"),
        ({"noise": [-0.02, -0.015], "full": [-0.03, 0.01]}, "waits"),
        ({"noise": [-0.002, 0.015], "full": None}, "passes"),
    ],
)
def test_a_lower_auc_fails_where_the_whole_interval_is_too_low(difference, outcome):
    """For the population where that is known; an interval that holds both says nothing yet."""
    assert judge_auc(GATES, difference).outcome == outcome


def test_metrics_of_gateway_and_worker_are_read_as_they_show_them():
    """Of this model's versions, over all processes, since the first look; a process that began anew counts from 0."""
    from hybrid.deployment import Deployment
    from serving.telemetry import Telemetry
    from serving.testing import deployment

    def asked(telemetry: Telemetry, which: Deployment, times: int) -> dict:
        for _ in range(times):
            with telemetry.request(None) as asking:
                asking.about(which)
        return read(generate_latest(telemetry.registry).decode(), "shop")

    first, second, anew = Telemetry(), Telemetry(), Telemetry()
    other = deployment(2).model_copy(update={"model": "stall"})
    before = [asked(first, deployment(2), 3), asked(second, deployment(2), 7)]
    asked(first, other, 5)
    after = [asked(first, deployment(2), 2), asked(anew, deployment(2), 4)]
    found = Counted.of(grown(before, after), 2)
    assert (found.requests, found.failed, found.seconds[math.inf]) == (6, 0, 6.0)
    assert Counted.of(grown(before, after), 3) == Counted()


def test_what_is_no_metrics_is_refused():
    with pytest.raises(ConfigError, match="metrics must be in Prometheus' text format"):
        read("<html>", "shop")


@pytest.mark.parametrize(
    ("gain", "declared", "outcome"),
    [
        ((0.2, 0.3), True, "fails"),
        ((0.02, 0.3), True, "waits"),
        ((-0.01, 0.05), True, "passes"),
        ((0.2, 0.3), False, "waits"),
    ],
)
def test_what_an_attacker_recovers_at_the_declared_noise_is_judged(gain, declared, outcome):
    """By the worst feature, with its whole interval; at other noise than declared nothing is released."""
    features = {"age": {"gain": {"low": gain[0], "high": gain[1]}}, "bar": {"gain": {"low": -0.2, "high": 0.0}}}
    assert judge_inversion(0.05, {"levels": [{"declared": declared, "features": features}]}).outcome == outcome
    assert judge_inversion(0.05, None).outcome == "waits"


@pytest.mark.parametrize(("spent", "outcome"), [(7.9, "passes"), (8.1, "fails"), (None, "waits")])
def test_a_training_that_spent_more_than_its_budget_fails(spent, outcome):
    """One whose ledger is missing passes nothing."""
    assert judge_budget(spent, None if spent is None else 8.0).outcome == outcome


def test_a_shadow_is_judged_by_its_own_metrics():
    """Of batches, not of what was served: of a thousand one in two failed, dropped ones say nothing."""
    from serving.telemetry import Telemetry
    from serving.testing import deployment

    telemetry = Telemetry()
    for _ in range(100):
        for code in ("ok", "unavailable", "dropped"):
            telemetry.shadowed(deployment(3), 7, code, None if code == "dropped" else 0.01)
        telemetry.shadowed(deployment(2), 7, "ok", 0.01)
    counts = read(generate_latest(telemetry.registry).decode(), "shop")
    shadow, default = (Counted.of(counts, version, SHADOWED) for version in (3, 2))
    assert (shadow.requests, shadow.failed, default.requests, default.failed) == (200, 100, 100, 0)
    found = {one.gate: one.outcome for one in judge_shadow(GATES, shadow, default)}
    assert found == {"errors": "fails", "slower": "passes", "drift": "waits"}
    assert Counted.of(counts, 3) == Counted(), "it served nobody"


def test_of_a_pair_what_devices_asked_is_judged_and_batches_may_only_speak_against_it():
    """Slow batches fail a pair that answers well; good batches pass none of which too little was asked."""
    good, few, slow = counted(), counted(requests=9), counted(slow=120)

    def outcomes(served: Counted, shadowed: Counted) -> list[tuple[str, str]]:
        found = judge_pair(judge(GATES, served, good), judge_shadow(GATES, shadowed, good))
        return [(one.gate, one.outcome) for one in found]

    gates = ("errors", "fallbacks", "slower", "drift")
    assert outcomes(good, Counted()) == [(gate, "passes") for gate in gates]
    assert outcomes(few, good) == [(gate, "waits") for gate in gates]
    assert outcomes(good, slow) == [(gate, "fails" if gate == "slower" else "passes") for gate in gates]
    assert outcomes(counted(failed=60, high=500), good) == [
        (gate, "fails" if gate in ("errors", "drift") else "passes") for gate in gates
    ]
