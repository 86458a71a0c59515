"""`hybrid doctor` over real workspaces, with faults planted in them, and servers that are away."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.cli import app, checks
from hybrid.errors import ConfigError
from hybrid.local.process import free_ports, started
from hybrid.local.supervisor import Server, State
from hybrid.messages import DeviceEmbeddings, Predictions
from hybrid.workspace import Workspace
from serving.probing import Topic
from serving.topics import TOPIC_CONFIG


def examined(*words):
    """Exit status and findings, by check, without their fixes."""
    done = CliRunner().invoke(app, ["doctor", "--json", *words], catch_exceptions=False)
    printed = json.loads(done.stdout)
    assert printed["ok"] == (done.exit_code == 0)
    by_check = {}
    for finding in printed["findings"]:
        assert finding["fix"] or finding["status"] in ("ok", "skipped"), finding
        by_check.setdefault(finding["check"], []).append((finding["status"], finding["found"]))
    return done.exit_code, by_check


def only(name, *words):
    code, found = examined("--only", name, *words)
    assert found.keys() == {name}
    return code, found[name]


def test_a_project_without_servers_is_looked_at_as_it_is(project):
    """Features were applied and not brought in: a warning, as nothing is served; what is nowhere is skipped.

    Once they are materialised all is well.
    """
    Workspace.current().root.chmod(0o700)
    code, found = examined()
    assert code == 0
    assert [status for (status, _), *_ in found.values()] == (
        ["skipped", "ok", "skipped", "ok", "skipped", "warn"] + ["skipped"] * 8
    )
    assert found["registry"][0][1].endswith("answers; 1 registered: taxi")
    assert "run `hybrid features materialize taxi`" in found["features"][0][1]
    project("features", "materialize", "taxi")
    ((status, text),) = examined("--only", "features")[1]["features"]
    assert status == "ok"
    assert re.fullmatch("taxi: the newest of 2 rows is [0-9]+ min old, at most 24 h is allowed", text)


def test_features_that_are_old_or_nearly_so_are_told(project, tmp_path):
    """20 of 24 hours are more than four fifths: to watch; 30 are too many: failed, once the model is served."""
    workspace = Workspace.current()
    for hours in (20, 30):
        stamp = [datetime.now(UTC) - timedelta(hours=hours)] * 2
        zones = pd.DataFrame({"zone_id": [f"of{hours}", "port"], "demand": [1.0, -1.0], "event_timestamp": stamp})
        zones.to_parquet("zones.parquet")
        project("features", "materialize", "taxi")
        text = f"taxi: the newest of 2 rows is {hours} h old, at most 24 h is allowed"
        assert only("features") == (0, [("warn", text)])
    workspace.deployments.mkdir()
    (workspace.deployments / "taxi.json").write_text("{}")
    code, found = only("features")
    assert (code, found) == (1, [("fail", text)])


def test_a_model_whose_file_changed_is_told_and_can_be_trained_no_more(project, tmp_path):
    """By the registry; its features cannot be looked at."""
    with (tmp_path / "model.py").open("a") as file:
        file.write("# changed\n")
    assert only("registry")[1][-1][0] == "warn"
    assert "changed since it was registered" in only("registry")[1][-1][1]
    assert only("features")[1][0][0] == "warn"


def test_versions_that_another_registry_hides_are_told(project, monkeypatch):
    """The variable is set, and the workspace has a file of its own; the server is away, and that is what fails."""
    workspace, (port,) = Workspace.current(), free_ports(1)
    workspace.mlflow.mkdir(exist_ok=True)
    (workspace.mlflow / "mlflow.db").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://team:hunter2@127.0.0.1:{port}")
    code, found = only("registry")
    assert (code, [status for status, _ in found]) == (1, ["warn", "fail"])
    assert found[1][1].startswith(f"the registry http://127.0.0.1:{port} does not answer")
    assert "hunter2" not in str(found)


def test_a_registry_in_plaintext_is_told(project, monkeypatch):
    """Of another machine, whose name nobody knows here: that it is away is what fails."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.invalid:5000")
    code, found = only("registry")
    assert (code, [status for status, _ in found]) == (1, ["warn", "fail"])
    assert found[0][1].startswith("http://mlflow.invalid:5000 is spoken to in plaintext")


def test_a_registry_that_is_no_database_fails(project):
    """Half a copy of it, say."""
    database = Workspace.current().mlflow / "mlflow.db"
    database.parent.mkdir(exist_ok=True)
    database.write_bytes(b"not a database, but as long as its header is" * 10)
    code, ((status, found),) = only("registry")
    assert (code, status) == (1, "fail")
    assert found.endswith("mlflow.db cannot be read: DatabaseError")


def test_servers_that_are_away_fail_within_seconds(project):
    """Each by its own check; nothing listens on any of the ports."""
    kafka, triton, gateway, superlink, aggregator, issuer = free_ports(6)
    code, found = examined(
        *("--kafka", f"127.0.0.1:{kafka}", "--triton", f"127.0.0.1:{triton}"),
        *("--gateway", f"http://127.0.0.1:{gateway}", "--superlink", f"127.0.0.1:{superlink}"),
        *("--aggregator", f"http://127.0.0.1:{aggregator}", "--issuer", f"http://127.0.0.1:{issuer}"),
    )
    assert code == 1
    failed = {name for name, findings in found.items() if any(status == "fail" for status, _ in findings)}
    assert failed == {"kafka", "triton", "gateway", "superlink", "aggregators", "issuer"}


def test_a_redis_that_is_away_fails(project):
    """Where the workspace says that features are served from it."""
    (port,) = free_ports(1)
    assert only("redis")[1][0][0] == "skipped"
    project("features", "store", "redis", "--address", f"127.0.0.1:{port}")
    code, ((status, found),) = only("redis")
    assert (code, status, found) == (1, "fail", f"Redis at 127.0.0.1:{port} does not answer: ConnectionError")


def test_a_local_stack_that_died_fails(project):
    """With the first line of why; its servers are not asked."""
    workspace = Workspace.current()
    workspace.stack.mkdir(parents=True)
    one = Server(name="kafka", ports={"kafka": 1}, log=workspace.stack / "kafka.log")
    pid = os.getpid()
    state = State(
        phase="failed", message="kafka was killed\nits log", supervisor=pid, started=started(pid), servers=(one,)
    )
    state.write(workspace.stack)
    code, found = examined("--only", "stack", "--only", "kafka")
    assert (code, found["stack"]) == (1, [("fail", "the local stack is failed: kafka was killed")])
    assert found["kafka"][0][0] == "skipped"


REQUESTS, ANSWERS = DeviceEmbeddings.TOPIC, Predictions.TOPIC


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        (Topic(8, 3, 0, dict(TOPIC_CONFIG)), []),
        (Topic(2, 3, 0, dict(TOPIC_CONFIG)), [("fail", f"{ANSWERS} has 2 partitions, at least 8 are counted on")]),
        (Topic(0, 0, 0, {}), [("skipped", f"{ANSWERS}: this client may not look at it")]),
        (Topic(8, 3, 1, {}), [("warn", f"{ANSWERS}: replicas of 1 of 8 partitions are not in sync")]),
        (
            Topic(8, 3, 0, TOPIC_CONFIG | {"segment.ms": "604800000"}),
            [("warn", f"{ANSWERS}: segment.ms is 604800000, serving makes it with 600000")],
        ),
    ],
)
def test_a_topic_that_is_not_as_serving_needs_it_is_told(topic, expected):
    """Too few partitions fail: gateways wait at those that are not there; the rest is to watch, with a command."""
    found = list(checks._topic(ANSWERS, topic))
    assert [(finding.status, finding.found) for finding in found] == expected
    assert all(finding.fix for finding in found if finding.status != "skipped")


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (0, [("warn", "no merge worker is in the group: nobody answers requests that go through Kafka")]),
        (4, [("ok", "4 merge workers for 4 partitions of requests")]),
        (6, [("warn", "6 merge workers for 4 partitions of requests: 2 do nothing")]),
        (None, []),  # the broker lets this client not ask
    ],
)
def test_workers_are_held_against_the_partitions_that_they_share(workers, expected):
    """One partition is read by one of them."""
    found = checks._workers({REQUESTS: Topic(4, 1, 0, {})}, workers)
    assert [(finding.status, finding.found) for finding in found] == expected


def test_what_is_asked_wrongly_is_refused(project):
    """A check that there is none of, and options of a broker that nobody named."""
    with pytest.raises(ConfigError, match=r"^--only must be one of stack, registry, .*, got printer$"):
        examined("--only", "printer")
    with pytest.raises(ConfigError, match=r"^--kafka must name the brokers, as HOST:PORT, where others of its options"):
        examined("--kafka-tls")
    with pytest.raises(ConfigError, match=r"^--triton must name the server"):
        examined("--triton-ca", "ca.pem")


def test_a_table_is_for_people(project):
    """Each finding with what to do about it, and a line that counts them."""
    Workspace.current().root.chmod(0o705)
    done = CliRunner().invoke(app, ["doctor", "--only", "permissions"], catch_exceptions=False)
    assert "chmod o-rwx" in done.stdout
    assert done.stdout.endswith("0 ok, 1 to watch, 0 failed, 0 skipped\n")
