"""What the walkthroughs tell a reader to type is typed here: `make documents`, since it takes a while."""

import re

from hybrid.local.process import free_ports
from integration_tests.documents import DOCS, commands

ANALYTICS = DOCS / "analytics.md"
BALANCE = DOCS / "balance.md"
DRIFT = DOCS / "drift.md"
FLEET = DOCS / "fleet.md"
FLOWER = DOCS / "flower.md"
OPERATING = DOCS / "operating.md"
ROLLOUT = DOCS / "rollout.md"
STUDY_COACH = DOCS / "study-coach.md"
WALKTHROUGH = DOCS / "walkthrough.md"


def test_the_study_coach_trains_on_a_label_that_only_devices_know(type_commands):
    """Its commands succeed; label counts and rounds cost epsilon 2 together, and the ledger says both.

    Then its features and scores are watched: what was counted once is kept, and three periods cost what they should.
    """
    printed = type_commands("\n".join(commands(STUDY_COACH) + commands(DRIFT)))
    assert "protects the device features and label" in printed
    assert "label-rates" in printed
    assert re.search(r"epsilon (1\.99\d|2\.000) at delta 2\.3e-05 per user", printed), printed
    assert len(re.findall(r"reference: study_coach to 2014-06-01: .*nothing now", printed)) == 1
    assert re.search(r"drift: 3 releases, gaussian noise .*; alone epsilon 0\.8[45]\d", printed), printed
    assert re.search(
        r'^hybrid_drift_psi_low{column="course_earlier",model="study_coach",version="1"} 0\.[12]', printed, re.M
    )


def test_analytics_answer_and_their_ledger_says_so(type_commands):
    """Every command succeeds; the questions cost epsilon 1.1 together, by purpose, and the first finds the median.

    Then a training is balanced, and says by what.
    """
    printed = type_commands("\n".join(commands(ANALYTICS) + commands(BALANCE)))
    assert re.search(r"label prior 0\.\d+ \(noised\)", printed), printed
    median = re.search(r"^0\.5 +(-\d+\.\d+) ", printed, re.MULTILINE)
    assert median, printed
    assert abs(float(median[1]) + 52.5) < 2, "half of the students registered 52 days ahead or earlier"
    assert re.search(r"analyze: [1-3] release", printed), printed
    assert re.search(r"evaluate: \d release", printed), printed
    assert re.search(r"^AUC +0\.\d+ ", printed, re.MULTILINE), printed


def on_free_ports(blocks: list[str]) -> str:
    """A script that names ports from 8095 on, with others in their places."""
    script = "\n".join(blocks)
    written = sorted(set(re.findall(r"\b8(?:095|[12]0[123])\b", script)))
    found = dict(zip(written, map(str, free_ports(len(written))), strict=True))
    return re.sub("|".join(written), lambda port: found[port[0]], script)


def test_the_walkthrough_operating_the_fleet_and_flower_do_what_they_say(type_commands):
    """Their commands, typed in order in one shell, all succeed; every request is predicted, counted, and without skew.

    Devices of a fleet train, and others join them; then all of a federation is started by hand. One thing differs
    from what a reader types: servers take free ports, since the default ones may be taken where tests run.
    """
    ports = dict(zip(("8080", "18003", "18004", "8090"), map(str, free_ports(4)), strict=True))
    options = ("--gateway-port", "--gateway-metrics-port", "--worker-metrics-port")
    chosen = " ".join(f"{option} {port}" for option, port in zip(options, ports.values(), strict=False))
    script = "\n".join(commands(WALKTHROUGH) + commands(OPERATING) + commands(FLEET))
    script = script.replace("hybrid up", f"hybrid up --free-ports {chosen}").replace(
        "--port 8090", f"--port {ports['8090']}"
    )
    for written, port in ports.items():
        script = script.replace(f"127.0.0.1:{written}", f"127.0.0.1:{port}")
    printed = type_commands(f"{script}\n{on_free_ports(commands(FLOWER))}\n" + "\n".join(commands(ROLLOUT)))
    assert "unknown_entity" in printed, "the walkthrough says that an unknown offer says so"
    counts = re.findall(r"(\d+) requests from \d+ devices, (\d+) answered, (\d+) predicted", printed)
    assert len(counts) == 2
    for requests, answered, predicted in counts:
        assert int(requests) == int(answered) == int(predicted) > 2000
    assert re.findall(r'"outcome": "(\w+)"', printed) == ["installed", "unchanged"]
    written, forgotten = re.findall(r'{"(?:written|forgotten)": (\d+)}', printed)
    assert int(written) == int(forgotten) > 0, "all that was kept of a person is told, and then goes"
    assert "'name': 'coupon'" in printed, "a plain client reads the model's metadata"
    counted = {name: float(value) for name, value in re.findall(r'^(hybrid_\w+){.*code="ok".*} (\S+)$', printed, re.M)}
    assert counted == dict.fromkeys(("hybrid_gateway_requests_total", "hybrid_merge_rows_total"), float(requests))
    assert f"coupon: {requests} rows: {requests} same" in printed
    assert f'"rows": {{"same": {requests}}}' in printed
    assert re.search(r"privacy: epsilon \S+ at delta 0.0009 per device", printed), "a fleet's version says what it cost"
    assert "the issuer of tokens sees to that" in printed, "with tokens, that nobody is counted twice"
    assert printed.count("uploads not taken: ") == 5
    assert printed.count('"ending": "uploaded"') == 2, "another device joined, each time"
    assert '"ending": "halted"' in printed
    assert "coupon:4 is the canary: 50% of devices fetch it, the others 1" in printed
    assert "coupon:4 was taken back (recall fell); devices fetch 1" in printed
