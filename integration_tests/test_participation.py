"""Devices take part in training: real processes, stores, bundles and training, an HTTP peer, and what crosses the wire.

The peer stands in for the aggregator: it hands a cohort one signed plan and takes each update once, as
`hybrid.plan` says.
"""

import contextlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from device_runtime.bundles import Installed
from device_runtime.eligibility import Reason
from device_runtime.protocol import Upload
from device_runtime.rows import Rows
from device_runtime.store import Served, Store
from hybrid import Categorical, Clear, Entity, HybridModel, Label, Log1p, Numeric, Privacy, Server, Serving, View
from hybrid.bundle import Manifest, signing_key, trusted_key, write_bundle
from hybrid.errors import UpdateError
from hybrid.export.executorch import device_programs
from hybrid.export.training import training_program
from hybrid.federation.engine import Engine
from hybrid.federation.population import Examples
from hybrid.local_training import LocalTraining
from hybrid.network import Network
from hybrid.plan import MAX_PAYLOAD, CheckIn, Halt, Local, Policy, TrainPlan, sign
from hybrid.privacy.mechanisms import clip_rows
from hybrid.protocol import HEADER_LENGTH
from hybrid.update import decode

WORDS = tuple(f"mood-{number:03}" for number in range(300))


class Match(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, server, device):
        return self.linear(torch.cat([server, device], dim=1)).squeeze(-1)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


MODEL = HybridModel(
    name="kiosk",
    server=Server(
        service="kiosks",
        entity=Entity(name="shop", join_key="shop_id"),
        views=(View(name="shops", source=Path("shops.parquet"), features={"size": Numeric(mean=3, std=2)}),),
        max_feature_age=timedelta(hours=1),
    ),
    request={"budget": Numeric()},
    device={"mood": Categorical(vocabulary=WORDS), "steps": Log1p(mean=8, std=2), "warmth": Numeric(mean=60, std=20)},
    server_tower=lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 4)),
    device_tower=lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 4)),
    head=Match,
    label=Label(column="bought", visible_to="server"),
    privacy=Privacy(epsilon=8, delta=1e-4, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="a test of devices that take part"),
    serving=Serving(contribution=True),
)
SHOPS = {"bakery": 1.0, "kiosk": 2.5, "cinema": 6.0}
LAX = Policy(separation_s=0, participations=1000)
GOOD = {"consent": True, "charging": True, "battery": 0.9, "idle": True, "metered": False, "thermal": "nominal"}
GOOD["free_bytes"] = 1 << 30
USERS = 20
ROUND = Local(steps=3, lr=0.5)
LONG = Local(epochs=1000, batch=1, lr=1e-7)  # some ten seconds of a device with 60 examples


@dataclass
class Peer:
    """The aggregator's stand-in, on a port of its own; and a gateway's, for inference.

    It keeps no more than it needs to sum: the clipped total, and each upload's bytes to tell a repeat from a forgery.

    Attributes:
        plan: signed, for everybody; None: 204.
        plans: id -> plan, of which updates are taken.
        check_in: in place of the plan's answer: (status, headers, body).
        lose: how many uploads are taken and then not answered.
        busy: how many uploads are answered 503 with Retry-After, and not taken.
        hold: where set, an upload waits for it before (`"before"`) or after (`"after"`) it is taken, once.
        held: set once an upload waits.
        uploads: (plan, upload) -> body.
        total: plan -> sum of clipped updates.
        attempts: how many uploads were tried.
        predict: (entity, budget) -> the answer's outputs.
    """

    plan: bytes | None = None
    plans: dict = field(default_factory=dict)
    check_in: tuple | None = None
    lose: int = 0
    busy: int = 0
    hold: str = ""
    held: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    uploads: dict = field(default_factory=dict)
    total: dict = field(default_factory=dict)
    attempts: int = 0
    check_ins: list = field(default_factory=list)
    predict: Callable | None = None
    port: int = 0

    def __enter__(self):
        peer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                peer.asked(self, body)

            def do_PUT(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if len(body) == int(self.headers["Content-Length"]):  # else the device died
                    peer.sent(self, body)

            def log_message(self, *_):
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._lock = threading.Lock()
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def offer(self, world: "World", plan: TrainPlan, moved: float = 1.0) -> TrainPlan:
        """Hands a plan out from now on, with the network's weights times `moved`."""
        self.plan, self.plans[plan.id] = sign(plan, world.key, world.weights * np.float32(moved)), plan
        return plan

    def asked(self, request, body):
        if request.path != "/v1/check-in":
            self._reply(request, 200, self.predict(request, body), {"Content-Type": "application/json"})
            return
        self.check_ins.append(CheckIn.model_validate_json(body))
        if self.check_in is not None:
            status, headers, body = self.check_in
            self._reply(request, status, body, headers)
        elif self.plan is None:
            self._reply(request, 204, b"", {"Retry-After": "5"})
        else:
            self._reply(request, 200, self.plan, {"Set-Cookie": "device=7", "ETag": '"7"'})

    def sent(self, request, body):
        found = re.fullmatch(r"/v1/plans/([0-9a-f]{32})/updates/([0-9a-f]{32})", request.path)
        with self._lock:
            self.attempts += 1
            if self.busy:
                self.busy -= 1
                return self._reply(request, 503, b"", {"Retry-After": "1"})
            if self.hold == "before":
                self._wait()
                return None
            status = self._take(found[1], found[2], body)
            if self.hold == "after":
                self._wait()
                return None
            if self.lose:
                self.lose -= 1
                request.close_connection = True
                return None
        return self._reply(request, status, b"")

    def _wait(self):
        self.hold = ""
        self.held.set()
        self.go_on.wait(60)

    def _take(self, plan, upload, body):
        if plan not in self.plans:
            return 404
        if (plan, upload) in self.uploads:  # a repeat is answered like the first, whatever the clock says by now
            return 200 if self.uploads[plan, upload] == body else 409
        if now_ms() >= self.plans[plan].expires_ms:
            return 410
        try:
            update = decode(body, self.plans[plan].parameters)
        except UpdateError:
            return 400
        self.uploads[plan, upload] = body
        clipped = clip_rows(update[None], self.plans[plan].clip)[0]
        self.total[plan] = self.total.get(plan, 0) + clipped
        return 200

    @staticmethod
    def _reply(request, status, body, headers=None):
        with contextlib.suppress(OSError):
            request.send_response(status)
            for name, value in (headers or {}).items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)


@dataclass
class World:
    """One version of the model, its bundle, and people with examples.

    Attributes:
        offsets: (users + 1,) of the rows.
        columns: raw device features; `budget` and `entity` beside them.
    """

    folder: Path
    network: Network
    offsets: np.ndarray
    columns: dict
    budget: list
    entity: list
    labels: np.ndarray

    def __post_init__(self):
        self.key = signing_key(self.folder / "keys")
        self.trust = self.folder / "keys" / "bundle-signing.pub"
        self.bundle = self.folder / "kiosk-4.bundle"
        program, train = training_program(self.network, server_tower=False, missing=False)
        manifest = Manifest(
            model="kiosk",
            version=4,
            definition_hash="cd" * 32,
            features=MODEL.device_features,
            request={"budget": "number"},
            server_embedding=4,
            device_embedding=4,
            merge="server",
            release=MODEL.release,
            programs={},
            train=train,
        )
        programs = device_programs(self.network) | {"train.pte": program}
        self.manifest = write_bundle(self.bundle, manifest, programs, self.key)
        self.key_file = self.folder / "store.key"
        self.key_file.write_text("5e" * 32)
        self.key_file.chmod(0o600)
        self.policy = self.folder / "policy.json"
        self.policy.write_text(LAX.model_dump_json())

    @property
    def weights(self) -> np.ndarray:
        return self.engine().side.flat()

    def engine(self, local: Local = ROUND) -> Engine:
        """The simulator's, over all people's examples."""
        features, server = MODEL.device_features, MODEL.server_features
        device = features.encode(features.slots(features.inputs(self.columns)))
        examples = Examples(server.encode(self.slots()), device, self.labels, self.offsets, "people")
        return Engine.build(self.network, examples, LocalTraining(steps=local.steps, lr=local.lr))

    def slots(self) -> np.ndarray:
        server = MODEL.server_features
        return server.slots(server.inputs({"size": [SHOPS[name] for name in self.entity], "budget": self.budget}))

    def embedded(self) -> np.ndarray:
        """(n, 4) what the server contributes to each row."""
        with torch.no_grad():
            return self.network.server_program()(torch.from_numpy(self.slots())).numpy()

    def plan(self, number: int, **fields) -> TrainPlan:
        about = {"model": "kiosk", "version": 4, "definition_hash": "cd" * 32, "parameters": len(self.weights)}
        about |= {"expires_ms": now_ms() + 600_000, "policy": LAX, "local": ROUND, "clip": 0.05}
        return TrainPlan(id=f"{number:032x}", **about | fields)

    def store(self, folder: Path, users: range, *, served: bool = True) -> Path:
        """A store in which device u holds the examples of user users[u]; or, not served, its rows alone."""
        file = folder / "device.store"
        folder.mkdir(parents=True, exist_ok=True)
        embedded = self.embedded()
        with self.open(file) as store, store.together():
            for device, user in enumerate(users):
                for number, row in enumerate(range(self.offsets[user], self.offsets[user + 1])):
                    features = {name: values[row] for name, values in self.columns.items()}
                    request = {"budget": self.budget[row]}
                    if served:
                        answer = Served(now_ms(), 4, 0.5, embedded[row].tolist(), 1000)
                        event = store.inference(self.entity[row], request, features, answer, device=device)
                        store.label(int(self.labels[row]), now_ms(), inference=event)
                    else:
                        one = {name: [value] for name, value in features.items()}
                        rows = Rows(
                            np.array([device]),
                            np.array([number]),
                            [self.entity[row]],
                            {"budget": [request["budget"]]},
                            one,
                        )
                        store.write(rows, now_ms())
        return file

    def open(self, file: Path) -> Store:
        return Store.open(file, bytes.fromhex("5e" * 32), self.manifest)

    def run(self, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "device_runtime", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def train(self, store: Path, url: str, *more: object, readings: list | None = None) -> subprocess.Popen[str]:
        """A device's process; it is `store.parent`'s, with its consent and readings there."""
        (store.parent / "consent").touch()
        (store.parent / "readings.json").write_text(json.dumps(readings or [GOOD]))
        files = ["--bundle", self.bundle, "--trust", self.trust, "--store", store, "--key-file", self.key_file]
        files += ["--consent", store.parent / "consent", "--readings", store.parent / "readings.json"]
        return self.run("train", *files, "--policy", self.policy, "--aggregator", url, *more)

    def session(self, store: Path, url: str, *more: object, readings: list | None = None) -> dict:
        """How the only device's session ended, once its process has."""
        (ended,) = said(self.train(store, url, *more, readings=readings))["sessions"]
        return ended


def said(process: subprocess.Popen[str]) -> dict:
    with process:
        output, error = process.communicate(timeout=150)
    assert process.returncode == 0, error
    return json.loads(output)


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Looks often whether something is so that another process does; fails where that process ends before."""
    deadline = time.monotonic() + 60
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    random = np.random.default_rng(17)
    counts = [*random.integers(1, 40, USERS), 60]  # the last is for training that takes long
    rows = sum(counts)
    columns = {
        "mood": [[*WORDS, "unheard of", None][i] for i in random.integers(0, 302, rows)],
        "steps": [None if i == 0 else float(i * 100) for i in random.integers(0, 200, rows)],
        "warmth": [None if i == 0 else i / 8 for i in random.integers(0, 800, rows).tolist()],
    }
    return World(
        folder=tmp_path_factory.mktemp("participation"),
        network=Network.build(MODEL, seed=5),
        offsets=np.r_[0, np.cumsum(counts)],
        columns=columns,
        budget=random.normal(1, 2, rows).tolist(),
        entity=random.choice(list(SHOPS), rows).tolist(),
        labels=random.integers(0, 2, rows).astype(np.float32),
    )


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


@pytest.fixture
def device(world: World, tmp_path: Path) -> Path:
    """The store of a device with the first person's examples."""
    return world.store(tmp_path / "device", range(1))


@pytest.fixture
def slow(world: World, tmp_path: Path) -> Path:
    """The same of one whose training by `LONG` takes some seconds."""
    return world.store(tmp_path / "slow", range(USERS, USERS + 1))


def test_a_rounds_sum_is_the_simulators(world: World, peer: Peer, tmp_path: Path):
    """20 people's devices in four processes: as many updates, whose clipped sum is the engine's to 1e-4."""
    everybody = np.arange(USERS)
    norms = np.linalg.norm(np.concatenate(list(world.engine().updates(world.weights, everybody))), axis=1)
    plan = peer.offer(world, world.plan(1, clip=float(np.median(norms))))
    stores = [world.store(tmp_path / str(part), range(5 * part, 5 * part + 5)) for part in range(4)]
    endings = []
    for pair in (stores[:2], stores[2:]):
        processes = [world.train(store, peer.url, "--devices", "0:5") for store in pair]
        endings += [session["ending"] for process in processes for session in said(process)["sessions"]]
    assert endings == ["uploaded"] * USERS
    assert (len(peer.uploads), peer.attempts, len(peer.check_ins)) == (USERS, USERS, USERS)
    expected = world.engine().clipped_sum(world.weights, everybody, plan.clip)
    assert (expected.above, expected.below) == (USERS // 2, USERS // 2)
    assert np.linalg.norm(expected.total) > 0.1
    np.testing.assert_allclose(peer.total[plan.id], expected.total, atol=1e-4)


def test_an_update_in_8_bits_arrives(world: World, peer: Peer, device: Path):
    """A quarter of the bytes; each weight within its block's scale of what float32 would have brought."""
    plan = peer.offer(world, world.plan(2, upload="int8"))
    assert world.session(device, peer.url)["ending"] == "uploaded"
    (body,) = peer.uploads.values()
    assert len(body) < 1.2 * plan.parameters + 8
    exact = world.engine().clipped_sum(world.weights, np.array([0]), plan.clip).total
    np.testing.assert_allclose(peer.total[plan.id], exact, atol=np.abs(exact).max() / 127 + 1e-6)


def test_a_device_that_dies_while_training_sends_nothing_for_that_plan(world: World, peer: Peer, slow: Path):
    """kill -9: the next process finds that it has begun, and the peer counts nothing; the next plan it takes."""
    peer.offer(world, world.plan(3, local=LONG))
    process = world.train(slow, peer.url)
    with world.open(slow) as store:
        until(lambda: store.history(0) != [], process)
    process.kill()
    process.communicate(timeout=60)
    assert world.session(slow, peer.url)["ending"] == "taken_part"
    assert (peer.uploads, peer.attempts) == ({}, 0)
    peer.offer(world, world.plan(4))
    assert world.session(slow, peer.url)["ending"] == "uploaded"
    assert len(peer.uploads) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_device_that_dies_while_it_sends_is_counted_once(world: World, peer: Peer, device: Path, when: str):
    """kill -9 before or after the peer took the update: the next process sends the same bytes under the same id."""
    plan = peer.offer(world, world.plan(5))
    peer.hold = when
    process = world.train(device, peer.url)
    until(peer.held.is_set, process)
    process.kill()
    process.communicate(timeout=60)
    peer.go_on.set()
    assert len(peer.uploads) == (when == "after")
    ended = world.session(device, peer.url)
    assert (ended["ending"], ended["path"]) == ("uploaded", ["idle", "ready", "uploading", "done"])
    assert (len(peer.uploads), peer.attempts, len(peer.check_ins)) == (1, 2, 1)
    expected = world.engine().clipped_sum(world.weights, np.array([0]), plan.clip)
    np.testing.assert_allclose(peer.total[plan.id], expected.total, atol=1e-4)
    assert world.session(device, peer.url)["ending"] == "taken_part"


def test_a_lost_answer_and_a_busy_peer_are_counted_once(world: World, peer: Peer, device: Path):
    """503 with a second to wait, then an answer that is lost, then 200: three attempts within one session."""
    peer.offer(world, world.plan(6))
    peer.busy = peer.lose = 1
    began = time.monotonic()
    ended = world.session(device, peer.url)
    assert (ended["ending"], ended["path"].count("uploading")) == ("uploaded", 3)
    assert (len(peer.uploads), peer.attempts) == (1, 3)
    assert time.monotonic() - began >= 1


def test_a_replayed_upload_is_counted_once_and_another_under_its_id_is_refused(
    world: World, peer: Peer, device: Path, recording
):
    """An observer sends what it saw again, and then something else in its name."""
    plan = peer.offer(world, world.plan(7))
    with recording(peer.port) as recorder:
        assert world.session(device, recorder.url)["ending"] == "uploaded"
    total = peer.total[plan.id].copy()
    request = bytes(recorder.sent[1])
    for again, status in ((request, b"200"), (request[:-1] + bytes([request[-1] ^ 1]), b"409")):
        with socket.create_connection(("127.0.0.1", peer.port), timeout=10) as attacker:
            attacker.sendall(again)
            assert attacker.recv(100).split()[1] == status
    assert len(peer.uploads) == 1
    np.testing.assert_array_equal(peer.total[plan.id], total)


def tampered(world: World) -> bytes:
    """A plan with another clip than was signed."""
    return sign(world.plan(8), world.key, world.weights).replace(b'"clip":0.05', b'"clip":9.05')


@pytest.mark.parametrize(
    ("answer", "ending", "least_s"),
    [
        (lambda world: (200, {}, tampered(world)), "bad_plan", 3600),
        (lambda world: (200, {}, sign(world.plan(9, expires_ms=now_ms()), world.key, world.weights)), "expired", 3600),
        (lambda world: (200, {}, bytes(70_000 + 4 * max(len(world.weights), MAX_PAYLOAD))), "unreachable", 3600),
        (lambda _: (503, {"Retry-After": "70"}, b""), "busy", 70),
        (lambda _: (503, {"Retry-After": "999999999999"}, b""), "busy", 86_400),
        (lambda _: (204, {"Retry-After": "5"}, b""), "nothing", 5),
        (lambda _: (302, {"Location": "http://127.0.0.1:1/"}, b""), "bad_answer", 3600),
    ],
    ids=["tampered", "expired", "oversize", "busy", "busy for ever", "nothing", "redirected"],
)
def test_an_answer_that_is_no_good_ends_the_session(
    world: World, peer: Peer, device: Path, answer: Callable, ending: str, least_s: float
):
    """Nothing is trained or sent; the device says when it comes again, at the time asked and up to a quarter later."""
    peer.check_in = answer(world)
    ended = world.session(device, peer.url)
    assert (ended["ending"], ended["path"]) == (ending, ["idle", "checked_in", "dropped"])
    assert least_s <= ended["ask_again_s"] <= 1.25 * least_s
    assert peer.attempts == 0
    with world.open(device) as store:
        assert (store.history(0), store.pending(0)) == ([], [])


def test_training_ends_when_somebody_takes_the_device_up(world: World, peer: Peer, slow: Path):
    """At the first look at the host after it began; nothing is sent, then or later."""
    peer.offer(world, world.plan(10, local=LONG))
    ended = world.session(slow, peer.url, readings=[GOOD, GOOD, GOOD, GOOD | {"idle": False}])
    assert (ended["ending"], ended["reasons"]) == ("interrupted", ["in_use"])
    assert world.session(slow, peer.url)["ending"] == "taken_part"
    assert peer.attempts == 0


def test_withdrawn_consent_ends_training_and_deletes_what_waits(world: World, peer: Peer, slow: Path):
    """The file goes while it trains; and while an update waits, after which nothing is asked any more."""
    peer.offer(world, world.plan(11, local=LONG))
    process = world.train(slow, peer.url)
    with world.open(slow) as store:
        until(lambda: store.history(0) != [], process)
        (slow.parent / "consent").unlink()
        (ended,) = said(process)["sessions"]
        assert (ended["ending"], ended["path"][-2:]) == ("no_consent", ["training", "dropped"])
        store.keep_upload(Upload("ab" * 16, "cd" * 16, b"update", now_ms() + 600_000, 4))
        ended = world.session(slow, peer.url, readings=[GOOD | {"consent": False}])
        assert (ended["ending"], store.pending(now_ms())) == ("no_consent", [])
    assert (peer.attempts, len(peer.check_ins)) == (0, 1)


def test_an_aggregator_that_is_gone_finds_the_update_when_it_is_back(world: World, device: Path, recording):
    """Gone at the check-in: nothing is begun. Gone after it: the update waits in the store, and is counted once."""
    with Peer() as peer:
        port = peer.port
        plan = peer.offer(world, world.plan(12))
    ended = world.session(device, f"http://127.0.0.1:{port}")
    assert (ended["ending"], ended["path"][-1]) == ("unreachable", "dropped")
    with Peer() as peer:
        peer.offer(world, plan)
        peer.busy = 1
        with recording(peer.port) as recorder:
            process = world.train(device, recorder.url)
            until(lambda: peer.attempts == 1, process)
        (ended,) = said(process)["sessions"]  # nobody listens where the recorder was
        assert (ended["ending"], ended["path"][-1]) == ("waiting", "ready")
        assert peer.uploads == {}
        assert world.session(device, peer.url)["ending"] == "uploaded"
        assert len(peer.uploads) == 1


def test_a_halted_version_neither_trains_nor_predicts(world: World, peer: Peer, device: Path):
    """Signed by the trusted key it holds from the check-in on, for both commands, and nobody is asked again."""
    halt = Halt(model="kiosk", versions=(4,), reason="it predicts nonsense")
    peer.check_in = (200, {}, sign(halt, world.key))
    assert world.session(device, peer.url)["ending"] == "halted"
    assert world.session(device, peer.url)["ending"] == "halted"
    assert len(peer.check_ins) == 1
    process = infer(world, device, peer.url)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert "it predicts nonsense" in error


def test_a_machine_without_the_persons_consent_asks_nobody(world: World, peer: Peer, device: Path):
    """This machine's own readings, without and with the file: no consent; else whatever it is, in known words."""
    peer.offer(world, world.plan(13))
    process = world.train(device, peer.url, readings=[GOOD])
    said(process)
    asked = len(peer.check_ins)
    files = ["--bundle", world.bundle, "--trust", world.trust, "--store", device, "--key-file", world.key_file]
    here = ["train", *files, "--aggregator", peer.url, "--consent", device.parent / "agrees"]
    (ended,) = said(world.run(*here))["sessions"]
    assert (ended["ending"], ended["reasons"]) == ("no_consent", ["no_consent"])
    (device.parent / "agrees").touch()
    (ended,) = said(world.run(*here))["sessions"]  # it took part just now, so it may not by the default policy
    assert (ended["ending"], ended["reasons"][-2:]) == ("not_eligible", ["too_soon", "too_often"])
    assert set(ended["reasons"]) <= set(Reason)
    assert len(peer.check_ins) == asked == 1


def test_an_installed_bundle_trains_until_its_version_is_halted(world: World, peer: Peer, device: Path, tmp_path: Path):
    """Of the folder that `update` fills; halted, with no other version there, the command says which and why not."""
    (device.parent / "consent").touch()
    installed = Installed(tmp_path / "bundles", "kiosk", trusted_key(world.trust), engine="executorch")
    installed.install(world.bundle.read_bytes(), now_ms=now_ms())
    (device.parent / "readings.json").write_text(json.dumps([GOOD]))
    files = ["--folder", tmp_path / "bundles", "--trust", world.trust, "--store", device, "--key-file", world.key_file]
    files += ["--consent", device.parent / "consent", "--readings", device.parent / "readings.json"]
    peer.check_in = (200, {}, sign(Halt(model="kiosk", versions=(4,), reason="it predicts nonsense"), world.key))
    command = ["train", *files, "--aggregator", peer.url]
    (ended,) = said(world.run(*command, "--model", "kiosk"))["sessions"]
    assert (ended["ending"], ended["why"]) == ("halted", "version 4 was stopped: it predicts nonsense")
    for more, error in ((["--model", "kiosk"], "halted"), ([], "--folder needs --model")):
        process = world.run(*command, *more)
        output, told = process.communicate(timeout=60)
        assert (process.returncode, output) == (1, "")
        assert error in told
    assert len(peer.check_ins) == 1


def infer(world: World, store: Path, url: str) -> subprocess.Popen[str]:
    files = ["--bundle", world.bundle, "--trust", world.trust, "--store", store, "--key-file", world.key_file]
    return world.run("infer", *files, "--gateway", url, "--out", store.parent / "out.parquet", "--contribution")


def gateway(world: World) -> Callable:
    """What the gateway's stand-in answers: the network's own embedding of the entity, and some prediction."""

    def answer(request, body):
        document = json.loads(body[: int(request.headers[HEADER_LENGTH])])
        inputs = {each["name"]: each.get("data") for each in document["inputs"]}
        server = MODEL.server_features
        columns = {"size": [SHOPS[inputs["entity"][0]]], "budget": inputs["budget"]}
        with torch.no_grad():
            embedding = world.network.server_program()(torch.from_numpy(server.slots(server.inputs(columns)))).numpy()
        outputs = {"prediction": [0.5], "version": [4], "feature_age_ms": [1000], "merged": ["server"]}
        outputs |= {"status": ["ok"], "fallback": ["none"], "server_embedding": embedding[0].tolist()}
        return json.dumps({"outputs": [{"name": n, "data": data} for n, data in outputs.items()]}).encode()

    return answer


SENTINELS = {"mood": "mood-257", "steps": 7319.0, "warmth": 83.4375}


def forms(world: World) -> dict[str, bytes]:
    """Every way in which a sentinel could be found in bytes: as it is, as the tower reads it, as its index."""
    found = {"word": b"mood-257", "steps": b"7319", "warmth": b"83.4375"}
    inputs = MODEL.device_features.inputs({name: [value] for name, value in SENTINELS.items()})
    encoded = MODEL.device_features.encode(MODEL.device_features.slots(inputs))[0]
    numbers = {"steps": 7319.0, "warmth": 83.4375, "index": 257.0, "index and unseen": 258.0}
    numbers |= {f"encoded {i}": value for i, value in enumerate(encoded.tolist()) if value not in (0.0, 1.0)}
    assert len(numbers) >= 6
    for name, number in numbers.items():
        for order in "<>":
            found |= {f"{name} {order}{kind}": struct.pack(f"{order}{kind}", number) for kind in "fd"}
            if number == int(number):
                found |= {f"{name} {order}{kind}": struct.pack(f"{order}{kind}", int(number)) for kind in "iq"}
    return found


def sentinel_world(world: World, first: dict, second: dict) -> World:
    """Two people with six rows each, every row with the same raw values; their labels are opposite."""
    columns = {name: [first[name]] * 6 + [second[name]] * 6 for name in first}
    labels = np.array([1, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0], np.float32)
    shops = ["bakery", "kiosk", "cinema", "bakery", "kiosk", "cinema"] * 2
    return World(world.folder, world.network, np.array([0, 6, 12]), columns, [0.5, 1.5, 2.5] * 4, shops, labels)


@pytest.fixture(scope="module")
def captured(world: World, recording, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two devices send: of each an inference session, labels, and two sessions of training for two plans.

    (device, session) -> the bytes of each connection; session 0 is the inference's.
    """
    folder = tmp_path_factory.mktemp("captured")
    people = sentinel_world(world, SENTINELS, {"mood": "mood-031", "steps": 250.0, "warmth": 20.0})
    found = {}
    with Peer(predict=gateway(people)) as peer:
        stores = [people.store(folder / str(user), range(user, user + 1), served=False) for user in range(2)]
        for user, store in enumerate(stores):
            with recording(peer.port) as recorder:
                assert said(infer(people, store, recorder.url))["predicted"] == 6
            found[user, 0] = list(map(bytes, recorder.sent))
            with people.open(store) as kept:
                for row in range(6):
                    assert kept.label(int(people.labels[6 * user + row]), now_ms(), inference=kept.id_of(0, row))
        for session in (1, 2):
            peer.offer(people, people.plan(100 + session), moved=1 + session / 100)
            for user, store in enumerate(stores):
                with recording(peer.port) as recorder:
                    assert people.session(store, recorder.url)["ending"] == "uploaded"
                found[user, session] = list(map(bytes, recorder.sent))
    return found


def test_no_raw_feature_is_in_what_a_device_sends(world: World, captured: dict):
    """Neither in six inferences nor in two sessions of training: not as text, not as a number of any kind.

    Nor is one in what another device sends, whose values are others: what is looked for is not there by chance.
    """
    for (user, session), connections in captured.items():
        data = b"".join(connections)
        assert len(data) > 1000
        assert [name for name, form in forms(world).items() if form in data] == [], (user, session)
        assert b"consent" not in data
        assert b"bought" not in data
        assert (b"bakery" in data) == (session == 0)  # what an inference does disclose: the entity


def parted(connection: bytes) -> tuple[list[bytes], bytes]:
    head, _, body = connection.partition(b"\r\n\r\n")
    return head.split(b"\r\n"), body


def test_a_training_session_carries_nothing_that_stays_with_its_device(captured: dict):
    """Two connections; all their bytes but the upload's id and the update are the same for both devices of a round.

    Their labels and features differ. From round to round the plan's id changes too, for both alike. A cookie and a
    tag that the peer gave are not given back.
    """
    ids = []
    for session in (1, 2):
        heads = []
        for user in (0, 1):
            check_in, upload = captured[user, session]
            lines, body = parted(upload)
            upload_id = lines[0].split(b"/")[-2].split()[0]
            assert re.fullmatch(b"[0-9a-f]{32}", upload_id)
            ids.append(upload_id)
            lines = [re.sub(rb"127\.0\.0\.1:\d+", b"peer", line.replace(upload_id, b"ID")) for line in lines]
            heads.append((re.sub(rb"127\.0\.0\.1:\d+", b"peer", check_in), lines, len(body), body[:8]))
        assert heads[0] == heads[1]
        assert b"cookie" not in b"".join(captured[0, session]).lower()
    assert len(set(ids)) == 4


def words(data: bytes) -> set[bytes]:
    return {data[i : i + 4] for i in range(0, len(data) - 3, 4)}


def test_what_two_sessions_of_a_device_share_others_share_too(captured: dict):
    """Every token of a head, and every 4 bytes of an update: what one device sent twice, the other one sent as well."""
    tokens = {}
    for (user, session), connections in captured.items():
        if session:
            heads, bodies = zip(*map(parted, connections), strict=True)
            text = re.sub(
                rb"127\.0\.0\.1:\d+", b"peer", b"\n".join(line for head in heads for line in head) + bodies[0]
            )
            tokens[user, session] = set(re.findall(rb"[0-9A-Za-z_.-]+", text)) | words(bodies[1])
    for user, other in ((0, 1), (1, 0)):
        twice = tokens[user, 1] & tokens[user, 2]
        assert len(twice) > 20
        assert twice <= tokens[other, 1] | tokens[other, 2]
