"""Gateway and worker as real processes, between real Kafka, real Triton and a real Feast store."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import kafka as kafka_python
import numpy as np
import pandas as pd
import pytest
import torch
import tritonclient.http as triton_http
from torch import nn

from feature_store.materialize import apply, materialize
from hybrid import Categorical, Clear, Entity, HybridModel, Label, Log1p, Numeric, Privacy, Server, View
from hybrid import Serving as Declared
from hybrid.deployment import Window
from hybrid.export.promote import deployment_of
from hybrid.export.triton import export
from hybrid.local import kafka as local_kafka
from hybrid.local.process import Process, Service, free_ports, http_ok, log_has, running
from hybrid.messages import DeadLetter, DeviceEmbeddings, Predictions
from hybrid.network import Network
from serving.kafka import GROUP
from serving.topics import PARTITIONS

SIZE = 4
NO_HASH = "0" * 64  # nothing is registered here
SHOPS = {"bakery": ("food", 12.0), "kiosk": ("press", None), "cinéma": ("film", 300.0)}


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * SIZE, 1)

    def forward(self, server, device):
        return self.linear(torch.cat([server, device], dim=1)).squeeze(-1)


def write_shops(file):
    now = datetime.now(UTC)
    rows = [(name, kind, size, now - timedelta(hours=1)) for name, (kind, size) in SHOPS.items()]
    rows.append(("ruin", "none", 1.0, now - timedelta(days=400)))
    pd.DataFrame(rows, columns=["shop_id", "kind", "size", "event_timestamp"]).to_parquet(file)


def shop_model(source):
    features = {"kind": Categorical(vocabulary=("food", "press")), "size": Log1p(mean=3, std=2)}
    return HybridModel(
        name="shop",
        server=Server(
            service="shops",
            entity=Entity(name="shop", join_key="shop_id"),
            views=(View(name="shops_view", source=source, features=features),),
            max_feature_age=timedelta(days=30),
        ),
        request={"hour": Categorical(vocabulary=("7AM", "2PM")), "budget": Numeric(mean=10, std=5)},
        device={"mood": Numeric()},
        server_tower=lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, SIZE)),
        device_tower=lambda: nn.LazyLinear(SIZE),
        head=Head,
        label=Label(column="bought", visible_to="server"),
        privacy=Privacy(epsilon=8, delta=1e-4, clip=1.0, unit="user"),
        merge="server",
        release=Clear(reason="random weights in a test"),
    )


@dataclass
class Serving:
    """What the tests reach."""

    folder: Path
    network: Network
    broker: str
    cache: Path
    url: str
    worker_service: Service
    worker: Process
    client: httpx.Client
    triton: Any

    def restart_worker(self):
        self.worker = Process(self.worker_service, self.folder / "logs")
        self.worker.wait_ready()

    def infer(self, **changes):
        return self.client.post("/v2/models/shop/infer", content=json.dumps(question(**changes)))

    def offline(self, shops, hours, budgets, embedding):
        """What torch alone says, from the raw values."""
        columns = {"kind": [SHOPS[s][0] for s in shops], "size": [SHOPS[s][1] for s in shops]}
        features = self.network.model.server_features
        slots = features.slots(features.inputs(columns | {"hour": hours, "budget": budgets}))
        with torch.no_grad():
            server = self.network.server_program()(torch.from_numpy(slots))
            return torch.sigmoid(self.network.head.eval()(server, torch.from_numpy(embedding))).numpy()


def question(entity="bakery", hour="7AM", budget=12.5, embedding=(0.5, -1.0, 0.25, 2.0), **changes):
    inputs = [
        {"name": "entity", "datatype": "BYTES", "shape": [1], "data": [entity]},
        {"name": "hour", "datatype": "BYTES", "shape": [1], "data": [hour]},
        {"name": "budget", "datatype": "FP32", "shape": [1], "data": [budget]},
        {"name": "device_embedding", "datatype": "FP32", "shape": [1, len(embedding)], "data": list(embedding)},
    ]
    return {"inputs": inputs} | changes


@pytest.fixture(scope="module")
def serving(kafka, triton, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    write_shops(folder / "shops.parquet")
    model = shop_model(folder / "shops.parquet")
    network = Network.build(model, seed=3)
    deployment_of(network, 2, NO_HASH, export(network, 2, folder / "triton")).write(folder / "deployments")
    apply(model, folder / "feast")
    materialize(model, folder / "feast", datetime.now(UTC))
    server = triton(folder / "triton")
    models = server.grpc
    worker = Service(
        "worker",
        command_line("worker", folder, kafka, "--feast", str(folder / "feast"), "--triton", models),
        ready=log_has("ready"),
    )
    reached = ["--feast", str(folder / "feast"), "--triton", models]
    first = gateway_service("gateway", folder, kafka, *reached, reply_partition=0)
    url = f"127.0.0.1:{first.ports['gateway']}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(first, folder / "logs"))
        client = stack.enter_context(httpx.Client(base_url=f"http://{url}", timeout=20))
        process = Process(worker, folder / "logs")
        served = Serving(folder, network, kafka, cache, url, worker, process, client, server)
        stack.callback(lambda: served.worker.stop())  # noqa: PLW0108  the worker of then
        served.worker.wait_ready()
        yield served


def command_line(process, folder, broker, *arguments):
    where = ["--deployments", str(folder / "deployments"), "--kafka", broker]
    return [sys.executable, "-m", "serving", process, *where, *arguments]


def gateway_service(name, folder, broker, *more, reply_partition):
    (port,) = free_ports(1)
    arguments = ["--port", str(port), "--reply-partition", str(reply_partition), *more]
    ready = http_ok(f"http://127.0.0.1:{port}/v2/health/ready")
    return Service(name, command_line("gateway", folder, broker, *arguments), ready, ports={"gateway": port})


def test_a_plain_client_of_the_protocol_gets_metadata_and_predictions(serving):
    """tritonclient.http, in binary and in JSON, is told what torch says offline, to 1e-4."""
    client = triton_http.InferenceServerClient(serving.url)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("shop")
    assert client.is_model_ready("shop", "2")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert [(i["name"], i["datatype"], i["shape"]) for i in client.get_model_metadata("shop")["inputs"]] == [
        ("entity", "BYTES", [-1]),
        ("hour", "BYTES", [-1]),
        ("budget", "FP32", [-1]),
        ("device_embedding", "FP32", [-1, SIZE]),
    ]
    shops, hours, budgets = list(SHOPS), ["7AM", "2PM", "9PM"], np.array([1, np.nan, 30], np.float32)
    embedding = np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32)
    expected = serving.offline(shops, hours, budgets, embedding)
    for binary in (True, False):
        budget = budgets if binary else np.array([1, 5, 30], np.float32)  # JSON has no NaN
        columns = {"entity": np.array(shops, object), "hour": np.array(hours, object), "budget": budget}
        inputs = []
        for name, values in {**columns, "device_embedding": embedding}.items():
            datatype = "FP32" if values.dtype == np.float32 else "BYTES"
            inputs.append(triton_http.InferInput(name, list(values.shape), datatype))
            inputs[-1].set_data_from_numpy(values, binary_data=binary)
        outputs = [triton_http.InferRequestedOutput(n, binary_data=binary) for n in ("prediction", "version", "merged")]
        answer = client.infer("shop", inputs, outputs=outputs, request_id="7")
        if not binary:
            expected = serving.offline(shops, hours, budget, embedding)
        np.testing.assert_allclose(answer.as_numpy("prediction"), expected, atol=1e-4)
        assert answer.as_numpy("version").tolist() == [2, 2, 2]
        assert [bytes(m) if binary else m.encode() for m in answer.as_numpy("merged")] == [b"server"] * 3
        assert answer.get_response()["id"] == "7"
    client.close()


def test_the_age_of_the_features_is_told(serving):
    """The rows were true an hour ago: 3,600,000 ms, and as long as this module runs."""
    outputs = {o["name"]: o["data"] for o in serving.infer().json()["outputs"]}
    assert 3_600_000 <= outputs["feature_age_ms"][0] < 3_600_000 + 600_000


REFUSED = {
    "unknown entity": ({"entity": "nowhere"}, 404, "unknown_entity"),
    "stale features": ({"entity": "ruin"}, 503, "stale_features"),
    "embedding too short": ({"embedding": (1.0, 2.0)}, 400, "bad_request"),
    "text for a number": ({"budget": "12"}, 400, "bad_request"),
    "number for text": ({"entity": 12}, 400, "bad_request"),
    "not finite as float32": ({"embedding": (1.0, 2.0, 3.0, 1e39)}, 400, "bad_request"),
    "no inputs": ({"inputs": []}, 400, "bad_request"),
    "unknown output": ({"outputs": [{"name": "mood"}]}, 400, "bad_request"),
}


@pytest.mark.parametrize(("changes", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_a_request_that_cannot_be_predicted_is_answered_with_its_reason(serving, changes, status, code):
    """The status says whose fault it is, the code why."""
    answer = serving.infer(**changes)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["error"]


def test_a_device_feature_sent_by_mistake_is_refused_by_name_and_not_echoed(serving):
    """Raw device data must not come here; if it does, it goes no further, not even into the answer."""
    asked = question()
    asked["inputs"].append({"name": "mood", "datatype": "FP32", "shape": [1], "data": [0.77]})
    answer = serving.client.post("/v2/models/shop/infer", content=json.dumps(asked))
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert "unknown input 'mood'" in answer.text
    assert "0.77" not in answer.text + (serving.folder / "logs/gateway.log").read_text()


@pytest.mark.parametrize("path", ["/v2/models/other/infer", "/v2/models/shop/versions/3/infer"])
def test_an_unknown_model_or_version_is_not_found(serving, path):
    """404, with the protocol's error object."""
    answer = serving.client.post(path, content=json.dumps(question()))
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")


def test_an_oversize_body_is_refused(serving):
    """Two megabytes are more than the gateway takes; it says so and still answers the next request."""
    answer = serving.client.post("/v2/models/shop/infer", content=b" " * (2 << 20))
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert serving.infer().status_code == 200


def test_nan_in_a_binary_embedding_is_refused(serving):
    """NaN has no JSON form, so it comes as a raw tensor."""
    asked = question()
    asked["inputs"][3].pop("data")
    asked["inputs"][3]["parameters"] = {"binary_data_size": 4 * SIZE}
    header = json.dumps(asked).encode()
    body = header + np.array([1, 2, np.nan, 4], np.float32).tobytes()
    sizes = {"Inference-Header-Content-Length": str(len(header))}
    answer = serving.client.post("/v2/models/shop/infer", content=body, headers=sizes)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


def test_garbage_in_the_topics_becomes_dead_letters_and_serving_goes_on(serving):
    """One letter per record that cannot be read: where it lay, its length and hash, and none of its bytes."""
    producer = kafka_python.KafkaProducer(bootstrap_servers=serving.broker)
    garbage = b"garbage \xff\x00 of thirty bytes, secret"
    sent = {t: producer.send(t, garbage, partition=0).get(10) for t in (DeviceEmbeddings.TOPIC, Predictions.TOPIC)}
    producer.close()
    for topic, record in sent.items():
        letter = next(read(serving.broker, DeadLetter.topic_for(topic)))
        assert b"secret" not in letter
        found = DeadLetter.model_validate_json(letter)
        assert (found.topic, found.partition, found.offset) == (topic, 0, record.offset)
        assert (found.length, found.sha256) == (len(garbage), sha256(garbage).hexdigest())
    assert serving.infer().status_code == 200


def read(broker, topic):
    """Values of a topic, from its beginning."""
    consumer = kafka_python.KafkaConsumer(
        topic, bootstrap_servers=broker, auto_offset_reset="earliest", consumer_timeout_ms=15_000
    )
    with contextlib.closing(consumer):
        yield from (record.value for record in consumer)


def test_kafkas_own_console_consumer_reads_the_topics(serving):
    """Records are Arrow streams, which name their columns, with the producer's time; a later one where it says more."""
    records = 2  # of which one may be the garbage of another test
    assert [serving.infer().status_code for _ in range(records)] == [200] * records
    for message in (DeviceEmbeddings, Predictions):
        arguments = ["--bootstrap-server", serving.broker, "--topic", message.TOPIC, "--from-beginning"]
        limits = [
            "--max-messages",
            str(records),
            "--timeout-ms",
            "30000",
            "--formatter-property",
            "print.timestamp=true",
        ]
        program = "org.apache.kafka.tools.consumer.ConsoleConsumer"
        command = local_kafka.command(serving.cache, program, *arguments, *limits)
        output = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
        assert output.startswith(b"CreateTime:")
        assert all(column.encode() in output for column in message.COLUMNS if column not in message.LATER)


def test_each_gateway_gets_its_own_answers_and_ends_in_order(serving):
    """A second one on reply partition 1 answers, and after SIGTERM exits with 0."""
    second = gateway_service("gateway-2", serving.folder, serving.broker, reply_partition=1)
    with running(second, serving.folder / "logs") as process:
        url = f"http://127.0.0.1:{second.ports['gateway']}/v2/models/shop/infer"
        assert httpx.post(url, content=json.dumps(question()), timeout=20).status_code == 200
        assert serving.infer().status_code == 200
    assert process.exit_status() == 0


@contextlib.contextmanager
def held(process):
    """A process stands still."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@contextlib.contextmanager
def tail(broker, message):
    """Gives what is written to a topic from now on: each message, and when its record was written."""
    consumer = kafka_python.KafkaConsumer(bootstrap_servers=broker, consumer_timeout_ms=15_000)
    with contextlib.closing(consumer):
        partitions = [kafka_python.TopicPartition(message.TOPIC, p) for p in range(PARTITIONS[message.TOPIC])]
        consumer.assign(partitions)
        for partition, end in consumer.end_offsets(partitions).items():
            consumer.seek(partition, end)
        yield ((message.from_bytes(record.value), record.timestamp) for record in consumer)


def ask_for_300_ms(serving):
    """The answer to a caller that waits no longer, and the seconds until it came."""
    begun = time.monotonic()
    answer = serving.infer(parameters={"timeout": 300_000})
    return answer, time.monotonic() - begun


def said_of(sent, answers):
    """What the worker says of a record of the gateway, and when."""
    return next(each for each in answers if each[0].request_id.tolist() == sent.request_id.tolist())


def test_who_waits_300_ms_is_told_in_time_and_triton_is_waited_for_no_longer(serving):
    """Triton stands still: 503 after 0.3 s, and the worker gives its call up then too, not at its own limit of 2 s."""
    assert serving.infer().status_code == 200
    with (
        tail(serving.broker, DeviceEmbeddings) as asked,
        tail(serving.broker, Predictions) as answers,
        held(serving.triton.pid),
    ):
        answer, took_s = ask_for_300_ms(serving)
        sent, _ = next(asked)
        found, said_ms = said_of(sent, answers)
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert 0.3 <= took_s < 1.5
    assert 0 < sent.deadline_ms[0] - sent.event_ms[0] <= 300
    assert found.status.tolist() == ["unavailable"]
    assert said_ms - sent.event_ms[0] < 1_500
    assert serving.infer().status_code == 200


def test_a_row_whose_caller_gave_up_is_dropped_by_the_worker_and_not_computed(serving):
    """The worker stands still past the caller's 300 ms, far below its own 5 s: it says so, and Triton counts no row."""
    assert serving.infer().status_code == 200
    head = Window.read(serving.folder / "deployments" / "shop.json").default.head
    with contextlib.closing(triton_http.InferenceServerClient(serving.triton.http)) as triton:

        def computed():
            return sum(model["inference_count"] for model in triton.get_inference_statistics(head)["model_stats"])

        before = computed()
        with tail(serving.broker, DeviceEmbeddings) as asked, tail(serving.broker, Predictions) as answers:
            with held(serving.worker.pid):
                answer, took_s = ask_for_300_ms(serving)
            sent, _ = next(asked)
            found, said_ms = said_of(sent, answers)
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert 0.3 <= took_s < 1.5
        assert (found.status.tolist(), found.fallback.tolist()) == (["unavailable"], ["none"])
        assert np.isnan(found.prediction).all()
        assert said_ms - sent.event_ms[0] < 5_000
        assert computed() == before
        assert serving.infer().status_code == 200
        assert computed() == before + 1


def test_a_killed_worker_loses_no_request(serving):
    """Requests before, while and after the worker is dead: each is predicted, or told that no answer came in time."""
    asked, killed = 300, threading.Event()

    def ask(number):
        if number == asked // 3:
            serving.worker._popen.send_signal(signal.SIGKILL)
            killed.set()
        answer = serving.infer(budget=float(number))
        return answer.status_code, answer.json().get("code")

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, number) for number in range(asked)]
        assert killed.wait(60)
        serving.worker.stop()
        serving.restart_worker()
        outcomes = [answer.result(timeout=60) for answer in answers]
    assert set(outcomes) <= {(200, None), (503, "unavailable")}
    assert outcomes.count((200, None)) > asked // 3
    assert serving.infer().status_code == 200


def test_a_version_promoted_later_is_served_without_a_restart(serving):
    """Gateway, worker and Triton take up version 5; its answers are its own network's."""
    promoted = Network.build(serving.network.model, seed=9)
    names = export(promoted, 5, serving.folder / "triton")
    first = deployment_of(promoted, 5, NO_HASH, names).write(serving.folder / "deployments")
    assert first.is_file()
    embedding = np.array([[0.5, -1.0, 0.25, 2.0]], np.float32)
    expected = replace(serving, network=promoted).offline(["bakery"], ["7AM"], [12.5], embedding)
    deadline = datetime.now(UTC) + timedelta(seconds=30)
    while (answer := serving.infer()).status_code != 200 or answer.json()["model_version"] != "5":
        assert datetime.now(UTC) < deadline
    np.testing.assert_allclose(answer.json()["outputs"][0]["data"], expected, atol=1e-4)


LEARNED = {"missing_server": (0.5, 0.25, -1.0, 2.0), "missing_device": (1.0, -0.5, 0.0, 0.25)}


@pytest.fixture(scope="module")
def declared(serving):
    """Publishes "shop" once more under another name, with another way to serve it; gives its outputs for a question."""
    versions = Window.read(serving.folder / "deployments" / "shop.json").versions
    (shop,) = (version for version in versions if version.version == 2)

    def publish(name, **how):
        served = shop.model_copy(update={"model": name, "serving": Declared(**how), **LEARNED})
        served.write(serving.folder / "deployments")
        deadline = datetime.now(UTC) + timedelta(seconds=30)
        while serving.client.get(f"/v2/models/{name}/ready").status_code != 200:
            assert datetime.now(UTC) < deadline

        def ask(without=(), **changes):
            asked = question(**changes)
            asked["inputs"] = [tensor for tensor in asked["inputs"] if tensor["name"] not in without]
            answer = serving.client.post(f"/v2/models/{name}/infer", content=json.dumps(asked))
            if answer.status_code != 200:
                return answer.json()
            return {o["name"]: o["data"][0] for o in answer.json()["outputs"]}

        return ask

    return publish


def merged(serving, server=None, device=None):
    """What torch's head says of the bakery at 7AM with 12.5, where a side is given in place of the tower's."""
    features = serving.network.model.server_features
    slots = features.slots(features.inputs({"kind": ["food"], "size": [12.0], "hour": ["7AM"], "budget": [12.5]}))
    device = question()["inputs"][3]["data"] if device is None else device
    with torch.no_grad():
        tower = serving.network.server_program()(torch.from_numpy(slots))
        sides = (tower if server is None else torch.tensor([server])), torch.tensor([device])
        return float(torch.sigmoid(serving.network.head.eval()(*sides)))


@pytest.mark.parametrize("transport", ["kafka", "direct"])
def test_both_transports_give_the_same_answer_and_name_themselves(serving, declared, transport):
    """Declared per model; each says how it went, and that nothing was missing."""
    found = declared(f"by-{transport}", transport=transport)()
    assert found["prediction"] == pytest.approx(merged(serving), abs=1e-5)
    assert (found["transport"], found["merged"]) == (transport, "server")
    assert (found["status"], found["fallback"]) == ("ok", "none")


@pytest.mark.parametrize("transport", ["kafka", "direct"])
def test_a_missing_side_is_answered_as_declared_and_named(serving, declared, transport):
    """Learned embeddings in the place of a missing side, a constant where both are missing; torch agrees to 1e-5."""
    fallbacks = {"missing_entity": "device-only", "stale_features": "constant", "missing_device": "server-only"}
    ask = declared(f"patient-{transport}", transport=transport, constant=0.25, **fallbacks)
    found = {
        "no entity": ask(entity="nowhere"),
        "old": ask(entity="ruin"),
        "no device": ask(without=["device_embedding"]),
        "neither": ask(entity="nowhere", without=["device_embedding"]),
    }
    assert {name: (row["status"], row["fallback"]) for name, row in found.items()} == {
        "no entity": ("unknown_entity", "device-only"),
        "old": ("stale_features", "constant"),
        "no device": ("missing_device", "server-only"),
        "neither": ("unknown_entity", "constant"),
    }
    assert [found["old"]["prediction"], found["neither"]["prediction"]] == [0.25, 0.25]
    assert found["no entity"]["prediction"] == pytest.approx(merged(serving, LEARNED["missing_server"]), abs=1e-5)
    assert found["no device"]["prediction"] == pytest.approx(
        merged(serving, device=LEARNED["missing_device"]), abs=1e-5
    )
    assert (found["no entity"]["feature_age_ms"], found["old"]["feature_age_ms"] > 3e10) == (-1, True)


def test_sigterm_ends_the_worker_in_order(serving):
    """It commits, leaves the group and exits with 0; nothing it answered comes again to the next."""
    assert serving.infer().status_code == 200
    serving.worker.stop()
    assert serving.worker.exit_status() == 0
    admin = kafka_python.KafkaAdminClient(bootstrap_servers=serving.broker)
    offsets = admin.list_group_offsets([GROUP])
    admin.close()
    ends = kafka_python.KafkaConsumer(bootstrap_servers=serving.broker)
    with contextlib.closing(ends):
        partitions = [kafka_python.TopicPartition(DeviceEmbeddings.TOPIC, p) for p in range(4)]
        written = {p: end for p, end in ends.end_offsets(partitions).items() if end}
    assert {p: o.offset for p, o in offsets[GROUP].items()} == written


def test_the_logs_hold_no_values(serving):
    """Neither entities, nor request features, whatever went wrong above."""
    logs = "".join(file.read_text() for file in (serving.folder / "logs").iterdir())
    assert "dead letter" in logs
    for value in (*SHOPS, "nowhere", "ruin", "7AM", "secret"):
        assert value not in logs
