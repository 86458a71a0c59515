"""Metrics and traces of real processes: device, gateway and worker between real Kafka, Triton and Feast."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import kafka as kafka_python
import numpy as np
import pandas as pd
import pytest
from feast.protos.feast.types.Value_pb2 import Value
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from device_runtime.rows import Rows
from device_runtime.store import Store
from feature_store.materialize import apply, materialize
from hybrid.bundle import Manifest, signing_key, write_bundle
from hybrid.export.executorch import device_programs
from hybrid.export.promote import deployment_of
from hybrid.export.triton import export
from hybrid.local.process import Service, free_ports, http_ok, log_has, running
from hybrid.messages import DeadLetter, DeviceEmbeddings
from hybrid.network import Network
from hybrid.registry import Registry
from hybrid.spec import load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace
from serving import kafka as serving_kafka
from serving.connection import Broker
from serving.topics import PARTITIONS

COUPON = Path(__file__).parents[1] / "examples" / "coupon" / "model.py"
OFFER = "Bar/1d"
STORE_KEY = bytes(range(32))
TRAINING = TrainingRecord(kind="federated", run="r", population="p", users=9, examples=9, epsilon=8, delta=9e-4)
FEATURES = ["coupon", "expiration", "acceptance_rate"]
STAGES = ["decode", "features", "forward", "encode", "send"]
PROCESS = "process hybrid.device-embeddings.v1"


@dataclass
class Collector:
    """An OpenTelemetry collector: what each service exported to it over OTLP."""

    spans: dict[str, list[Span]] = field(default_factory=lambda: defaultdict(list))
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def take(self, body: bytes) -> None:
        with self.arrived:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {each.key: each.value.string_value for each in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans[names["service.name"]] += scope.spans
            self.arrived.notify_all()

    def wait_for(self, service: str, name: str, number: int) -> list[Span]:
        """The spans of that name, once there are so many."""

        def found() -> list[Span]:
            return [span for span in self.spans[service] if span.name == name]

        with self.arrived:
            assert self.arrived.wait_for(lambda: len(found()) >= number, timeout=30), found()
            return found()


@pytest.fixture(scope="module")
def collector():
    collected = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            collected.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    collected.environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        # Who does not say that a request is traced is not.
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }
    yield collected
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Serving:
    """What the tests reach."""

    folder: Path
    url: str
    metrics: dict[str, str]
    collector: Collector
    width: int

    def devices(self, number: int) -> dict:
        """So many traced requests of device processes, and what their summary says."""
        files = ("--bundle", self.folder / "coupon-1.bundle", "--trust", self.folder / "keys" / "bundle-signing.pub")
        store = ("--store", self.folder / "rows.sqlite", "--devices", f"0:{number}", "--out", self.folder / "out")
        command = ["infer", *files, *store, "--gateway", self.url, "--trace", "1", "--concurrency", number]
        environment = {"OTEL_TRACES_SAMPLER": "always_on", "HYBRID_STORE_KEY": STORE_KEY.hex()}
        done = subprocess.run(
            [sys.executable, "-m", "device_runtime", *map(str, command)],
            env=os.environ | self.collector.environment | environment,
            capture_output=True,
            check=False,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ask(self, entity: str = OFFER, traceparent: str | None = None) -> httpx.Response:
        inputs = [("entity", "BYTES", [1], [entity]), ("time", "BYTES", [1], ["6PM"])]
        inputs.append(("device_embedding", "FP32", [1, self.width], [0.0] * self.width))
        names = ("name", "datatype", "shape", "data")
        body = {"inputs": [dict(zip(names, each, strict=True)) for each in inputs]}
        headers = {"traceparent": traceparent} if traceparent else {}
        return httpx.post(f"{self.url}/v2/models/coupon/infer", json=body, headers=headers, timeout=20)

    def skew(self, status: int) -> dict:
        """What `hybrid skew` says of all that was asked."""
        done = subprocess.run(
            [sys.executable, "-m", "hybrid", "skew", "coupon", "--json"],
            env={**os.environ, "HYBRID_HOME": str(self.folder)},
            capture_output=True,
            check=False,
            text=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return json.loads(done.stdout)

    def scrape(self, process: str) -> dict[tuple, float]:
        """(name, labels without le) -> value, as Prometheus reads it."""
        page = httpx.get(self.metrics[process]).text
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }


@pytest.fixture(scope="module")
def serving(kafka, triton, collector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("telemetry")
    (folder / "data").mkdir()
    (folder / "model.py").write_text(COUPON.read_text())
    offer = {"offer_id": OFFER, "coupon": "Bar", "expiration": "1d", "acceptance_rate": 0.4}
    pd.DataFrame([offer | {"event_timestamp": datetime.now(UTC) - timedelta(hours=1)}]).to_parquet(
        folder / "data" / "offers.parquet"
    )
    model, registry = load_model(folder / "model.py"), Registry(Workspace(folder))
    network = Network.build(model)
    registry.register(model, network.description(), folder / "model.py")
    digest = registry.definition_hash("coupon")
    registry.create_version("coupon", weights=network.weights(), training=TRAINING, curves={}, expected_hash=digest)
    deployment = deployment_of(network, 1, digest, export(network, 1, folder / "triton"))
    deployment.write(folder / "deployments")
    apply(model, folder / "feast")
    materialize(model, folder / "feast", datetime.now(UTC))
    write_devices(folder, network)
    models = triton(folder / "triton").grpc
    port, *ports = free_ports(3)
    metrics = {
        name: f"http://127.0.0.1:{each}/metrics" for name, each in zip(("gateway", "worker"), ports, strict=True)
    }
    common = ["--deployments", str(folder / "deployments"), "--kafka", kafka, "--metrics-port"]

    def service(name, metrics_port, *arguments, ready):
        command = [sys.executable, "-m", "serving", name, *common, str(metrics_port), *arguments]
        return Service(name, command, ready, environment=collector.environment)

    services = [
        service(
            "worker",
            ports[1],
            *("--feast", str(folder / "feast"), "--triton", models),
            *("--log-sample", "1", "--log", str(folder / "request-log")),
            ready=log_has("ready"),
        ),
        service("gateway", ports[0], "--port", str(port), ready=http_ok(f"http://127.0.0.1:{port}/v2/health/ready")),
    ]
    with contextlib.ExitStack() as stack:
        for each in services:
            stack.enter_context(running(each, folder / "logs"))
        yield Serving(folder, f"http://127.0.0.1:{port}", metrics, collector, deployment.device_embedding)


def write_devices(folder, network):
    """A bundle of the network, and twenty devices with one row each."""
    model, n = network.model, 20
    manifest = Manifest(
        model=model.name,
        version=1,
        definition_hash="0" * 64,
        features=model.device_features,
        request={name: "text" if t.text else "number" for name, t in model.request.items()},
        server_embedding=network.server_embedding,
        device_embedding=network.device_embedding,
        merge="server",
        release=model.release,
        programs={},
    )
    manifest = write_bundle(
        folder / "coupon-1.bundle", manifest, device_programs(network), signing_key(folder / "keys")
    )
    features = {name: [None] * n for name in model.device}
    rows = Rows(np.arange(n), np.zeros(n, int), [OFFER] * n, {"time": ["6PM"] * n}, features)
    with Store.open(folder / "rows.sqlite", STORE_KEY, manifest) as store:
        store.write(rows, time.time_ns() // 1_000_000)


def test_the_lag_is_what_was_not_polled_yet(kafka, monkeypatch):
    """Five records, two at a time: 3 are left, then 1, then none; the next inbox of the group finds none left."""
    monkeypatch.setattr(serving_kafka, "GROUP", "lag")
    producer = kafka_python.KafkaProducer(bootstrap_servers=kafka)
    for _ in range(5):
        producer.send("lag", b"x").get(10)
    producer.close()
    with serving_kafka.GroupInbox(Broker(kafka), "lag") as inbox:
        assert inbox.lag is None
        seen, deadline = [], time.monotonic() + 30
        while sum(taken for taken, _ in seen) < 5:
            assert time.monotonic() < deadline
            if records := inbox.poll(0.2, 2):
                seen.append((len(records), inbox.lag))
        inbox.commit({0: 5})
    assert seen == [(2, 3), (2, 1), (1, 0)]
    with serving_kafka.GroupInbox(Broker(kafka), "lag") as inbox:
        while inbox.lag is None:
            assert time.monotonic() < deadline + 30
            assert not inbox.poll(0.2, 2)
        assert inbox.lag == 0


def test_probes_of_both_say_that_they_live_and_are_ready(serving):
    """Beside their metrics; the Triton that the worker asks is there."""
    for url in serving.metrics.values():
        for probe in ("live", "ready"):
            answer = httpx.get(url.replace("/metrics", f"/health/{probe}"), timeout=10)
            assert (answer.status_code, answer.text) == (200, "ok\n")


def test_one_trace_leads_from_the_device_to_its_answer(serving):
    """ask (device) -> infer (gateway) -> process (worker), with the stages of both; times lie within their parents'."""
    serving.devices(1)
    (ask,) = serving.collector.wait_for("hybrid-device", "ask", 1)
    (infer,) = serving.collector.wait_for("hybrid-gateway", "infer", 1)
    (process,) = serving.collector.wait_for("hybrid-worker", PROCESS, 1)
    assert ask.trace_id == infer.trace_id == process.trace_id
    assert (ask.parent_span_id, infer.parent_span_id, process.parent_span_id) == (b"", ask.span_id, infer.span_id)
    below = {"hybrid-gateway": (infer, ["decode", "wait", "encode"]), "hybrid-worker": (process, STAGES)}
    for service, (parent, stages) in below.items():
        children = [s for s in serving.collector.spans[service] if s.parent_span_id == parent.span_id and s != process]
        assert [s.name for s in sorted(children, key=lambda s: s.start_time_unix_nano)] == stages
        for child in children:
            assert parent.start_time_unix_nano <= child.start_time_unix_nano
            assert child.end_time_unix_nano <= parent.end_time_unix_nano
    assert ask.start_time_unix_nano <= infer.start_time_unix_nano <= process.start_time_unix_nano
    # The worker's span ends with its commit, which the answer does not wait for.
    encode = next(s for s in serving.collector.spans["hybrid-worker"] if s.name == "encode")
    assert encode.end_time_unix_nano <= infer.end_time_unix_nano <= ask.end_time_unix_nano


def test_requests_that_share_a_record_have_a_trace_each(serving):
    """Twenty devices ask at once, after the one above: a trace for each, in all three services."""
    assert serving.devices(20)["predicted"] == 20
    serving.collector.wait_for("hybrid-gateway", "infer", 21)
    serving.collector.wait_for("hybrid-worker", PROCESS, 21)
    traces = [
        {span.trace_id for span in serving.collector.spans[service] if span.name == name}
        for service, name in (("hybrid-device", "ask"), ("hybrid-gateway", "infer"), ("hybrid-worker", PROCESS))
    ]
    assert traces[0] == traces[1] == traces[2]
    assert len(traces[0]) == 21


def test_an_untraced_request_leaves_no_span(serving):
    """No traceparent, or one that is not sampled: only the traced request that is asked after them has a span."""
    trace = "1" * 32
    assert serving.ask().status_code == 200
    assert serving.ask(traceparent=f"00-{trace}-{'2' * 16}-00").status_code == 200
    assert serving.ask(traceparent=f"00-{'3' * 32}-{'4' * 16}-01").status_code == 200
    before = {span.trace_id for span in serving.collector.spans["hybrid-device"]}
    serving.collector.wait_for("hybrid-gateway", "infer", len(before) + 1)
    after = {span.trace_id for span in serving.collector.spans["hybrid-gateway"]}
    assert after - before == {bytes.fromhex("3" * 32)}


def test_no_span_holds_a_value(serving):
    """Neither the entity, nor a request's text, nor an embedding: names, counts and codes only."""
    assert serving.ask("secret-offer", traceparent=f"00-{'5' * 32}-{'6' * 16}-01").status_code == 404
    found = serving.collector.wait_for("hybrid-gateway", "infer", 1)
    deadline = time.monotonic() + 30
    while not any(span.trace_id == bytes.fromhex("5" * 32) for span in found):
        assert time.monotonic() < deadline
        found = serving.collector.wait_for("hybrid-gateway", "infer", len(found) + 1)
    everything = [span for spans in serving.collector.spans.values() for span in spans]
    text = "".join(map(str, everything))
    assert "secret-offer" not in text
    assert "6PM" not in text
    assert OFFER not in text
    assert {attribute.key for span in everything for attribute in span.attributes} == {
        *("hybrid.model", "hybrid.version", "hybrid.rows", "hybrid.code", "error.type"),
        *("messaging.system", "messaging.operation.type", "messaging.destination.name"),
    }


def test_metrics_tell_what_was_asked_and_what_came_of_it(serving):
    """Three more are predicted, one entity is unknown: both processes say so, and nothing is left waiting."""
    before = {name: serving.scrape(name) for name in serving.metrics}
    assert [serving.ask().status_code for _ in range(3)] == [200] * 3
    assert serving.ask("nowhere").status_code == 404
    deadline = time.monotonic() + 30
    pair = (("model", "coupon"), ("version", "1"))
    rows = ("hybrid_merge_rows_total", ("code", "ok"), *pair)
    while (after := {name: serving.scrape(name) for name in serving.metrics})["worker"].get(
        ("hybrid_merge_stage_seconds_count", ("stage", "send")), 0
    ) < before["worker"].get(("hybrid_merge_stage_seconds_count", ("stage", "send")), 0) + 4:
        assert time.monotonic() < deadline
    for name, (process, sample, grown) in {
        "ok": ("gateway", ("hybrid_gateway_requests_total", ("code", "ok"), *pair), 3),
        "unknown": ("gateway", ("hybrid_gateway_requests_total", ("code", "unknown_entity"), *pair), 1),
        "rows": ("worker", rows, 3),
        "unknown rows": ("worker", ("hybrid_merge_rows_total", ("code", "unknown_entity"), *pair), 1),
        "ages": ("worker", ("hybrid_merge_feature_age_seconds_count", *pair), 3),
    }.items():
        assert after[process][sample] - before[process].get(sample, 0) == grown, name
    assert after["gateway"][("hybrid_gateway_rows_in_flight",)] == 0
    assert after["gateway"][("hybrid_gateway_outbox_records",)] == 0
    assert after["worker"][("hybrid_worker_lag_records",)] == 0
    assert after["worker"][("hybrid_served_version", *pair)] == 1
    age = after["worker"][("hybrid_merge_feature_age_seconds_sum", *pair)]
    assert age / after["worker"][("hybrid_merge_feature_age_seconds_count", *pair)] == pytest.approx(3_600, abs=600)


def test_the_metrics_hold_no_value_of_a_caller(serving):
    """Labels are models, versions and codes: no entity, no request's text."""
    pages = "".join(httpx.get(url).text for url in serving.metrics.values())
    assert 'code="unknown_entity"' in pages
    for value in (OFFER, "nowhere", "secret-offer", "6PM"):
        assert value not in pages


def test_logs_and_topics_hold_no_value_of_a_caller_but_where_it_is_asked_about(serving, kafka):
    """Entities lie in the topic of questions alone, also where a record cannot be read; texts lie in none."""
    assert serving.ask("secret-offer", traceparent=f"00-{'7' * 32}-{'8' * 16}-01").status_code == 404
    questions, letters = DeviceEmbeddings.TOPIC, DeadLetter.topic_for(DeviceEmbeddings.TOPIC)

    def lies_in(topic):
        return [record.value for record in serving_kafka.lying_in(Broker(kafka), topic)]

    before, deadline = len(lies_in(letters)), time.monotonic() + 30
    with contextlib.closing(kafka_python.KafkaProducer(bootstrap_servers=kafka)) as producer:
        producer.send(questions, b"secret-offer at 6PM, in no schema").get(10)
    while len(lies_in(letters)) == before:
        assert time.monotonic() < deadline
    topics = {topic: b"".join(lies_in(topic)) for topic in PARTITIONS}
    assert b"secret-offer" in topics.pop(questions)
    logs = {file.name: file.read_bytes() for file in (serving.folder / "logs").iterdir()}
    assert {"gateway.log", "worker.log"} <= set(logs)
    assert b"dead letter" in logs["worker.log"]
    for name, text in (logs | topics).items():
        for value in (b"secret-offer", OFFER.encode(), b"6PM", b"7" * 32, STORE_KEY.hex().encode()):
            assert value not in text, name


def test_skew_finds_what_was_changed_behind_the_feature_stores_back(serving):
    """The acceptance rate's slot is moved by 0.5 in the online store: only it differs, by that, from then on."""
    as_before = serving.ask().json()["outputs"][0]
    before = serving.skew(status=0)
    assert set(before["rows"]) == {"same"}
    assert [each["rows"] for each in before["differences"]] == [0] * 5
    changed = datetime.now(UTC)
    move_slot(serving.folder / "feast" / "online.db", place=2, by=0.5)
    deadline = time.monotonic() + 30
    while serving.ask().json()["outputs"][0] == as_before:  # a cache may hold the row for a while
        assert time.monotonic() < deadline
    after = serving.skew(status=1)
    skewed = after["rows"]["skewed"]
    assert skewed == 1
    assert after["rows"]["same"] >= before["rows"]["same"]
    differences = {each["of"]: each for each in after["differences"]}
    assert list(differences) == [*FEATURES, "server embedding", "score, server side alone"]
    assert [differences[name]["rows"] for name in FEATURES] == [0, 0, skewed]
    assert differences["acceptance_rate"]["max_abs"] == pytest.approx(0.5, abs=1e-6)
    assert differences["acceptance_rate"]["missing"] == 0
    for computed in ("server embedding", "score, server side alone"):
        assert differences[computed]["rows"] == skewed
        assert differences[computed]["max_abs"] > 0
    assert datetime.fromisoformat(differences["acceptance_rate"]["first"][0]) >= changed - timedelta(milliseconds=1)


def move_slot(file, place, by):
    """As no materialisation would."""
    with contextlib.closing(sqlite3.connect(file)) as store, store:
        ((table,),) = store.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE '%packed%'")
        ((value,),) = store.execute(f"SELECT value FROM {table} WHERE feature_name = 'slots'")
        slots = Value.FromString(value)
        slots.float_list_val.val[place] += by
        store.execute(f"UPDATE {table} SET value = ? WHERE feature_name = 'slots'", [slots.SerializeToString()])
