"""From a trained version to predictions: `hybrid promote`, the local stack, devices in processes of their own."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from device_runtime.bundles import Installed
from device_runtime.download import update
from device_runtime.rows import Rows
from device_runtime.store import Store
from feature_store.materialize import apply, materialize
from hybrid.bundle import read_bundle, signing_key, trusted_key
from hybrid.cli import app
from hybrid.cli.watch import local_metrics
from hybrid.deployment import Deployment, Window
from hybrid.errors import ConfigError
from hybrid.gates import read
from hybrid.network import Network
from hybrid.registry import Registry
from hybrid.spec import load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace
from serving import openapi

COUPON = Path(__file__).parents[1] / "examples" / "coupon" / "model.py"
MANY = 500  # offers that differ in a number alone: a tower's answers to them are not cached yet
OFFERS = {"Bar/1d": ("Bar", "1d", 0.4), "Coffee House/2h": ("Coffee House", "2h", 0.5)}
TRAINING = TrainingRecord(kind="federated", run="r", population="p", users=9, examples=9, epsilon=8, delta=2e-4)
DEVICES = 40
STORE_KEY = bytes(range(32))
SLOW_S = 1.0  # of a batch


@dataclass
class Project:
    """A registered coupon model with one version of random weights, and one of a changed definition."""

    workspace: Workspace
    network: Network
    rows: Rows
    environment: dict[str, str]

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | self.environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """Exit status, output and error of a command in a process of its own."""
        with self.start(*arguments) as process:
            output, error = process.communicate(timeout=150)
        return process.returncode, output, error

    def promote(self, *arguments: str) -> Result:
        """`hybrid promote` in this process, which has imported what it needs."""
        return CliRunner().invoke(app, ["promote", "coupon", "1", *arguments], env=self.environment)

    def infer(self, store: Path, out: Path, gateway: str, *more: object) -> subprocess.Popen[str]:
        bundle, trust = self.workspace.bundles / "coupon-1.bundle", self.workspace.keys / "bundle-signing.pub"
        files = ("--bundle", bundle, "--trust", trust, "--store", store, "--gateway", gateway, "--out", out)
        return self.start("device_runtime", "infer", *files, *more)

    def offline(self) -> np.ndarray:
        """What torch says of each row about a known offer, from raw values alone."""
        model, network = self.network.model, self.network
        names = ("coupon", "expiration", "acceptance_rate")
        known = [OFFERS.get(offer, (None,) * 3) for offer in self.rows.entity]
        columns = {name: [offer[i] for offer in known] for i, name in enumerate(names)}
        slots = model.server_features.slots(model.server_features.inputs(columns | self.rows.request))
        inputs = model.device_features.inputs(self.rows.features)
        with torch.no_grad():
            server = network.server_program()(torch.from_numpy(slots))
            return torch.sigmoid(network.head(server, network.device_program()(torch.from_numpy(inputs)))).numpy()


def rows_of(network: Network, devices: int = DEVICES) -> Rows:
    """Two rows a device, with values of every kind, missing ones among them; the last device knows no real offer."""
    random, n = np.random.default_rng(3), 2 * devices
    features = {}
    for name, transform in network.model.device.items():
        words = [*getattr(transform, "vocabulary", ()), "unheard of", None]
        numbers = [0.0, 1.0, 55.0, None]
        features[name] = [(words if transform.text else numbers)[i] for i in random.integers(0, 4, n)]
    return Rows(
        device=np.repeat(np.arange(devices), 2),
        row=np.tile([0, 1], devices),
        entity=[*random.choice(list(OFFERS), n - 2).tolist(), "no such offer", "nor this"],
        request={"time": [("7AM", "6PM", None)[i] for i in random.integers(0, 3, n)]},
        features=features,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("devices")
    (folder / "data").mkdir()
    # The example's delta is for its 541 users; of 2,000 it must be smaller.
    (folder / "model.py").write_text(COUPON.read_text().replace("delta=9e-4", "delta=2e-4"))
    seen = datetime.now(UTC) - timedelta(hours=1)
    offers = [(key, *values, seen) for key, values in OFFERS.items()]
    offers += [(f"Bar/{i}", "Bar", "1d", i / MANY, seen) for i in range(MANY)]
    columns = ["offer_id", "coupon", "expiration", "acceptance_rate", "event_timestamp"]
    pd.DataFrame(offers, columns=columns).to_parquet(folder / "data" / "offers.parquet")
    workspace, model = Workspace(folder / ".hybrid"), load_model(folder / "model.py")
    network = Network.build(model, seed=11)
    registry = Registry(workspace)
    registry.register(model, network.description(), folder / "model.py")
    digest = registry.definition_hash("coupon")
    registry.create_version("coupon", weights=network.weights(), training=TRAINING, curves={}, expected_hash=digest)
    apply(model, workspace.feast)
    materialize(model, workspace.feast, datetime.now(UTC))
    environment = {"HYBRID_HOME": str(workspace.root), "HYBRID_CACHE": str(cache), "HYBRID_STORE_KEY": STORE_KEY.hex()}
    project = Project(workspace, network, rows_of(network), environment)
    yield project
    project.run("hybrid", "down")


@pytest.fixture(scope="module")
def promoted(project: Project) -> dict:
    """What `hybrid promote` says of version 1."""
    done = project.promote("production", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def gateway(project: Project, promoted: dict) -> str:
    """URL of the local stack's gateway, serving the promoted version."""
    status, output, error = project.run("hybrid", "up", "--free-ports", "--json")
    assert status == 0, output + error
    servers = {server["name"]: server for server in json.loads(output)["servers"]}
    return f"http://127.0.0.1:{servers['gateway']['ports']['gateway']}"


@pytest.fixture(scope="module")
def store(project: Project, promoted: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The devices' rows in one encrypted file."""
    trusted = trusted_key(project.workspace.keys / "bundle-signing.pub")
    manifest = read_bundle(Path(promoted["bundle"]).read_bytes(), trusted).manifest
    file = tmp_path_factory.mktemp("store") / "rows.sqlite"
    with Store.open(file, STORE_KEY, manifest) as store:
        store.write(project.rows, time.time_ns() // 1_000_000)
    return file


def test_promotion_tells_what_it_wrote(project: Project, promoted: dict):
    """Both Triton models, the bundle, the deployment and the alias are where the answer says."""
    assert (promoted["model"], promoted["version"], promoted["alias"]) == ("coupon", 1, "production")
    assert promoted["triton"] == ["coupon_server_tower", "coupon_head"]
    assert Path(promoted["bundle"]).stat().st_size == promoted["bytes"]["bundle"]
    deployed = Window.read_all(project.workspace.deployments)["coupon"].default
    assert (deployed.version, deployed.definition_hash) == (1, promoted["definition_hash"])
    assert Registry(project.workspace).version("coupon", "production").number == 1


def test_another_alias_changes_nothing_that_is_served(project: Project, promoted: dict):
    """`canary` gets its exports and its alias; the deployment stays byte for byte, and the command says so."""
    deployment = (project.workspace.deployments / "coupon.json").read_bytes()
    done = project.promote("canary")
    assert done.exit_code == 0, done.output
    assert "Serving is unchanged" in done.stdout
    assert "in the clear, because" in done.stdout
    assert (project.workspace.deployments / "coupon.json").read_bytes() == deployment
    assert Registry(project.workspace).version("coupon", "canary").number == 1


def test_the_local_stacks_gateway_hands_out_the_bundle_that_was_promoted(
    project: Project, gateway: str, promoted: dict
):
    """Byte for byte, so its signature holds; who has it is sent nothing."""
    fetched = httpx.get(f"{gateway}/v2/models/coupon/bundle")
    assert (fetched.status_code, fetched.headers["Content-Location"]) == (200, "/v2/models/coupon/versions/1/bundle")
    assert fetched.content == Path(promoted["bundle"]).read_bytes()
    read_bundle(fetched.content, trusted_key(project.workspace.keys / "bundle-signing.pub"))
    known = {"If-None-Match": fetched.headers["ETag"]}
    assert httpx.get(f"{gateway}/v2/models/coupon/bundle", headers=known).status_code == 304


def test_devices_get_the_predictions_that_torch_gives(project: Project, gateway: str, store: Path, tmp_path: Path):
    """Two processes of 20 devices: 80 answers, 78 within 1e-5 of the network, 2 about no known offer."""
    files = [tmp_path / "first.parquet", tmp_path / "second.parquet"]
    processes = [
        project.infer(store, file, gateway, "--devices", part, "--concurrency", 8)
        for file, part in zip(files, ("0:20", "20:40"), strict=True)
    ]
    said = [process.communicate(timeout=150) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [json.loads(output)["statuses"] for output, _ in said] == [{"ok": 40}, {"ok": 38, "unknown_entity": 2}]
    results = pd.concat([pq.read_table(file).to_pandas() for file in files]).sort_values(["device", "row"])
    assert results[["device", "row"]].to_numpy().tolist() == [[d, r] for d in range(DEVICES) for r in (0, 1)]
    predicted, refused = results[:-2], results[-2:]
    assert set(predicted["version"]) == {1}
    assert set(predicted["merged"]) == {"server"}
    assert predicted["feature_age_ms"].between(3_600_000, 4_200_000).all()
    np.testing.assert_allclose(predicted["prediction"], project.offline()[:-2], atol=1e-5)
    assert set(refused["status"]) == {"unknown_entity"}
    assert set(refused["http_status"]) == {404}
    with Store.open(store, STORE_KEY) as kept:
        found = [event.get("inference", {}) for event in kept.export()]
    assert [each.get("prediction") for each in found] == [*predicted["prediction"], None, None]


def test_promotion_on_a_running_stack_finds_its_triton(project: Project, gateway: str):
    """It asks the real one for both models, and the gateway goes on serving."""
    done = project.promote("production")
    assert done.exit_code == 0, done.output
    assert httpx.get(f"{gateway}/v2/models/coupon/versions/1/ready").status_code == 200


def test_a_device_refuses_a_bundle_that_its_host_app_did_not_sign(
    project: Project, promoted: dict, store: Path, tmp_path: Path
):
    """One sentence, exit status 1, nothing sent: the gateway's address is a port where nobody listens."""
    signing_key(tmp_path / "other")
    other = tmp_path / "other" / "bundle-signing.pub"
    with project.infer(store, tmp_path / "out.parquet", "http://127.0.0.1:1", "--trust", other) as process:
        output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert error == "error: the bundle is not signed by the key this device trusts\n"
    assert not (tmp_path / "out.parquet").exists()


@dataclass
class Load:
    """Requests that never cease, for a version, each about one of `MANY` offers; what became of every one is counted.

    Drawn, since gates compare what is counted of two loads: neighbouring offers are alike, so in turn each load would
    be at other ones, and a good version would seem to have drifted.
    """

    url: str
    body: dict
    version: int
    outcomes: Counter = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)
    latest_s: float = 0.0

    def run(self) -> None:
        with httpx.Client(timeout=30) as client:
            draw = random.Random(self.version)
            while not self.ended.is_set():
                self.body["inputs"][0]["data"] = [f"Bar/{draw.randrange(MANY)}"]
                begun = time.monotonic()
                answer = client.post(f"{self.url}/v2/models/coupon/versions/{self.version}/infer", json=self.body)
                self.latest_s = time.monotonic() - begun
                told = answer.json()
                predicted = {one["name"]: one["data"] for one in told.get("outputs", ())}.get("version")
                self.outcomes[answer.status_code, told.get("code"), predicted and predicted[0]] += 1

    def until(self, outcome: tuple, more: int = 20) -> None:
        """Returns once it came so many more times."""
        before, deadline = self.outcomes[outcome], time.monotonic() + 60
        while self.outcomes[outcome] < before + more:
            assert time.monotonic() < deadline, self.outcomes
            time.sleep(0.01)

    def until_slower_than(self, seconds: float) -> None:
        """Returns once a request took longer."""
        deadline = time.monotonic() + 60
        while self.latest_s < seconds:
            assert time.monotonic() < deadline, self.latest_s
            time.sleep(0.01)


def test_a_canary_is_launched_and_taken_back_under_load_and_no_request_is_lost(
    project: Project, gateway: str, tmp_path: Path
):
    """Devices with either version are answered by its own pair; once it is taken back they are told, and go back."""
    registry, network = Registry(project.workspace), Network.build(project.network.model, seed=12)
    digest = registry.definition_hash("coupon")
    registry.create_version("coupon", weights=network.weights(), training=TRAINING, curves={}, expected_hash=digest)
    trusted = trusted_key(project.workspace.keys / "bundle-signing.pub")
    devices = [Installed(tmp_path / f"phone-{i}", "coupon", trusted, engine="onnx") for i in range(24)]

    def hybrid(*words: str) -> str:
        done = CliRunner().invoke(app, words, env=project.environment)
        assert done.exit_code == 0, done.output
        return done.stdout

    def updated() -> Counter:
        return Counter(update(device, gateway, now_ms=time.time_ns() // 1_000_000).version for device in devices)

    def until_told(canary: int | None) -> None:
        deadline = time.monotonic() + 30
        while (httpx.get(f"{gateway}/v2/models/coupon/rollout").json()["canary"] or {}).get("version") != canary:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    assert updated() == {1: 24}
    body = openapi.example(Window.read(project.workspace.deployments / "coupon.json").default)
    old, new = Load(gateway, copy.deepcopy(body), 1), Load(gateway, body, 2)
    with ThreadPoolExecutor(2) as threads:
        try:
            running = [threads.submit(old.run)]
            assert "coupon:2 is the canary: 50% of devices fetch it, the others 1" in hybrid(
                "rollout", "coupon", "2", "--canary", "50%"
            )
            until_told(2)
            running.append(threads.submit(new.run))
            have = updated()
            assert have == updated()
            assert (have[1] + have[2], have[1] > 0, have[2] > 0) == (24, True, True)  # but once in 8 million
            new.until((200, None, 2))
            assert "coupon:2 was taken back (worse); devices fetch 1" in hybrid(
                "rollback", "coupon", "--reason", "worse"
            )
            new.until((410, "update_required", None))
            until_told(None)
            assert updated() == {1: 24}
            old.until((200, None, 1))
        finally:
            old.ended.set()
            new.ended.set()
        for each in running:
            each.result(60)
    assert set(old.outcomes) == {(200, None, 1)}
    assert set(new.outcomes) == {(200, None, 2), (410, "update_required", None)}
    assert registry.model("coupon").aliases.get("canary") is None
    actions = [(one["action"], one["version"]) for one in json.loads(hybrid("history", "coupon", "--json"))]
    assert actions[-2:] == [("canary", 2), ("halt", 2)]
    refused = CliRunner().invoke(app, ["promote", "coupon", "2", "production"], env=project.environment)
    assert "coupon:2 was taken back (worse)" in str(refused.exception)


def test_a_device_that_lets_it_asks_a_shadow_too_and_keeps_the_default_s_answers_alone(
    project: Project, gateway: str, store: Path, tmp_path: Path
):
    """Gateway and worker count requests of both versions; once it is taken back the device has none."""
    registry, workspace, network = Registry(project.workspace), project.workspace, project.network
    digest = registry.definition_hash("coupon")
    number = registry.create_version(
        "coupon", weights=network.weights(), training=TRAINING, curves={}, expected_hash=digest
    )
    words = ["rollout", "coupon", str(number), "--shadow", "100%", "--on-devices", "--json"]
    done = CliRunner().invoke(app, words, env=project.environment)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["devices"] is True

    def until(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def told() -> dict | None:
        return httpx.get(f"{gateway}/v2/models/coupon/rollout").json().get("shadow")

    def counted(version: int) -> bool:
        """By gateway and worker both."""
        found = [read(httpx.get(url).text, "coupon") for url in local_metrics(workspace)]
        metrics = ("hybrid_gateway_requests_total", "hybrid_merge_rows_total")
        return all(sum(each.get((metric, str(version), "ok"), 0.0) for each in found) > 0 for metric in metrics)

    def update_shadow() -> tuple[int, int | None]:
        trust = ("--trust", workspace.keys / "bundle-signing.pub")
        asked = ("--folder", tmp_path / "phone", "--model", "coupon", "--gateway", gateway, "--shadow")
        status, output, error = project.run("device_runtime", "update", *asked, *trust, "--engine", "onnx")
        assert status == 0, error
        shown = json.loads(output)
        return shown["version"], shown["shadow"]

    until(lambda: told() == {"version": number, "share": 1.0})
    assert update_shadow() == (1, number)
    more = ("--shadow", tmp_path / "phone", "--devices", "0:5", "--concurrency", 1, "--engine", "onnx")
    with project.infer(store, tmp_path / "out.parquet", gateway, *more) as process:
        output, error = process.communicate(timeout=150)
    assert (process.returncode, json.loads(output)["statuses"]) == (0, {"ok": 10}), error
    assert set(pq.read_table(tmp_path / "out.parquet").column("version").to_pylist()) == {1}
    with Store.open(store, STORE_KEY) as kept:
        assert {event["inference"]["version"] for event in kept.export() if "inference" in event} == {1}
    until(lambda: counted(1) and counted(number))
    assert CliRunner().invoke(app, ["rollback", "coupon"], env=project.environment).exit_code == 0
    until(lambda: told() is None)
    assert update_shadow() == (1, None)
    assert not list((tmp_path / "phone" / "shadow").glob("*.bundle"))


@dataclass(frozen=True)
class Trial:
    """Canaries beside the default, both under load."""

    project: Project
    gateway: str

    @property
    def default(self) -> Deployment:
        return Window.read(self.project.workspace.deployments / "coupon.json").default

    def hybrid(self, *words: str) -> Result:
        return CliRunner().invoke(app, words, env=self.project.environment)

    def triton(self, model: str, number: int) -> Path:
        return self.project.workspace.triton / model / str(number)

    def evaluated(self) -> None:
        """The canary and the default are compared on people, with noise."""
        done = self.hybrid("evaluate", "coupon@canary", "--against", "production", "--epsilon", "8", "--rows", "2")
        assert done.exit_code == 0, done.output

    def version(self, network: Network) -> int:
        registry, weights = Registry(self.project.workspace), network.weights()
        digest = registry.definition_hash("coupon")
        return registry.create_version("coupon", weights=weights, training=TRAINING, curves={}, expected_hash=digest)

    def watched(
        self, number: int, *words: str, shadow: bool = False, plant: Callable[[Load], None] = lambda _: None
    ) -> dict:
        """What becomes of a canary or shadow, once `plant` has seen a canary's load; the default answers all along."""
        default = self.default
        beside = ("--shadow", "100%") if shadow else ("--canary", "50%")
        assert self.hybrid("rollout", "coupon", str(number), *beside).exit_code == 0
        body = openapi.example(default)
        old, new = Load(self.gateway, copy.deepcopy(body), default.version), Load(self.gateway, body, number)
        with ThreadPoolExecutor(2) as threads:
            running = [threads.submit(old.run)]
            try:
                deadline = time.monotonic() + 30
                while httpx.get(f"{self.gateway}/v2/models/coupon/versions/{number}").status_code != 200:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                if not shadow:
                    running.append(threads.submit(new.run))
                    new.until((200, None, number), 5)
                    plant(new)
                began = datetime.now(UTC)
                done = self.hybrid("watch", "coupon", "--for", "60s", "--every", "0.5", "--json", *words)
                old.until((200, None, default.version))
            finally:
                old.ended.set()
                new.ended.set()
            for each in running:
                each.result(60)
        assert set(old.outcomes) == {(200, None, default.version)}, "the default answers all along"
        last = json.loads(self.hybrid("history", "coupon", "--json").stdout)[-1]
        shown = json.loads(done.stdout)
        failed = [one["gate"] for one in shown["gates"] if one["outcome"] == "fails"]
        seconds = (datetime.fromisoformat(last["at"]) - began).total_seconds()
        return shown | {"exit": done.exit_code, "failed": failed, "last": last, "s": seconds, "told": new.outcomes}

    def taken_back(self, number: int, gate: str, within_s: float, *words: str, **planted: Any) -> dict:
        """By this gate and no other, with its reason in the history, within so many seconds of `hybrid watch`."""
        shown = self.watched(number, *words, **planted)
        assert (shown["outcome"], shown["exit"], shown["failed"]) == ("taken back", 3, [gate]), json.dumps(
            shown["gates"]
        )
        assert (shown["last"]["action"], shown["last"]["version"]) == ("halt", number)
        assert shown["last"]["reason"].startswith(f"gate {gate}: ")
        assert 0 < shown["s"] < within_s
        assert self.default.version == shown["default"]
        return shown


@pytest.fixture(scope="module")
def trial(project: Project, gateway: str) -> Trial:
    return Trial(project, gateway)


@pytest.fixture(scope="module")
def people(project: Project, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A population of 2,000, two rows each, with a yes where version 1 gives more than its median: its AUC is 1.

    So many that the noise of a difference of AUCs (a standard deviation of 0.02 for 500) decides nothing here.
    """
    rows = rows_of(project.network, 2_000)
    rows.entity[-2:] = ["Bar/1d", "Bar/1d"]  # a population knows its offers
    predicted = replace(project, rows=rows).offline()
    columns = {"person": rows.device, "offer_id": rows.entity, "Y": (predicted > np.median(predicted)).astype(int)}
    file = tmp_path_factory.mktemp("people") / "rows.parquet"
    pd.DataFrame(columns | rows.request | rows.features).to_parquet(file)
    words = ["population", "import", str(file), "--user", "person", "--name", "coupon"]
    assert CliRunner().invoke(app, words, env=project.environment).exit_code == 0
    return "coupon"


def test_a_canary_whose_scores_drifted_is_taken_back(trial: Trial):
    """Its correction adds 4 to every logit."""
    drifted = Network.build(trial.project.network.model, seed=11)
    drifted.correction.set_shift(4.0)
    number = trial.version(drifted)
    shown = trial.taken_back(number, "drift", 60, "--least", "300")
    assert set(shown["told"]) <= {(200, None, number), (410, "update_required", None)}, "no request is lost"


def test_a_canary_whose_head_is_lost_is_taken_back(trial: Trial):
    """Triton has it no more, as where a wrong one was put in its place: it answers nothing."""
    number = trial.version(trial.project.network)
    trial.taken_back(number, "errors", 60, plant=lambda _: shutil.rmtree(trial.triton("coupon_head", number)))


def test_a_canary_whose_server_tower_is_slow_is_taken_back(trial: Trial):
    """Triton takes a second for each batch of it; so few come through in a minute that few must be enough."""
    number = trial.version(trial.project.network)

    def slow(load: Load) -> None:
        program = trial.triton("coupon_server_tower", number) / "model.py"
        line = "        columns = {\n"
        text = program.read_text()
        assert text.count(line) == 1
        program.write_text(text.replace(line, f"        import time\n\n        time.sleep({SLOW_S})\n{line}"))
        load.until_slower_than(SLOW_S)

    shown = trial.taken_back(number, "slower", 60, "--least", "20", plant=slow)
    assert set(shown["told"]) <= {(200, None, number), (410, "update_required", None)}, "no request is lost"


def test_a_canary_of_lower_auc_is_taken_back(trial: Trial, people: str):
    """As `hybrid evaluate` finds it on people, with noise: before anything else has enough to say."""
    number = trial.version(Network.build(trial.project.network.model, seed=12))
    shown = trial.taken_back(number, "auc", 30, plant=lambda _: trial.evaluated())
    assert set(shown["told"]) <= {(200, None, number), (410, "update_required", None)}, "no request is lost"


def test_a_good_canary_passes_every_gate_and_is_promoted(trial: Trial, people: str):
    """First as a shadow, of which devices are told nothing; as long as nobody has compared them on people it is none.

    Of a shadow no prediction is compared here: the model learned no embedding for a missing device.
    """
    good = trial.version(trial.project.network)
    shown = trial.watched(good, "--least", "20", "--for", "20s", shadow=True)
    assert [(one["gate"], one["outcome"]) for one in shown["gates"]] == [
        ("errors", "passes"),
        ("slower", "passes"),
        ("drift", "waits"),
        ("auc", "waits"),
        ("metrics", "passes"),
    ], json.dumps(shown["gates"])
    assert (shown["shadow"], shown["outcome"], shown["last"]["action"]) == (good, "went on", "shadow")
    assert httpx.get(f"{trial.gateway}/v2/models/coupon/rollout").json()["canary"] is None
    shown = trial.watched(good, "--least", "100", "--promote", "--for", "20s")
    assert [(one["gate"], one["outcome"]) for one in shown["gates"]] == [
        ("errors", "passes"),
        ("fallbacks", "passes"),
        ("slower", "passes"),
        ("drift", "passes"),
        ("auc", "waits"),
        ("metrics", "passes"),
    ]
    assert shown["outcome"] == "went on", "AUC is not known"
    shown = trial.watched(
        good, "--least", "100", "--promote", "--for", "20s", "--auc", "0.05", plant=lambda _: trial.evaluated()
    )
    assert (shown["outcome"], shown["exit"]) == ("promoted", 0), json.dumps(shown["gates"])
    assert set(shown["told"]) == {(200, None, good)}, "no request is lost"
    assert trial.default.version == good
    assert Registry(trial.project.workspace).version("coupon", "production").number == good


def test_a_version_of_another_definition_is_not_promoted(project: Project, promoted: dict):
    """Registered anew with another constant, the model has no version of that definition yet."""
    file = project.workspace.root.parent / "model.py"
    before = file.read_text()
    try:
        file.write_text(before.replace("mean=60, std=20", "mean=55, std=20"))
        Registry(project.workspace).register(load_model(file), project.network.description(), file)
        done = project.promote("production")
    finally:
        file.write_text(before)
    assert isinstance(done.exception, ConfigError)
    assert "coupon:1 was trained from another definition than is registered now" in str(done.exception)
