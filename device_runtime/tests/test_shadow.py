import asyncio
import threading
import time
from pathlib import Path
from typing import Self

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_runtime import __main__ as command
from device_runtime import shadow as module
from device_runtime.answers import Answer
from device_runtime.bundles import Installed
from device_runtime.client import InferenceClient
from device_runtime.program import EmbedProgram
from device_runtime.shadow import Shadow
from device_runtime.store import Rows, Store
from device_runtime.tests.test_client import Gateway, answer, error
from hybrid import Noised
from hybrid.bundle import Bundle, Manifest, write_bundle
from hybrid.errors import BundleError

WAIT_S = 30.0
KEY = bytes(range(32))


class Both(Gateway):
    """Version 7 says 0.25, version 8, which is the shadow, 0.75; `asked` is set with each request for it."""

    def __init__(self, shadow: tuple[int, bytes] | None = None, hangs: bool = False) -> None:
        super().__init__(lambda _: answer())
        self.said, self.hangs, self.asked = shadow or answer(prediction=0.75, version=8), hangs, asyncio.Event()

    def paths(self) -> list[str]:
        return [path.split("/")[5] for path, *_ in self.requests]

    async def _answer(self, number: int, writer: asyncio.StreamWriter) -> None:
        default = self.paths()[number] == "7"
        self.respond = lambda _: answer() if default else self.said
        if not default:
            self.asked.set()
            if self.hangs:
                return
        await super()._answer(number, writer)


@pytest.fixture(scope="module")
def program(bundle: Bundle) -> EmbedProgram:
    return EmbedProgram(bundle, "onnx")


@pytest.fixture
def shadowed(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"version": 8})


async def asked(gateway: Both, manifest: Manifest, shadowed: Manifest, program: EmbedProgram, rows: Rows) -> list:
    """The answers that are shown, while a shadow is asked too; returns once it was."""
    shown: list[Answer] = []
    async with (
        gateway,
        InferenceClient(manifest, program, gateway.url) as client,
        Shadow(lambda: InferenceClient(shadowed, program, gateway.url)) as shadow,
    ):
        await client.run(iter([rows]), shown.append, concurrency=1, then=shadow.offer)
        await asyncio.wait_for(gateway.asked.wait(), WAIT_S)
    return shown


def test_a_row_is_asked_about_again_once_it_is_answered(
    manifest: Manifest, shadowed: Manifest, program: EmbedProgram, rows: Rows
):
    """The same entity and features, with what the shadow's tower gives; its answer is shown to nobody."""
    gateway = Both()
    shown = asyncio.run(asked(gateway, manifest, shadowed, program, rows.one(1)))
    assert [(one.version, one.prediction) for one in shown] == [(7, 0.25)]
    assert gateway.paths() == ["7", "8"]
    assert gateway.requests[0][1:] == gateway.requests[1][1:], "it is the same tower here, and nothing is noised"


def test_a_shadow_releases_as_its_own_manifest_declares(
    manifest: Manifest, shadowed: Manifest, program: EmbedProgram, rows: Rows
):
    """The default's is clear, the shadow's noised."""
    noised = shadowed.model_copy(update={"release": Noised(clip=1.0, sigma=2.0)})
    gateway = Both()
    asyncio.run(asked(gateway, manifest, noised, program, rows.one(1)))
    (_, document, clear), (_, second, released) = gateway.requests
    assert document == second
    assert len(clear) == len(released)
    assert clear != released


def test_a_shadow_that_hangs_holds_nobody_up(
    manifest: Manifest, shadowed: Manifest, program: EmbedProgram, rows: Rows, monkeypatch: pytest.MonkeyPatch
):
    """All rows are answered; of the shadow one is in flight, the others are dropped, and it is left at the end."""
    monkeypatch.setattr(module, "LEAVE_S", 0.01)
    gateway = Both(hangs=True)
    shown = asyncio.run(asyncio.wait_for(asked(gateway, manifest, shadowed, program, rows), WAIT_S))
    assert [(one.status, one.version) for one in shown] == [("ok", 7)] * 3
    assert sorted(gateway.paths()) == ["7", "7", "7", "8"]


@pytest.mark.parametrize("said", [error(503, "unavailable"), error(401, "unauthenticated"), (200, b"nothing")])
def test_a_shadow_that_is_answered_badly_fails_nothing(
    manifest: Manifest, shadowed: Manifest, program: EmbedProgram, rows: Rows, said: tuple[int, bytes]
):
    shown = asyncio.run(asked(Both(said), manifest, shadowed, program, rows))
    assert [(one.status, one.version) for one in shown] == [("ok", 7)] * 3


def test_a_shadow_that_is_served_no_more_is_asked_no_more(
    manifest: Manifest, shadowed: Manifest, program: EmbedProgram, rows: Rows
):
    """Until the device's next update removes it, it would release each row for nothing."""
    gateway = Both(error(410, "update_required"))

    async def session() -> None:
        async with (
            gateway,
            InferenceClient(manifest, program, gateway.url) as client,
            Shadow(lambda: InferenceClient(shadowed, program, gateway.url)) as shadow,
        ):
            for _ in range(20):
                await client.run(iter([rows]), lambda _: None, concurrency=1, then=shadow.offer)
            await asyncio.wait_for(gateway.asked.wait(), WAIT_S)

    asyncio.run(session())
    assert sorted(gateway.paths()) == ["7"] * 60 + ["8"]


class Broken(EmbedProgram):
    """A tower that gives nothing, and counts how often it was to."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "onnx")
        self.ran = threading.Semaphore(0)

    def embed(self, inputs):
        self.ran.release()
        raise BundleError("no finite numbers")


def test_a_shadow_whose_program_fails_is_asked_about_the_next_row_all_the_same(
    shadowed: Manifest, bundle: Bundle, rows: Rows
):
    """Its thread goes on: three rows, three failures, and none that is seen."""
    broken, answered = Broken(bundle), Answer(4, 0, "ok", http_status=200)

    async def session() -> None:
        deadline = time.monotonic() + WAIT_S
        async with Shadow(lambda: InferenceClient(shadowed, broken, "http://127.0.0.1:1")) as shadow:
            for place in range(3):
                shadow.offer(rows.one(place), answered)
                while not broken.ran.acquire(timeout=0.01):  # while it is at the one before, rows are dropped
                    shadow.offer(rows.one(place), answered)
                    assert time.monotonic() < deadline

    asyncio.run(session())


def test_a_shadow_whose_program_cannot_be_loaded_asks_nothing(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """Nor does a thread say so to the person, or the loading delay an answer: it is done by the thread."""
    loading = threading.Event()

    def load() -> InferenceClient:
        assert loading.wait(WAIT_S)
        raise BundleError("it does not load")

    async def session() -> list[Answer]:
        shown: list[Answer] = []
        gateway = Both()
        async with gateway, InferenceClient(manifest, program, gateway.url) as client, Shadow(load) as shadow:
            await client.run(iter([rows]), shown.append, then=shadow.offer)
            loading.set()
        return shown

    assert [one.status for one in asyncio.run(session())] == ["ok"] * 3


class Noted:
    """What is asked of a client, and by which thread."""

    def __init__(self) -> None:
        self.entities: list[str] = []
        self.threads: set[int] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.threads.add(threading.get_ident())

    async def run(self, batches, take, *, concurrency):
        self.threads.add(threading.get_ident())
        self.entities += [entity for rows in batches for entity in rows.entity]


@pytest.mark.parametrize(("status", "entities"), [(0, []), (429, []), (503, []), (200, ["shop-2"]), (404, ["shop-2"])])
def test_a_gateway_that_is_silent_or_busy_is_not_asked_twice(
    rows: Rows, monkeypatch: pytest.MonkeyPatch, status: int, entities: list[str]
):
    """An outage is not doubled. What it says of a row that it will not answer, it is asked of both."""
    monkeypatch.setattr(module, "LEAVE_S", WAIT_S)
    client = Noted()

    async def session() -> None:
        async with Shadow(lambda: client) as shadow:
            shadow.offer(rows.one(1), Answer(4, 1, "?", http_status=status))

    asyncio.run(session())
    assert client.entities == entities
    assert threading.get_ident() not in client.threads, "it has a thread of its own"
    assert len(client.threads) == 1


@pytest.fixture
def phone(tmp_path: Path, bundle: Bundle, key: Ed25519PrivateKey) -> Installed:
    """With version 8 as its shadow, in `folder`."""
    installed = Installed(tmp_path / "folder", "meals", key.public_key(), engine="onnx")
    write_bundle(tmp_path / "8", bundle.manifest.model_copy(update={"version": 8}), dict(bundle.programs), key)
    installed.shadow.install((tmp_path / "8").read_bytes(), now_ms=0)
    return installed


@pytest.mark.parametrize("lets", [False, True])
def test_infer_asks_the_shadow_of_a_folder_and_keeps_nothing_of_it(
    tmp_path: Path,
    phone: Installed,
    bundle_file: Path,
    manifest: Manifest,
    key: Ed25519PrivateKey,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    lets: bool,
):
    """Stored, and in the results' file, are the default's predictions alone; without the option nobody asks twice."""
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "trust.pem").write_bytes(pem)
    monkeypatch.setenv("HYBRID_STORE_KEY", KEY.hex())
    monkeypatch.setattr(module, "LEAVE_S", WAIT_S)
    with Store.open(tmp_path / "store", KEY, manifest) as store:
        store.write(rows, time.time_ns() // 1_000_000)
    gateway = Both()

    async def infer() -> dict:
        async with gateway:
            return await command._infer(
                bundle=bundle_file,
                trust=tmp_path / "trust.pem",
                store=tmp_path / "store",
                key_file=None,
                gateway=gateway.url,
                out=tmp_path / "out.parquet",
                devices=None,
                concurrency=1,
                shadow=phone.folder if lets else None,
                engine="onnx",
                timeout=WAIT_S,
                trace=0.0,
                contribution=False,
                api_key_file=None,
            )

    summary = asyncio.run(infer())
    assert summary["statuses"] == {"ok": 3}
    assert [path for path in gateway.paths() if path == "7"] == ["7"] * 3
    assert ("8" in gateway.paths()) == lets
    with Store.open(tmp_path / "store", KEY) as store:
        kept = [event["inference"] for event in store.export()]
    assert {(one["version"], one["prediction"]) for one in kept} == {(7, 0.25)}


def test_what_cannot_be_asked_is_no_shadow(tmp_path: Path, phone: Installed, manifest: Manifest):
    """None is installed, it is the default now, it was halted, its file is damaged: inference goes on."""

    def shadow(installed: Installed, live: Manifest = manifest) -> Shadow | None:
        return command._shadow(installed, live, store, "onnx", "http://127.0.0.1:1", timeout_s=1.0, api_key=None)

    with Store.open(tmp_path / "store", KEY, manifest) as store:
        assert shadow(phone.shadow) is not None
        assert shadow(phone) is None
        assert shadow(phone.shadow, manifest.model_copy(update={"version": 8})) is None
        store.halt("meals", [8], "worse")
        assert shadow(phone.shadow) is None
    (file,) = phone.shadow.folder.glob("*.bundle")
    file.write_bytes(b"damaged")
    with Store.open(tmp_path / "other", KEY, manifest) as store:
        assert shadow(phone.shadow) is None
