import asyncio
import json
import math
import socket
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from device_runtime.answers import Answer, Results, read_answer
from device_runtime.client import InferenceClient
from device_runtime.merge import DeviceMerge
from device_runtime.program import EmbedProgram, PredictProgram, program_of
from device_runtime.store import Rows
from device_runtime.tests.test_client import Gateway, answer, ask, error, head
from hybrid.bundle import Alone, Bundle, Manifest, Parameter, TrainProgram
from hybrid.errors import BundleError, ConfigError
from hybrid.network import Network

NOW_MS = 1_000_000
SERVER = (0.5, -1.25)
LEARNED = (0.25, 0.75)
OK = {
    "server_embedding": list(SERVER),
    "version": [7],
    "feature_age_ms": [1200],
    "expires_ms": [NOW_MS + 5],
    "merged": ["device"],
    "transport": ["kafka"],
    "status": ["ok"],
    "fallback": ["none"],
}


def said(**changes) -> tuple[int, bytes]:
    outputs = [{"name": name, "data": data} for name, data in (OK | changes).items()]
    return 200, json.dumps({"outputs": outputs}).encode()


@pytest.fixture(scope="module")
def on_device(manifest: Manifest) -> Manifest:
    """Declares device-only for a server that is away, a constant for an answer that expired."""
    alone = Alone(unavailable="device-only", stale_features="constant", missing_server=LEARNED, constant=0.125)
    return manifest.model_copy(update={"merge": "device", "release": None, "alone": alone})


@pytest.fixture(scope="module")
def program(bundle: Bundle, on_device: Manifest) -> PredictProgram:
    return program_of(Bundle(on_device, bundle.programs))


def offline(network: Network, rows: Rows, server: tuple[float, ...]) -> np.ndarray:
    """What torch says of rows whose server side is `server`."""
    features = network.model.device_features
    inputs = torch.from_numpy(features.inputs(rows.features))
    with torch.no_grad():
        return torch.sigmoid(network.head(torch.tensor([server] * len(rows)), network.device_program()(inputs))).numpy()


def clock(moment: int = NOW_MS) -> dict:
    return {"now_ms": lambda: moment}


def test_the_device_predicts_what_torch_predicts(on_device, program, network, rows):
    """Three rows, missing values among them: torch's head over the same embeddings, to 1e-5; what came is kept."""
    answers = asyncio.run(ask(Gateway(lambda _: said()), on_device, program, rows, **clock()))
    np.testing.assert_allclose([a.prediction for a in answers], offline(network, rows, SERVER), atol=1e-5)
    assert {(a.status, a.fallback, a.merged, a.version) for a in answers} == {("ok", "none", "device", 7)}
    assert {(a.server_embedding, a.expires_ms, a.feature_age_ms) for a in answers} == {(SERVER, NOW_MS + 5, 1200)}


def test_nothing_of_the_device_leaves_it(on_device, program, rows):
    """The request holds entity and request features alone: no embedding, no feature's name, text, index or number."""
    gateway = Gateway(lambda _: said())
    asyncio.run(ask(gateway, on_device, program, rows, **clock()))
    _, document, raw = gateway.requests[0]
    assert json.loads(document) == {
        "inputs": [
            {"name": "entity", "datatype": "BYTES", "shape": [1], "data": ["shop-1"]},
            {"name": "time", "datatype": "BYTES", "shape": [1], "data": ["7AM"]},
            {"name": "distance", "datatype": "FP32", "shape": [1], "data": [1.5]},
        ]
    }
    assert raw == b""
    session = bytes(gateway.received)
    secrets = [b"embedding", b"mood", b"steps", b"temperature", b"Glasklar", b"Vertrackt"]
    for number in (7319.0, 10543.0, 83.4375, 71.8125):
        secrets += [f"{number:g}".encode(), *(struct.pack(form, number) for form in ("<f", ">f", "<d", ">d"))]
    assert [secret for secret in secrets if secret in session] == []


def test_what_the_gateway_fell_back_to_is_predicted_and_named(on_device, program, network, rows):
    """device-only: the learned embedding that it sent; constant: the bundle's 0.125, and no embedding."""
    missing = {"status": ["unknown_entity"], "expires_ms": [-1], "feature_age_ms": [-1]}
    alone = said(**missing, fallback=["device-only"], server_embedding=list(LEARNED))
    constant = said(**missing, fallback=["constant"], server_embedding=[None, None])
    gateway = Gateway(lambda number: (alone, constant)[number])
    first, second = asyncio.run(ask(gateway, on_device, program, head(rows, 2), **clock()))
    assert first.prediction == pytest.approx(float(offline(network, rows, LEARNED)[0]), abs=1e-5)
    assert (first.status, first.fallback, first.merged) == ("unknown_entity", "device-only", "device")
    assert (second.prediction, second.fallback, second.server_embedding) == (0.125, "constant", ())


@pytest.mark.parametrize(
    ("status", "content"),
    [
        said(version=[6]),
        said(server_embedding=[0.5]),
        said(server_embedding=[0.5, 1, 2]),
        said(server_embedding=[0.5, None]),
        said(server_embedding=[0.5, math.inf]),
        said(server_embedding=[0.5, 1e39]),
        said(server_embedding=["a", "b"]),
        said(expires_ms=[-1]),
        said(expires_ms=[-2]),
        said(expires_ms=[1 << 63]),
        said(expires_ms=[None]),
        said(fallback=["magic"]),
        said(status=["unavailable"]),
        said(merged=["server"]),
        (200, b'{"outputs": []}'),
        answer(),
    ],
)
def test_an_answer_that_cannot_be_used_is_said_to_be_bad(on_device, status: int, content: bytes):
    """Another version, width or merge, not finite, without an end, a prediction instead: never used."""
    assert read_answer(status, content, on_device)["status"] == "bad_answer"


def test_an_answer_that_has_expired_is_not_used(on_device, program, rows):
    """At its last millisecond it is; one later the bundle's constant answers, named, and nothing of it is kept."""
    for late, status, fallback in ((5, "ok", "none"), (6, "expired", "constant")):
        gateway = Gateway(lambda _: said())
        (got,) = asyncio.run(ask(gateway, on_device, program, head(rows, 1), **clock(NOW_MS + late)))
        assert (got.status, got.fallback, got.merged, got.attempts) == (status, fallback, "device", 1)
    assert (got.prediction, got.server_embedding, got.expires_ms, got.version) == (0.125, (), -1, 7)
    assert got.error == "the server's embedding has expired by the device's clock"


@pytest.mark.parametrize(
    ("respond", "status"),
    [
        (lambda _: error(503, "unavailable"), "unavailable"),
        (lambda _: error(429, "overloaded"), "overloaded"),
        (lambda _: (200, b"garbage"), "bad_answer"),
    ],
)
def test_a_device_without_an_answer_predicts_alone_where_that_is_declared(
    on_device, program, network, rows, respond, status
):
    """With the embedding of its own bundle; the result says why, and what answered."""
    (got,) = asyncio.run(ask(Gateway(respond), on_device, program, head(rows, 1), **clock()))
    assert got.prediction == pytest.approx(float(offline(network, rows, LEARNED)[0]), abs=1e-5)
    assert (got.status, got.fallback, got.merged, got.version) == (status, "device-only", "device", 7)
    assert got.error


def test_a_device_that_reaches_nobody_predicts_alone_where_that_is_declared(on_device, program, rows):
    """Nobody listens at a port just closed; without a declared fallback there is no prediction."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"

        async def session(manifest: Manifest) -> Answer:
            answers: list[Answer] = []
            async with InferenceClient(manifest, program, url) as client:
                await client.run(iter([head(rows, 1)]), answers.append)
            return answers[0]

        alone = asyncio.run(session(on_device))
        error = asyncio.run(session(on_device.model_copy(update={"alone": None})))
    assert (alone.status, alone.fallback, math.isnan(alone.prediction)) == ("unreachable", "device-only", False)
    assert (error.status, error.fallback, error.merged, error.version) == ("unreachable", "none", "", -1)
    assert math.isnan(error.prediction)


@pytest.mark.parametrize(
    ("status", "code"), [(404, "unknown_entity"), (503, "stale_features"), (410, "update_required")]
)
def test_an_error_that_the_gateway_explains_stays_one(on_device, program, rows, status: int, code: str):
    """The model declares what answers there, and it declared an error."""
    (got,) = asyncio.run(ask(Gateway(lambda _: error(status, code)), on_device, program, head(rows, 1)))
    assert (got.status, got.fallback, math.isnan(got.prediction)) == (code, "none", True)


def test_an_embedding_that_overflows_the_head_and_a_constant_that_is_not_declared_are_bad_answers(on_device, program):
    """Neither a head that gives no number nor a constant without one is passed on as a probability."""
    merge = DeviceMerge(on_device.model_copy(update={"alone": None}), program, lambda: NOW_MS)
    constant = Answer(1, 0, "unavailable", 200, fallback="constant")
    got = merge(constant, np.zeros((1, 3), np.float32))
    assert (got.status, got.fallback) == ("bad_answer", "none")
    infinite = replace(merge, program=Overflowing(program))
    got = infinite(Answer(1, 0, "ok", 200, server_embedding=SERVER), np.zeros((1, 3), np.float32))
    assert (got.status, got.server_embedding, math.isnan(got.prediction)) == ("bad_answer", (), True)


class Overflowing:
    """Whose head gives no number."""

    def __init__(self, program: PredictProgram):
        self.inputs = program.inputs

    def predict(self, inputs: np.ndarray, server: np.ndarray) -> float:
        return math.nan


def test_the_program_is_the_one_for_the_bundles_merge(bundle: Bundle, on_device: Manifest):
    """The other one would send what is to stay, or predict without what was sent."""
    assert isinstance(program_of(bundle), EmbedProgram)
    with pytest.raises(ConfigError, match="program must be EmbedProgram for merge='server', got PredictProgram"):
        InferenceClient(bundle.manifest, PredictProgram(bundle), "http://gateway")
    with pytest.raises(ConfigError, match="contribution must be left out for merge='device'"):
        InferenceClient(on_device, PredictProgram(bundle), "http://gateway", contribution=True)


def test_a_signed_program_that_does_not_merge_is_refused(bundle: Bundle):
    """The tower's program in its place takes no server embedding, or gives four numbers: a BundleError says which."""
    swapped = Bundle(bundle.manifest, {"predict.onnx": bundle.programs["embed.onnx"]})
    with pytest.raises(BundleError, match=r"program 'predict\.onnx'"):
        PredictProgram(swapped, "onnx").predict(np.zeros((1, 3), np.float32), np.zeros((1, 2), np.float32))


def test_the_contribution_is_asked_for_by_name_and_kept(manifest, bundle, rows, tmp_path):
    """Where the server merges: the outputs are named in the request, and what came stands in the results."""
    asked = {
        "prediction": 0.25,
        "status": "ok",
        "fallback": "none",
        "version": 7,
        "feature_age_ms": 5,
        "merged": "server",
    }
    outputs = [{"name": name, "data": [value]} for name, value in asked.items()]
    given = json.dumps({"outputs": [*outputs, {"name": "server_embedding", "data": list(SERVER)}]}).encode()
    gateway = Gateway(lambda _: (200, given))
    (got,) = asyncio.run(ask(gateway, manifest, EmbedProgram(bundle), head(rows, 1), contribution=True))
    assert (got.prediction, got.server_embedding) == (0.25, SERVER)
    wanted = [output["name"] for output in json.loads(gateway.requests[0][1])["outputs"]]
    assert set(wanted) == {*asked, "server_embedding"}
    without = read_answer(*answer(), manifest, contribution=True)
    assert without["status"] == "bad_answer"
    with Results(tmp_path / "results.parquet") as results:
        results.add(got)
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "results.parquet")
    assert table["server_embedding"].to_pylist() == [list(SERVER)]


def federated(manifest: Manifest) -> Manifest:
    """Of a version whose server tower devices train too: three slots go into it."""
    parameters = (Parameter(name="server_tower.0.weight", shape=(2, 3)), Parameter(name="head.bias", shape=(1,)))
    return manifest.model_copy(update={"train": TrainProgram(rows=8, server=3, missing=False, parameters=parameters)})


def test_a_device_that_trains_the_server_tower_asks_for_slots(manifest, on_device, bundle, program, rows):
    """By name; null is a missing value, and the numbers are as float32 has them. One that merges has the embedding too.

    Without asking, a device that merges is given no slots.
    """
    slots = [0.1, None, 2.0]
    both = said(server_slots=slots)
    gateway = Gateway(lambda _: both)
    asked = federated(on_device)
    (got,) = asyncio.run(ask(gateway, asked, program, head(rows, 1), **clock(), contribution=True))
    np.testing.assert_array_equal(np.float32(got.server_slots), np.array([0.1, np.nan, 2.0], np.float32))
    assert (got.server_embedding, got.merged) == (SERVER, "device")
    wanted = [output["name"] for output in json.loads(gateway.requests[0][1])["outputs"]]
    expected = {"server_embedding", "expires_ms", "version", "feature_age_ms", "merged", "status", "fallback"}
    assert set(wanted) == {*expected, "server_slots"}
    (unasked,) = asyncio.run(ask(Gateway(lambda _: both), asked, program, head(rows, 1), **clock()))
    assert (unasked.server_embedding, unasked.server_slots) == (SERVER, ())
    about = {"prediction": 0.25, "status": "ok", "fallback": "none", "version": 7, "feature_age_ms": 5}
    outputs = [{"name": name, "data": [value]} for name, value in (about | {"merged": "server"}).items()]
    given = json.dumps({"outputs": [*outputs, {"name": "server_slots", "data": slots}]}).encode()
    gateway = Gateway(lambda _: (200, given))
    (got,) = asyncio.run(ask(gateway, federated(manifest), EmbedProgram(bundle), head(rows, 1), contribution=True))
    assert (got.prediction, len(got.server_slots), got.server_embedding) == (0.25, 3, ())


@pytest.mark.parametrize(
    "slots", [None, [1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 1e39], ["a", "b", "c"], [[1, 2, 3]]]
)
def test_slots_that_cannot_be_the_servers_are_a_bad_answer(on_device, slots):
    """Absent, of another width, past float32, no numbers; of a row that a fallback answers, they are not looked at."""
    changes = {} if slots is None else {"server_slots": slots}
    asked = federated(on_device)
    assert read_answer(*said(**changes), asked, contribution=True)["status"] == "bad_answer"
    fallback = {"status": ["unknown_entity"], "fallback": ["device-only"], "expires_ms": [-1]}
    assert read_answer(*said(**changes, **fallback), asked, contribution=True)["server_slots"] == ()


def test_the_summary_counts_what_fell_back(tmp_path):
    """Of three requests one was not answered, all three are predicted, two by a fallback."""
    with Results(tmp_path / "results.parquet") as results:
        results.add(Answer(1, 0, "ok", 200, 0.25, 7))
        results.add(Answer(1, 1, "unknown_entity", 200, 0.25, 7, fallback="device-only"))
        results.add(Answer(2, 0, "unreachable", 0, 0.125, 7, fallback="constant"))
    summary = results.summary()
    assert (summary["requests"], summary["answered"], summary["predicted"]) == (3, 2, 3)
    assert summary["fallbacks"] == {"device-only": 1, "constant": 1}
