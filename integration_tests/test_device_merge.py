"""The merge on the device, and the server's contribution: real Kafka, Triton and Feast, devices as processes."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import tritonclient.grpc as triton_grpc
from typer.testing import CliRunner

from device_runtime.rows import Rows
from device_runtime.store import Store
from device_runtime.trainer import Trainer
from feature_store import offline
from feature_store.materialize import apply, materialize
from hybrid.bundle import read_bundle, signing_key, trusted_key, write_bundle
from hybrid.cli import app
from hybrid.deployment import Window
from hybrid.federation.engine import Engine
from hybrid.federation.population import Examples
from hybrid.local.process import Process, Service, free_ports, http_ok, log_has, running
from hybrid.local_training import LocalTraining
from hybrid.messages import BadMessage, DeviceEmbeddings, Predictions
from hybrid.network import Network
from hybrid.plan import Local, Policy, TrainPlan
from hybrid.registry import Registry
from hybrid.spec import Clear, Serving, Training, load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace
from serving.connection import Broker
from serving.kafka import lying_in

MODEL = Path(__file__).with_name("stall_model.py").read_text()
SHOPS = {"bakery": 1.0, "kiosk": 2.5, "cinema": 6.0}
LEARNED = np.array([0.5, 0.25, -1.0, 2.0], np.float32)
TRAINING = TrainingRecord(
    kind="federated",
    run="r",
    population="p",
    users=9,
    examples=9,
    epsilon=8,
    delta=9e-4,
    settings=Training(server_tower="federated"),
)
AGE_MS, MAX_AGE_MS = 3_600_000, 30 * 86_400_000
TRANSPORTS = ("kafka", "direct")
STORE_KEY = bytes(range(32))
ROUND = Local(steps=3, lr=0.5)


@dataclass
class World:
    """One network, promoted for a merge on the device, and published under other names for the other ways."""

    workspace: Workspace
    network: Network
    rows: Rows
    broker: str
    gateway: int
    grpc: int
    closed: str  # a gateway that asks for API keys
    key: Path

    def run(self, name, folder, *more, gateway=None, **environment):
        """Devices that ask for model `name`, once they have ended, and their results' file."""
        store, out = folder / "rows.sqlite", folder / "results.parquet"
        bundle, trust = self.workspace.bundles / f"{name}-1.bundle", self.workspace.keys / "bundle-signing.pub"
        if not store.exists():
            manifest = read_bundle(bundle.read_bytes(), trusted_key(trust)).manifest
            with Store.open(store, STORE_KEY, manifest) as kept:
                kept.write(self.rows, time.time_ns() // 1_000_000)
        files = ["--bundle", bundle, "--trust", trust, "--store", store, "--out", out]
        url = gateway or f"http://127.0.0.1:{self.gateway}"
        command = [sys.executable, "-m", "device_runtime", "infer", *files, "--gateway", url, *more]
        environment = os.environ | {"HYBRID_STORE_KEY": STORE_KEY.hex()} | environment
        options = {"capture_output": True, "text": True, "timeout": 150, "env": environment}
        return subprocess.run([*map(str, command)], check=False, **options), out

    def infer(self, name, folder, *more, gateway=None, **environment):
        """Exit status, summary and results of devices that ask for model `name`."""
        done, out = self.run(name, folder, *more, gateway=gateway, **environment)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout), pq.read_table(out).to_pandas().sort_values(["device", "row"])

    def embeddings(self):
        """(n, a) what torch's server tower says of each row; the learned one where the shop is not known."""
        features = self.network.model.server_features
        size = [SHOPS.get(shop) for shop in self.rows.entity]
        slots = features.slots(features.inputs({"size": size, **self.rows.request}))
        with torch.no_grad():
            server = self.network.server_program()(torch.from_numpy(slots)).numpy()
        return np.where([[shop in SHOPS] for shop in self.rows.entity], server, LEARNED)

    def slots(self):
        """(n, 2) what the offline join says of the shops that are known, and the request of each row."""
        model = self.network.model
        known = np.array([shop for shop in self.rows.entity if shop in SHOPS], object)
        request = model.request_features.slots(model.request_features.inputs(self.rows.request))
        return np.concatenate([offline.join(model, known, None, self.workspace.feast), request[: len(known)]], axis=1)

    def bundle(self, name):
        """A model's, verified."""
        trusted = trusted_key(self.workspace.keys / "bundle-signing.pub")
        return read_bundle((self.workspace.bundles / f"{name}-1.bundle").read_bytes(), trusted)

    def simulator(self, slots, labels):
        """Training of the first `len(slots)` devices, of a row each, by the simulator."""
        model = self.network.model
        own = model.device_features
        device = own.encode(own.slots(own.inputs(self.rows.features)))[: len(slots)]
        offsets = np.arange(len(slots) + 1)
        examples = Examples(model.server_features.encode(slots), device, labels, offsets, "stalls")
        local = LocalTraining(steps=ROUND.steps, lr=ROUND.lr)
        return Engine.build(self.network, examples, local, federate_server_tower=True)

    def predictions(self, server):
        """(n,) what torch says of each row whose server side is `server`."""
        inputs = self.network.model.device_features.inputs(self.rows.features)
        with torch.no_grad():
            device = self.network.device_program()(torch.from_numpy(inputs))
            return torch.sigmoid(self.network.head.eval()(torch.from_numpy(server), device)).numpy()


def rows_of():
    """Six devices of a row each, missing values among them; the last asks about a shop that nobody knows."""
    return Rows(
        device=np.arange(6),
        row=np.zeros(6, np.int64),
        entity=["bakery", "kiosk", "cinema", "bakery", "kiosk", "nowhere"],
        request={"budget": [0.5, -1.25, None, 3.0, 0.0, 1.5]},
        features={
            "mood": ["Zufrieden-Glasklar", "Missmutig-Vertrackt", None, "unheard of", "Zufrieden-Glasklar", None],
            "steps": [7319.0, 10543.0, 83.4375, None, 71.8125, 4711.0],
        },
    )


def promoted(folder, environment):
    """A registered version with weights of a seed, promoted by the command."""
    now = datetime.now(UTC)
    times = [now - timedelta(milliseconds=AGE_MS)] * len(SHOPS)
    columns = {"shop_id": list(SHOPS), "size": list(SHOPS.values()), "event_timestamp": times}
    pd.DataFrame(columns).to_parquet(folder / "sizes.parquet")
    (folder / "model.py").write_text(MODEL)
    workspace, model = Workspace(folder / ".hybrid"), load_model(folder / "model.py")
    network = Network.build(model, seed=5)
    learned = network.weights() | {"missing.server.weight": LEARNED[:, None]}
    network.load_weights(learned)
    registry = Registry(workspace)
    registry.register(model, network.description(), folder / "model.py")
    digest = registry.definition_hash("stall")
    registry.create_version("stall", weights=learned, training=TRAINING, curves={}, expected_hash=digest)
    apply(model, workspace.feast)
    materialize(model, workspace.feast, now)
    done = CliRunner().invoke(app, ["promote", "stall", "1", "production"], env=environment)
    assert done.exit_code == 0, done.output
    assert "Callers are given the server tower's embedding" in done.output
    assert "Callers who ask are given the server's features" in done.output
    return workspace, network


def publish(workspace, name, merge, serving, contributes):
    """The promoted version again: its deployment and its bundle under another name, merged another way.

    Where its embedding is contributed it is one that no device trains.
    """
    served = Window.read(workspace.deployments / "stall.json").default
    told = {"model": name, "merge": merge, "serving": serving, "contributes": contributes}
    served.model_copy(update=told).write(workspace.deployments)
    trusted = trusted_key(workspace.keys / "bundle-signing.pub")
    stall = read_bundle((workspace.bundles / "stall-1.bundle").read_bytes(), trusted)
    how = {"model": name, "merge": merge}
    if merge == "server":
        how |= {"release": Clear(reason="random weights in a test"), "alone": None}
    programs = dict(stall.programs)
    if contributes == "embedding":
        del programs["train.pte"]
        how |= {"train": None}
    manifest = stall.manifest.model_copy(update=how)
    write_bundle(workspace.bundles / f"{name}-1.bundle", manifest, programs, signing_key(workspace.keys))


@pytest.fixture(scope="module")
def world(kafka, triton, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("device-merge")
    workspace, network = promoted(folder, {"HYBRID_HOME": str(folder / ".hybrid"), "HYBRID_CACHE": str(cache)})
    declared = network.model.serving
    publish(workspace, "stall_direct", "device", declared.model_copy(update={"transport": "direct"}), "slots")
    for transport in TRANSPORTS:
        giving = Serving(transport=transport, contribution=True, missing_entity="device-only")
        publish(workspace, f"giving_{transport}", "server", giving, "embedding")
        publish(workspace, f"sharing_{transport}", "server", giving, "slots")
    publish(workspace, "silent", "server", Serving(), "embedding")
    models = ["--feast", str(workspace.feast), "--triton", triton(workspace.triton).grpc]
    port, grpc, closed = free_ports(3)
    keys, key = folder / "keys", folder / "api-key"
    issue = [sys.executable, "-m", "serving", "api-key", "stall-app", "--file", str(keys)]
    key.touch(0o600)
    key.write_text(subprocess.run(issue, capture_output=True, text=True, check=True).stdout)

    def serving(process, *arguments, ready, **options):
        where = ["--deployments", str(workspace.deployments), "--kafka", kafka, *models, *arguments]
        return Service(process, [sys.executable, "-m", "serving", process, *where], ready=ready, **options)

    ready = http_ok(f"http://127.0.0.1:{port}/v2/health/ready")
    gateway = serving("gateway", "--port", str(port), "--grpc-port", str(grpc), "--reply-partition", "4", ready=ready)
    url = f"http://127.0.0.1:{closed}"
    asking = ["--port", str(closed), "--reply-partition", "5", "--api-keys", str(keys)]
    asking = replace(serving("gateway", *asking, ready=http_ok(f"{url}/v2/health/ready")), name="closed")
    with running(gateway, folder / "logs"), running(asking, folder / "logs"):
        worker = Process(serving("worker", ready=log_has("ready")), folder / "logs")
        try:
            worker.wait_ready()
            yield World(workspace, network, rows_of(), kafka, port, grpc, url, key)
        finally:
            worker.stop()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_device_predicts_what_torch_predicts_and_nothing_of_it_is_sent(
    world: World, recording, transport, tmp_path: Path
):
    """Six rows over each transport, the last of a shop that nobody knows; predictions and server embeddings to 1e-5.

    What the devices sent has entity and budget, and neither the name, the text nor a number of a device feature, nor an
    embedding.
    """
    name = {"kafka": "stall", "direct": "stall_direct"}[transport]
    asked_ms = time.time_ns() // 1_000_000
    with recording(world.gateway) as recorder:
        status, summary, results = world.infer(name, tmp_path, gateway=recorder.url)
    assert (status, summary["predicted"], summary["statuses"]) == (0, 6, {"ok": 5, "unknown_entity": 1})
    assert summary["fallbacks"] == {"device-only": 1}
    server = world.embeddings()
    np.testing.assert_allclose(np.stack(results["server_embedding"]), server, atol=1e-5)
    np.testing.assert_allclose(results["prediction"], world.predictions(server), atol=1e-5)
    assert set(results["merged"]) == {"device"}
    assert set(results["version"]) == {1}
    fresh, last = results[:-1], results[-1:]
    assert fresh["feature_age_ms"].between(AGE_MS, AGE_MS + 600_000).all()
    # The features were true an hour before they were materialised, some moments before they were asked for.
    expected_ms = asked_ms - AGE_MS + MAX_AGE_MS
    assert fresh["expires_ms"].between(expected_ms - 600_000, expected_ms).all()
    assert last["expires_ms"].tolist() == [-1]
    sent = b"".join(recorder.sent)
    assert sent.count(b"POST /v2/models/" + name.encode() + b"/versions/1/infer") == 6
    assert b'"bakery"' in sent
    secrets = [b"embedding", b"mood", b"steps", b"Glasklar", b"Vertrackt", b"unheard of"]
    inputs = world.network.model.device_features.inputs(world.rows.features)
    with torch.no_grad():
        device = world.network.device_program()(torch.from_numpy(inputs)).numpy()
    for number in (7319.0, 10543.0, 83.4375, 71.8125, 4711.0, *device.ravel().tolist()):
        secrets += [f"{number:g}".encode(), repr(number).encode(), struct.pack("<f", number), struct.pack("<d", number)]
    assert [secret for secret in secrets if secret in sent] == []


def of_model(message_type, broker, name):
    for record in lying_in(Broker(broker), message_type.TOPIC):
        with contextlib.suppress(BadMessage):  # another module's
            message = message_type.from_bytes(record.value)
            if message.model == name:
                yield message


def test_what_lies_in_kafka_holds_nothing_of_the_device(world: World, tmp_path: Path):
    """Records of a model that merges on the device have embeddings of width 0; the answers have no prediction."""
    assert world.infer("stall", tmp_path)[0] == 0
    asked = list(of_model(DeviceEmbeddings, world.broker, "stall"))
    assert {message.embedding.shape[1] for message in asked} == {0}
    answers = list(of_model(Predictions, world.broker, "stall"))
    assert {message.server_embedding.shape[1] for message in answers} == {4}
    assert all(np.isnan(message.prediction).all() for message in answers)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_enrolled_device_is_given_what_the_server_contributed(world: World, transport, tmp_path: Path):
    """Beside each prediction the tower's embedding, the learned one where that was used; torch agrees to 1e-5.

    The store keeps the tower's.
    """
    status, summary, results = world.infer(f"giving_{transport}", tmp_path, "--contribution")
    assert (status, summary["statuses"]) == (0, {"ok": 5, "unknown_entity": 1})
    server = world.embeddings()
    np.testing.assert_allclose(np.stack(results["server_embedding"]), server, atol=1e-5)
    np.testing.assert_allclose(results["prediction"], world.predictions(server), atol=1e-5)
    assert set(results["merged"]) == {"server"}
    assert results["fallback"].tolist() == ["none"] * 5 + ["device-only"]
    with Store.open(tmp_path / "rows.sqlite", STORE_KEY) as kept:  # what a fallback answered is no example
        contributed = [event["inference"]["server"] for event in kept.export()]
    assert contributed == [*(row.tolist() for row in results["server_embedding"][:-1]), []]
    _, _, results = world.infer(f"giving_{transport}", tmp_path)
    assert [len(row) for row in results["server_embedding"]] == [0] * 6
    np.testing.assert_allclose(results["prediction"], world.predictions(server), atol=1e-5)


SLOTS_OF = ["sharing_kafka", "sharing_direct", "stall", "stall_direct"]


@pytest.mark.parametrize("name", SLOTS_OF)
def test_a_device_that_trains_the_server_tower_is_given_its_slots_and_trains_with_them(world: World, name, tmp_path):
    """For either merge: the offline join's to the bit, a missing budget among them; of a shop nobody knows, none.

    The store keeps them, and each device's training over them moves as the simulator's does, to 1e-4.
    """
    status, summary, results = world.infer(name, tmp_path, "--contribution")
    assert (status, summary["statuses"]) == (0, {"ok": 5, "unknown_entity": 1})
    slots = world.slots()
    given = results["server_slots"].tolist()
    np.testing.assert_array_equal(np.stack(given[:-1]), slots)
    assert (np.isnan(slots).sum(), given[0].dtype, len(given[-1])) == (1, np.float32, 0)
    np.testing.assert_allclose(results["prediction"], world.predictions(world.embeddings()), atol=1e-5)
    labels = np.array([1, 0, 1, 1, 0], np.float32)
    bundle, now_ms = world.bundle(name), time.time_ns() // 1_000_000
    simulator = world.simulator(slots, labels)
    weights = simulator.side.flat()
    plan = TrainPlan(
        id=f"{1:032x}",
        model=name,
        version=1,
        definition_hash=bundle.manifest.definition_hash,
        parameters=len(weights),
        expires_ms=now_ms + 600_000,
        policy=Policy(separation_s=0, participations=9),
        local=ROUND,
        clip=100.0,
    )
    moved = []
    with Store.open(tmp_path / "rows.sqlite", STORE_KEY, bundle.manifest) as kept:
        for device, label in enumerate(labels):
            kept.label(int(label), now_ms, inference=kept.id_of(device, 0))
            examples = kept.examples(device, 9, now_ms)
            np.testing.assert_array_equal(examples.server, slots[device : device + 1])
            inputs = bundle.manifest.features.inputs(examples.features)
            what = (examples.server, inputs, examples.labels)
            moved.append(Trainer(bundle).train(plan, weights, *what, lambda: True, np.random.default_rng(0)))
        kept.label(1, now_ms, inference=kept.id_of(5, 0))
        assert len(kept.examples(5, 9, now_ms)) == 0
    expected = np.concatenate(list(simulator.updates(weights, np.arange(5))))
    assert np.linalg.norm(expected, axis=1).min() > 0.1
    np.testing.assert_allclose(np.stack(moved), expected, atol=1e-4)


def test_slots_are_given_to_those_who_ask_by_name(world: World):
    """tritonclient.grpc, over both transports: three rows as a matrix; no other model has such an output."""
    with contextlib.closing(triton_grpc.InferenceServerClient(f"127.0.0.1:{world.grpc}")) as client:
        entity, budget = np.array(list(SHOPS), object), np.array([0.5, -1.25, np.nan], np.float32)
        inputs = [triton_grpc.InferInput("entity", [3], "BYTES"), triton_grpc.InferInput("budget", [3], "FP32")]
        for tensor, values in zip(inputs, (entity, budget), strict=True):
            tensor.set_data_from_numpy(values)
        wanted = [triton_grpc.InferRequestedOutput("server_slots")]
        for name in ("stall", "stall_direct"):
            answer = client.infer(name, inputs, outputs=wanted)
            np.testing.assert_array_equal(answer.as_numpy("server_slots"), world.slots()[:3])
            assert client.infer(name, inputs).as_numpy("server_slots") is None
        with pytest.raises(triton_grpc.InferenceServerException, match="devices do not train the server tower"):
            client.infer("giving_kafka", inputs, outputs=wanted)


def test_a_model_that_declares_no_contribution_gives_none(world: World, tmp_path: Path):
    """Each device that asks is told so, with 400; nobody else is disturbed."""
    status, summary, results = world.infer("silent", tmp_path, "--contribution")
    assert (status, summary["statuses"], set(results["http_status"])) == (0, {"bad_request": 6}, {400})
    assert results["error"].str.contains("serving.contribution is not declared").all()
    assert world.infer("silent", tmp_path)[1]["statuses"] == {"ok": 5, "unknown_entity": 1}


def test_an_embedding_sent_by_mistake_is_refused_and_not_echoed(world: World):
    """By name, over HTTP; the metadata has no such input, and the embedding of the server as an output."""
    model = f"http://127.0.0.1:{world.gateway}/v2/models/stall"
    inputs = [
        {"name": "entity", "datatype": "BYTES", "shape": [1], "data": ["bakery"]},
        {"name": "budget", "datatype": "FP32", "shape": [1], "data": [0.5]},
        {"name": "device_embedding", "datatype": "FP32", "shape": [1, 4], "data": [0.77, 1, 2, 3]},
    ]
    refused = httpx.post(f"{model}/infer", json={"inputs": inputs})
    assert (refused.status_code, refused.json()["code"]) == (400, "bad_request")
    assert "'device_embedding' must not be sent: stall merges on the device" in refused.text
    assert "0.77" not in refused.text
    metadata = httpx.get(model).json()
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["entity", "budget"]
    assert {"name": "server_embedding", "datatype": "FP32", "shape": [-1, 4]} in metadata["outputs"]


@pytest.mark.parametrize("name", ["stall", "stall_direct"])
def test_a_plain_client_of_the_protocol_gets_server_embeddings_over_grpc(world: World, name):
    """tritonclient.grpc: three rows of one request, as matrix; torch agrees to 1e-5."""
    with contextlib.closing(triton_grpc.InferenceServerClient(f"127.0.0.1:{world.grpc}")) as client:
        entity, budget = np.array(list(SHOPS), object), np.array([0.5, -1.25, np.nan], np.float32)
        inputs = [triton_grpc.InferInput("entity", [3], "BYTES"), triton_grpc.InferInput("budget", [3], "FP32")]
        for tensor, values in zip(inputs, (entity, budget), strict=True):
            tensor.set_data_from_numpy(values)
        answer = client.infer(name, inputs)
        assert answer.as_numpy("prediction") is None
        np.testing.assert_allclose(answer.as_numpy("server_embedding"), world.embeddings()[:3], atol=1e-5)
        assert (answer.as_numpy("expires_ms") > time.time_ns() // 1_000_000).all()
        assert answer.as_numpy("merged").tolist() == [b"device"] * 3


def test_a_device_that_reaches_nobody_predicts_as_its_bundle_declares(world: World, tmp_path: Path):
    """Nobody listens: each row is "unreachable" and predicted with the learned embedding; the exit status says so."""
    (port,) = free_ports(1)
    status, summary, results = world.infer("stall", tmp_path, gateway=f"http://127.0.0.1:{port}")
    assert (status, summary["answered"], summary["predicted"]) == (1, 0, 6)
    assert summary["fallbacks"] == {"device-only": 6}
    alone = np.repeat(LEARNED[None], 6, axis=0)
    np.testing.assert_allclose(results["prediction"], world.predictions(alone), atol=1e-5)
    assert set(results["status"]) == {"unreachable"}


@pytest.mark.parametrize("place", ["file", "environment"])
def test_devices_show_their_api_key_to_a_gateway_that_asks_for_one(world: World, recording, place, tmp_path: Path):
    """From a file or the environment, with each of six requests; it stands in nothing that they print or keep."""
    key = world.key.read_text().strip()
    given = {"file": (["--api-key-file", world.key], {}), "environment": ([], {"HYBRID_API_KEY": key})}
    arguments, environment = given[place]
    with recording(int(world.closed.rpartition(":")[2])) as recorder:
        done, out = world.run("stall", tmp_path, *arguments, gateway=recorder.url, **environment)
    assert (done.returncode, json.loads(done.stdout)["statuses"]) == (0, {"ok": 5, "unknown_entity": 1})
    np.testing.assert_allclose(
        pq.read_table(out).to_pandas().sort_values("device")["prediction"],
        world.predictions(world.embeddings()),
        atol=1e-5,
    )
    assert b"".join(recorder.sent).count(f"Authorization: Bearer {key}\r\n".encode()) == 6
    kept = [file.read_bytes() for file in tmp_path.iterdir()]
    assert not any(key.encode() in text for text in [*kept, done.stdout.encode(), done.stderr.encode()])


def test_devices_whose_key_the_gateway_does_not_take_say_so(world: World, tmp_path: Path):
    """Without one, with another, and with a file that others read: exit status 1, and one sentence says what to do."""
    wrong, loose = tmp_path / "wrong", tmp_path / "loose"
    for file, mode in ((wrong, 0o600), (loose, 0o644)):
        file.write_text("hybrid_0123456789abcdef_wrong")
        file.chmod(mode)
    for arguments, sentence in (
        ([], "error: the gateway asks for an API key (401): set HYBRID_API_KEY, or name a file with --api-key-file"),
        (["--api-key-file", wrong], "error: the gateway does not know the API key, or no longer (401): "),
        (["--api-key-file", loose], "error: the API key's file loose must be readable by its owner only (chmod 600)"),
    ):
        done, _ = world.run("stall", tmp_path, *arguments, gateway=world.closed)
        assert (done.returncode, done.stdout) == (1, "")
        *chatter, said = done.stderr.splitlines()  # ExecuTorch's, before
        assert said.startswith(sentence)
        assert not any("error" in line or "Traceback" in line for line in chatter)
