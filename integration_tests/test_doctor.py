"""`hybrid doctor` and `hybrid migrate` over a local stack that is up, with faults planted in its real servers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kafka as kafka_python
import pandas as pd
import pytest
from kafka.admin import ConfigResource
from typer.testing import CliRunner

from feature_store.materialize import apply, materialize
from hybrid.bundle import Manifest, signing_key, write_bundle
from hybrid.cli import app
from hybrid.deployment import Deployment, Window
from hybrid.doctor.servers import superlink
from hybrid.export.promote import deployment_of
from hybrid.export.triton import export
from hybrid.local.flower import _write_certificates
from hybrid.local.process import Service, free_ports, log_has, running
from hybrid.messages import DeviceEmbeddings, Predictions
from hybrid.network import Network
from hybrid.registry import Registry
from hybrid.spec import Training, load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace
from serving.topics import PARTITIONS, REPLAYS

COUPON = Path(__file__).parents[1] / "examples" / "coupon" / "model.py"
TRAINED = TrainingRecord(
    kind="federated",
    run="r1",
    population="coupon",
    users=90,
    examples=900,
    settings=Training(),
    epsilon=1.5,
    delta=1e-4,
    unit="user",
    protects="device features",
    oracle={},
)


@dataclass
class Stack:
    """A stack that is up, and the command line over its workspace."""

    workspace: Workspace
    state: dict[str, Any]

    def hybrid(self, *words: str) -> tuple[int, Any]:
        """A command in this process, which has loaded its libraries already."""
        done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
        return done.exit_code, json.loads(done.stdout)

    def found(self, *words: str) -> tuple[int, dict[str, list[tuple[str, str]]]]:
        code, printed = self.hybrid("doctor", *words)
        by_check: dict[str, list[tuple[str, str]]] = {}
        for finding in printed["findings"]:
            by_check.setdefault(finding["check"], []).append((finding["status"], finding["found"]))
        return code, by_check

    def server(self, name: str) -> dict[str, Any]:
        return next(server for server in self.state["servers"] if server["name"] == name)

    @property
    def kafka(self) -> str:
        return f"127.0.0.1:{self.server('kafka')['ports']['kafka']}"


def promoted(folder: Path) -> Workspace:
    """The coupon model with random weights and one offer: registered, exported for Triton, and its bundle signed."""
    (folder / "data").mkdir()
    file = folder / "model.py"
    file.write_text(COUPON.read_text())
    offer = {"offer_id": "Bar/1d", "coupon": "Bar", "expiration": "1d", "acceptance_rate": 0.4}
    stamp = datetime.now(UTC) - timedelta(hours=1)
    pd.DataFrame([offer | {"event_timestamp": stamp}]).to_parquet(folder / "data" / "offers.parquet")
    workspace, model = Workspace(folder / ".hybrid"), load_model(file)
    workspace.root.mkdir(mode=0o700)
    registry, network = Registry(workspace), Network.build(model)
    digest = registry.register(model, network.description(), file)
    registry.create_version("coupon", weights=network.weights(), training=TRAINED, curves={}, expected_hash=digest)
    registry.set_alias("coupon", 1, "production")
    manifest = Manifest(
        model="coupon",
        version=1,
        definition_hash=digest,
        features=model.device_features,
        request={},
        server_embedding=network.server_embedding,
        device_embedding=network.device_embedding,
        merge="server",
        release=model.release,
        programs={},
    )
    # The export for devices takes a minute, and no device asks here.
    write_bundle(workspace.bundles / "coupon-1.bundle", manifest, {"embed.pte": b""}, signing_key(workspace.keys))
    deployment_of(network, 1, digest, export(network, 1, workspace.triton)).write(workspace.deployments)
    apply(model, workspace.feast)
    materialize(model, workspace.feast, datetime.now(UTC))
    return workspace


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, processes_naming: Callable[[str], list[str]]
) -> Iterator[Stack]:
    workspace = promoted(tmp_path_factory.mktemp("doctor"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HYBRID_HOME", str(workspace.root))
        patched.setenv("HYBRID_CACHE", str(cache))
        try:
            command = [sys.executable, "-m", "hybrid", "up", "--free-ports", "--json"]
            yield Stack(workspace, json.loads(subprocess.check_output(command)))
        finally:
            subprocess.run([sys.executable, "-m", "hybrid", "down"], check=True, capture_output=True)
    assert processes_naming(str(workspace.root)) == []


def test_a_stack_that_is_up_is_well_without_an_option(stack: Stack):
    """Nothing fails, nothing is to watch; only what no local stack has is skipped."""
    code, found = stack.found()
    bad = {name: [each for each in seen if each[0] in ("warn", "fail")] for name, seen in found.items()}
    assert (code, {name: each for name, each in bad.items() if each}) == (0, {})
    skipped = {name for name, seen in found.items() if seen[0][0] == "skipped"}
    assert skipped == {"ledgers", "redis", "superlink", "aggregators", "issuer"}
    assert found["kafka"][0] == ("ok", "1 merge worker for 4 partitions of requests")
    assert found["triton"][0][1].endswith("is ready, with 2 models of 1 versions")
    assert found["pairs"] == [("ok", "coupon 1: deployment, bundle, Triton's files and registry agree")]
    assert len(found["clocks"]) == 2, "the gateway's, and Kafka's broker's"


def test_a_topic_that_is_gone_or_otherwise_is_told_and_migrate_makes_it(stack: Stack):
    """One was deleted, one keeps records for a day; the first is made, shown before; the second stays as it is."""
    with closing(kafka_python.KafkaAdminClient(bootstrap_servers=stack.kafka)) as admin:
        admin.delete_topics([REPLAYS])
        while REPLAYS in admin.list_topics():
            time.sleep(0.1)  # Kafka tells nobody
        admin.alter_configs([ConfigResource("TOPIC", Predictions.TOPIC, {"retention.ms": "86400000"})])
        code, found = stack.found("--only", "kafka")
        assert code == 1
        assert ("fail", f"the topic {REPLAYS} is absent") in found["kafka"]
        late = f"{Predictions.TOPIC}: retention.ms is 86400000, serving makes it with 3600000"
        assert ("warn", late) in found["kafka"]
        assert found["kafka"][-1][1].startswith("a record went to")
        topics = ("would", "done", "already")
        for options, outcome in zip((("--dry-run",), (), ()), topics, strict=True):
            code, printed = stack.hybrid("migrate", "--kafka", stack.kafka, *options)
            steps = {step["what"]: step["outcome"] for step in printed["steps"]}
            assert (code, steps["topics"], steps["registry"]) == (0, outcome, "already")
        assert REPLAYS in admin.list_topics()
        admin.alter_configs([ConfigResource("TOPIC", Predictions.TOPIC, {"retention.ms": "3600000"})])
    code, found = stack.found("--only", "kafka")
    assert (code, {status for status, _ in found["kafka"]}) == (0, {"ok"})


def test_a_version_that_triton_has_not_loaded_fails(stack: Stack):
    """Served, as if its repository were another one's; and its parts are nowhere."""
    file = stack.workspace.deployments / "coupon.json"
    before = file.read_text()
    window = Window.read(file)
    seven: Deployment = window.default.model_copy(update={"version": 7})
    file.write_text(Window(versions=(window.default, seven)).model_dump_json())
    code, found = stack.found("--only", "triton", "--only", "pairs")
    file.write_text(before)
    assert code == 1
    assert found["triton"] == [
        ("fail", f"coupon_{part} version 7 is served, and Triton has not loaded it")
        for part in ("server_tower", "head")
    ]
    assert [status for status, _ in found["pairs"]] == ["fail"] * 4, "bundle, both networks, registry"


def test_a_gateway_that_hangs_fails_and_the_others_are_looked_at(stack: Stack):
    """It takes the connection and says nothing; Triton is well meanwhile."""
    pid = stack.server("gateway")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        code, found = stack.found("--only", "gateway", "--only", "triton", "--timeout-s", "30")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (code, found["triton"][0][0]) == (1, "ok")
    ((status, text),) = found["gateway"]
    assert (status, "does not answer" in text) == ("fail", True)


def test_a_superlink_is_well_by_tls(tmp_path: Path):
    """Flower's own, at the port that SuperNodes know, and at its health server's; not without its authority."""
    _write_certificates(tmp_path)
    port, health = free_ports(2)
    certificates = {"ca-certfile": "ca.pem", "certfile": "server.pem", "keyfile": "server.key"}
    command = [
        *(str(Path(sys.executable).with_name("flower-superlink")), "--host", "127.0.0.1", "--port", str(port)),
        *(word for option, file in certificates.items() for word in (f"--ssl-{option}", str(tmp_path / file))),
        *("--health-server-address", f"127.0.0.1:{health}", "--isolation", "process"),
        "--disable-runtime-dependency-installation",
    ]
    environment = {"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    ready = log_has(".*Uvicorn running on .*")
    with running(Service("superlink", command, ready, environment=environment), tmp_path / "logs"):

        def looked(port: int, ca: Path | None) -> list[str]:
            return [finding.status for finding in superlink("superlink", f"127.0.0.1:{port}", ca)]

        assert looked(port, tmp_path / "ca.pem") == ["ok", "ok"]
        assert looked(port, None) == ["fail"]
        assert looked(health, None) == ["ok", "ok"]


def test_an_empty_kafka_is_given_all_topics_with_the_partitions_asked_for(
    kafka: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Six of requests, so that six workers can share them, and the eight of answers that gateways count on."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    with closing(kafka_python.KafkaAdminClient(bootstrap_servers=kafka)) as admin:
        if there := set(admin.list_topics()) & set(PARTITIONS):  # of tests before, whose servers are down
            admin.delete_topics(sorted(there))
            while there & set(admin.list_topics()):
                time.sleep(0.1)  # Kafka tells nobody
        words = ["migrate", "--kafka", kafka, "--kafka-partitions", "6", "--json"]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.stdout
        found = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics()}
    assert (found[DeviceEmbeddings.TOPIC], found[Predictions.TOPIC]) == (6, 8)
    assert found.keys() >= set(PARTITIONS)
