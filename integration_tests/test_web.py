"""The browser device's library in real Chromium, by itself: conformance, refusals, the store."""

import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from hybrid import Categorical, Hash, HybridModel, Log1p
from hybrid.bundle import Keeping, Manifest, Parameter, TrainProgram, signing_key, write_bundle
from hybrid.export import onnx
from hybrid.export.vectors import vectors
from hybrid.local import web
from hybrid.local.page import PageServer
from hybrid.network import Network
from hybrid.spec import load_model

ROOT = Path(__file__).parents[1]
COUPON = ROOT / "examples/coupon/model.py"
Tab = AbstractContextManager[BrowserContext]


def test_types_and_unit_tests_of_the_npm_package_pass(package: Path):
    """Strict TypeScript, then node's test runner over what needs no browser: the vectors that Python wrote among it."""
    web.run(package, "node", "node_modules/typescript/bin/tsc")
    said = web.run(package, "node", "--test", "tests/*.test.ts")
    assert re.search(r"^. fail 0$", said, re.MULTILINE), said
    assert int(re.search(r"^. pass (\d+)$", said, re.MULTILINE)[1]) >= 15


def test_the_lock_file_names_no_registry(package: Path):
    """`npm ci` has just worked with it; it holds a digest of every package, and no address."""
    lock = (web.SOURCES / "package-lock.json").read_text()
    assert "http" not in re.sub(r'"(url|homepage)": "[^"]*"', "", lock)
    packages = [entry for name, entry in json.loads(lock)["packages"].items() if name]
    assert all(entry["integrity"].startswith("sha512-") for entry in packages)


@pytest.fixture
def library(package: Path, tab: Callable[..., Tab]) -> Iterator[Page]:
    """An empty page of an origin that serves the library, with a database of its own."""
    with PageServer(0, package / "dist", {}, lambda: None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with tab() as context:
                page = context.new_page()
                page.goto(f"{server.url}config.json")
                yield page
        finally:
            server.shutdown()
            thread.join()


def call(page: Page, body: str, argument: object = None) -> object:
    """Runs JavaScript that has the library as `hybrid` and `argument`."""
    prelude = """
        const hybrid = await import("/index.js");
        hybrid.useRuntime("/ort-wasm-simd-threaded.wasm");
        const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        const said = async (promise) => {
            try { return await promise; } catch (error) { return `${error.name}: ${error.message}`; }
        };
    """
    return page.evaluate(f"async (argument) => {{ {prelude} {body} }}", argument)


def text(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


@dataclass
class Signed:
    """Bundles of one network, signed by one key."""

    network: Network
    folder: Path

    @property
    def trust(self) -> str:
        signing_key(self.folder)
        return (self.folder / "bundle-signing.pub").read_text()

    def bundle(self, programs: dict[str, bytes] | None = None, **fields: object) -> bytes:
        model = self.network.model
        manifest = Manifest(
            **{
                "model": model.name,
                "version": 3,
                "definition_hash": "0" * 64,
                "features": model.device_features,
                "request": {"time": "text"},
                "server_embedding": self.network.server_embedding,
                "device_embedding": self.network.device_embedding,
                "merge": model.merge,
                "release": model.release,
                "programs": {},
                "created_ms": 1000,
            }
            | fields
        )
        file = self.folder / "a.bundle"
        write_bundle(file, manifest, programs or onnx.device_programs(self.network), signing_key(self.folder))
        return file.read_bytes()


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    """The coupon example with weights as built, and a hashed and a logarithmic feature besides."""
    declared = load_model(COUPON)
    more = {
        "city": Hash(buckets=101, seed=5),
        "été": Categorical(vocabulary=("e\u0301te\u0301", "日本")),
        "steps": Log1p(),
    }
    model = HybridModel(
        **{name: getattr(declared, name) for name in HybridModel.model_fields} | {"device": {**declared.device, **more}}
    )
    return Signed(Network.build(model, seed=3), tmp_path_factory.mktemp("signed"))


def test_the_browser_agrees_with_torch_on_a_thousand_rows(library: Page, signed: Signed):
    """Raw values -> inputs exactly, embedding and prediction to 1e-5, with missing, unseen, extreme, non-ASCII ones."""
    expected = vectors(signed.network, rows=1000)
    got = call(
        library,
        """
        const [vectors, data, trust] = [JSON.parse(argument.vectors), bytes(argument.bundle), argument.trust];
        const bundle = await hybrid.readBundle(data, await hybrid.trustedKey(trust));
        const [embed, predict] = [await hybrid.EmbedProgram.load(bundle), await hybrid.PredictProgram.load(bundle)];
        const { features } = bundle.manifest;
        const flat = (rows) => Float32Array.from(rows.flat(), Number);
        const isText = (name) => hybrid.isText(features.transforms.get(name));
        const read = (name, raw) => typeof raw === "string" && !isText(name) ? Number(raw) : raw;
        const rows = vectors.inputs.length;
        const inputs = Array.from({ length: rows }, (_, row) =>
            features.inputs(new Map(features.names.map((name) => [name, read(name, vectors.raw[name][row])]))));
        const server = flat(vectors.server), width = server.length / rows;
        const wanted = flat(vectors.inputs);
        const same = inputs.every((row, i) => row.every((value, j) => Object.is(value, wanted[i * row.length + j])
            || value === wanted[i * row.length + j]));
        const embedding = [], prediction = [];
        for (let row = 0; row < rows; row++) {
            embedding.push([...(await embed.embed(inputs[row]))]);
            prediction.push((await predict.predict(inputs[row], server.slice(row * width, (row + 1) * width)))[0]);
        }
        const together = await embed.embed(Float32Array.from(inputs.flatMap((row) => [...row])), rows);
        return { rows, same, embedding, prediction, together: [...together] };
        """,
        {"vectors": expected.to_json(), "bundle": text(signed.bundle()), "trust": signed.trust},
    )
    assert (got["rows"], got["same"]) == (1000, True)
    np.testing.assert_allclose(got["embedding"], expected.embedding, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["prediction"], expected.prediction, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.reshape(got["together"], (1000, -1)), expected.embedding, rtol=1e-5, atol=1e-5)


def test_an_update_that_may_not_be_installed_is_refused_and_the_bundle_before_goes_on(library: Page, signed: Signed):
    """Another key, expired, older, damaged, of another model, with an operator nobody knows; then a good one.

    The same promotion again, in other bytes too, does not push out the one before it.
    """
    whole = signed.bundle(version=4, created_ms=2000)
    rezipped = bytearray(whole)
    rezipped[whole.rindex(b"PK\x01\x02") + 12] ^= 1  # a time in its directory, APPNOTE 4.3.12: nobody signs that
    other = Signed(signed.network, signed.folder / "other")
    nobody = onnx.device_programs(signed.network)
    nobody["embed.onnx"] = nobody["embed.onnx"].replace(b"Tanh", b"Tonh")
    offers = {
        "wrong key": other.bundle(version=5, created_ms=9000),
        "truncated": whole[:-9],
        "flipped": whole.replace(b'"version":4', b'"version":9'),
        "expired": signed.bundle(version=5, created_ms=9000, expires_ms=9999),
        "older": signed.bundle(version=2, created_ms=500),
        "another model": signed.bundle(model="parking", version=5, created_ms=9000),
        "newer runtime": signed.bundle(version=5, created_ms=9000, minimum_runtime=99),
        "unknown operator": signed.bundle(nobody, version=5, created_ms=9000),
    }
    body = """
        const trusted = await hybrid.trustedKey(argument.trust);
        const bundles = await hybrid.Bundles.open();
        const runs = async (bundle) => (await hybrid.programOf(bundle)).release();
        const install = (data) => bundles.install(bytes(data), trusted, "coupon", { now: 10000, etag: '"a"', runs });
        const refusals = {};
        for (const [name, data] of Object.entries(argument.before)) await install(data);
        for (const [name, data] of Object.entries(argument.offers)) refusals[name] = await said(install(data));
        const kept = await bundles.current("coupon", trusted);
        const versions = await bundles.versions("coupon");
        return { refusals, version: kept.manifest.version, etag: kept.etag, versions };
    """
    argument = {
        "trust": signed.trust,
        "before": {
            "first": text(signed.bundle()),
            "second": text(whole),
            "again": text(whole),
            "rezipped": text(rezipped),
        },
        "offers": {name: text(data) for name, data in offers.items()},
    }
    got = call(library, body, argument)
    why = {
        "wrong key": "not signed by the key",
        "truncated": "damaged or truncated",
        "flipped": "not signed by the key",
        "expired": "has expired",
        "older": "is older than",
        "another model": "must be of model 'coupon'",
        "newer runtime": "needs runtime 99",
        "unknown operator": "does not load in ONNX Runtime",
    }
    for name, refusal in got["refusals"].items():
        assert str(refusal).startswith("BundleError: "), name
        assert why[name] in refusal
    assert (got["version"], got["etag"], got["versions"]) == (4, '"a"', [4, 3])
    library.reload()
    assert call(library, body, argument | {"before": {}, "offers": {}})["version"] == 4


def test_a_damaged_installed_bundle_gives_way_to_the_one_before(library: Page, signed: Signed):
    """What somebody changed in IndexedDB does not verify: the previous version answers, and has no tag to ask with."""
    got = call(
        library,
        """
        const trusted = await hybrid.trustedKey(argument.trust);
        const bundles = await hybrid.Bundles.open();
        for (const data of argument.data) await bundles.install(bytes(data), trusted, "coupon", { etag: '"a"' });
        const database = await new Promise((resolve) => {
            const request = indexedDB.open("hybrid-bundles", 1);
            request.onsuccess = () => resolve(request.result);
        });
        const store = database.transaction("bundles", "readwrite").objectStore("bundles");
        await new Promise((resolve) => {
            store.get("coupon").onsuccess = (event) => {
                const slot = event.target.result;
                slot.current.data[500] ^= 1;
                store.put(slot).onsuccess = resolve;
            };
        });
        const kept = await bundles.current("coupon", trusted);
        return [kept.manifest.version, kept.etag];
        """,
        {"trust": signed.trust, "data": [text(signed.bundle()), text(signed.bundle(version=4, created_ms=2000))]},
    )
    assert got == [3, None]


STORE = """
    const bundle = await hybrid.readBundle(bytes(argument.bundle), await hybrid.trustedKey(argument.trust));
    const open = async (now = 0) => hybrid.Store.open(bundle.manifest, await hybrid.keptKey("key"), now);
    const { names } = bundle.manifest.features;
    const values = (weather) => new Map(names.map((name) => [name, name === "weather" ? weather : null]));
    const server = new Float32Array(bundle.manifest.server_embedding).fill(0.5);
    const ask = (entity, weather) => ({ entity, request: new Map([["time", "7AM"]]), features: values(weather) });
    const answer = (prediction) => ({ ...NONE, prediction, serverEmbedding: server });
    const NONE = { status: "ok", fallback: "none", featureAgeMs: 5 };
"""


def test_the_store_keeps_types_joins_labels_and_survives_a_reload(library: Page, signed: Signed):
    """Four inferences; a label joins the newest of its entity within the window of 60 s; a late one joins none.

    An unlabelled inference counts as 0 once its window is over, and is no example before; one for which a learned
    embedding stood in for the server's is none at all.
    """
    keeping = Keeping(label_window_s=60, label_absent=0)
    argument = {"trust": signed.trust, "bundle": text(signed.bundle(keeping=keeping))}
    first = call(
        library,
        STORE
        + """
        const store = await open();
        const ids = [];
        for (const [entity, at] of [["a", 1000], ["a", 2000], ["b", 3000]]) {
            ids.push(await store.inference(ask(entity, "Sunny"), answer(0.25), at));
        }
        return {
            joined: ids.indexOf(await store.label(1, 5000, { entity: "a" })),
            late: await store.label(1, 63001, { entity: "b" }),
            before: await store.label(1, 999, { inference: ids[0] }),
            nobody: await store.label(1, 5000, { entity: "c" }),
            early: (await store.examples(10, 61000)).labels,
            stoodIn: await store.label(1, 60000, { inference: await store.inference(ask("d", "Sunny"),
                { ...answer(0.25), status: "unavailable", fallback: "device-only" }, 4000) }) !== null,
            wrong: await said(store.inference(ask("a", 7), answer(0.25), 4000)),
            exposed: await said(hybrid.Store.open(bundle.manifest,
                await crypto.subtle.generateKey({ name: "AES-GCM", length: 256 }, true, ["encrypt", "decrypt"]))),
        };
        """,
        argument,
    )
    assert first == {
        "joined": 1,
        "late": None,
        "before": None,
        "nobody": None,
        "early": [1],
        "stoodIn": True,
        "wrong": "BadRequest: feature 'weather' must be text, got number",
        "exposed": "StoreError: the store's key must not be extractable: a script could send it away",
    }
    library.reload()
    again = call(
        library,
        STORE + "const s = await open(); return [await s.examples(2, 64000), await s.export(64000), await s.size()];",
        argument,
    )
    examples, exported, size = again
    assert examples["labels"] == [1, 0]
    assert examples["server"] == [[0.5] * 16] * 2
    assert [each["entity"] for each in exported["inferences"]] == ["a", "a", "b", "d"]
    assert [each["label"] for each in exported["inferences"]] == [None, 1, None, 1]
    assert [len(each["server"]) for each in exported["inferences"]] == [16, 16, 16, 0]
    assert exported["inferences"][0]["features"]["weather"] == "Sunny"
    assert exported["inferences"][0]["features"]["temperature"] is None
    assert size["inferences"] == 4


def test_the_store_keeps_slots_where_devices_train_the_server_tower(library: Page, signed: Signed):
    """Two slots, null where a value is missing; an answer that came without them has no contribution to train with."""
    parameters = (Parameter(name="server_tower.0.weight", shape=(16, 2)),)
    train = TrainProgram(rows=8, server=2, missing=False, parameters=parameters)
    examples, exported = call(
        library,
        STORE
        + """
        const store = await open();
        const [slots, none] = [Float32Array.of(0.5, NaN), new Float32Array()];
        const first = await store.inference(ask("a", "Sunny"), { ...answer(0.25), serverSlots: slots }, 1000);
        const second = await store.inference(ask("b", "Sunny"), { ...answer(0.25), serverSlots: none }, 2000);
        for (const inference of [first, second]) await store.label(1, 3000, { inference });
        return [await store.examples(10, 4000), await store.export(4000)];
        """,
        {"trust": signed.trust, "bundle": text(signed.bundle(train=train))},
    )
    assert (examples["server"], examples["labels"]) == ([[0.5, None]], [1])
    assert [each["server"] for each in exported["inferences"]] == [[0.5, None], []]


def test_retention_deletes_by_age_and_by_bytes_the_oldest_first(library: Page, signed: Signed):
    """100 s old is too old where 60 s are kept, and so far ahead a clock was wrong; of 64 KiB the newest stay."""
    keeping = Keeping(seconds=60, bytes=1 << 16)
    got = call(
        library,
        STORE
        + """
        let store = await open();
        for (let at = 0; at < 200; at++) await store.inference(ask(`entity ${at}`, "Sunny"), answer(0.5), at * 10);
        const { bytes: held, inferences } = await store.size();
        const oldest = (await store.all())[0].entity, newest = (await store.all()).at(-1).entity;
        store.close();
        store = await open(62000 + 1);
        const later = (await store.size()).inferences;
        await store.inference(ask("ahead", "Sunny"), answer(0.5), 200000);
        await store.enforce(140000);
        const near = (await store.size()).inferences;
        await store.enforce(140000 - 1);
        return { held, inferences, oldest, newest, later, near, ahead: (await store.size()).inferences };
        """,
        {"trust": signed.trust, "bundle": text(signed.bundle(keeping=keeping))},
    )
    assert got["held"] <= 1 << 16
    assert 20 < got["inferences"] < 200
    assert (got["oldest"], got["newest"]) == (f"entity {200 - got['inferences']}", "entity 199")
    assert got["later"] == 0
    assert (got["near"], got["ahead"]) == (1, 0)


def test_what_lies_in_indexeddb_says_nothing_without_the_key_and_is_gone_once_forgotten(library: Page, signed: Signed):
    """No text and no prediction of a record; one that is moved to another time is refused; forgetting leaves none."""
    got = call(
        library,
        STORE
        + """
        const store = await open();
        await store.inference(ask("a-secret-entity", "Snowy"), answer(0.123456789), 1000);
        const database = await new Promise((resolve) => {
            const request = indexedDB.open(hybrid.Store.database("coupon"));
            request.onsuccess = () => resolve(request.result);
        });
        const rows = () => database.transaction("inferences", "readwrite").objectStore("inferences");
        const done = (request) => new Promise((resolve) => { request.onsuccess = () => resolve(request.result); });
        const [row] = await done(rows().getAll());
        const raw = new TextDecoder("latin1").decode(row.sealed) + JSON.stringify(row);
        await done(rows().put({ ...row, at_ms: 2000 }));
        const moved = await said(store.all());
        database.close();
        await store.forget();
        await hybrid.forgetKey("key");
        const left = (await indexedDB.databases()).map(({ name }) => name);
        return { raw, fields: Object.keys(row).sort(), moved, left };
        """,
        {"trust": signed.trust, "bundle": text(signed.bundle())},
    )
    assert got["fields"] == ["at_ms", "bytes", "id", "iv", "sealed"]
    assert not any(secret in got["raw"] for secret in ("a-secret-entity", "Snowy", "0.1234", "coupon"))
    assert got["moved"].startswith("StoreError: the store was written with another key, or was changed")
    assert got["left"] == []


def test_the_benchmark_measures_inference_in_a_browser(package: Path, browser: Browser, tmp_path: Path):
    """It gives microseconds of both programs, and the sizes that a page loads: less than 200 kB of JavaScript."""
    words = [sys.executable, "-m", "benchmarks.device", "--only", "browser", "--json", tmp_path / "found.json"]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["figures"]["browser_embed_us"] > 0
    assert found["figures"]["browser_predict_us"] > 0
    assert 0 < found["rows"][1]["javascript_bytes"] < 200_000
