"""Gateway and worker over TLS: to a real Kafka that asks for a password or a certificate, and to a real Triton."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import kafka as kafka_python
import pandas as pd
import pytest
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourceType,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from typer.testing import CliRunner

from feature_store.materialize import apply, materialize
from hybrid.cli import app
from hybrid.export.promote import deployment_of
from hybrid.export.triton import export
from hybrid.local import kafka as local_kafka
from hybrid.local import triton as local_triton
from hybrid.local.process import Process, Service, free_ports, http_ok, running
from hybrid.network import Network
from hybrid.spec import load_model
from hybrid.workspace import Workspace
from serving.connection import Broker
from serving.kafka import GROUP
from serving.testing import Certificate
from serving.topics import create_topics

COUPON = Path(__file__).parents[1] / "examples" / "coupon" / "model.py"
PASSWORD, WRONG = "correct-horse-battery", "wrong-horse"
READ, WRITE = ACLOperation.READ, ACLOperation.WRITE
ASKED, ANSWERED, REPLAYS = "hybrid.device-embeddings.v1", "hybrid.predictions.v1", "hybrid.dead-letter-replays.v1"
# docs/operating.md says the same: all that each needs.
RIGHTS = {
    "User:gateway": {(WRITE, ASKED), (READ, ANSWERED), (WRITE, f"{ANSWERED}.dead")},
    "User:CN=worker": {(READ, ASKED), (WRITE, ANSWERED), (WRITE, f"{ASKED}.dead")},
    "User:operator": {
        *((READ, f"{topic}.dead") for topic in (ASKED, ANSWERED)),
        *((WRITE, topic) for topic in (ASKED, ANSWERED)),
        *((READ, REPLAYS), (WRITE, REPLAYS)),
    },
}


@dataclass
class Secured:
    """A broker and a Triton behind TLS, and what is shown to them. Without a `broker` of another name: by password."""

    folder: Path
    plain: str
    password: str
    mutual: str
    triton: str = ""

    def file(self, name: str, text: str) -> Path:
        file = self.folder / name
        file.write_text(text)
        file.chmod(0o600)
        return file

    def by_password(self, user: str, password: str = PASSWORD, mechanism: str = "SCRAM-SHA-512") -> list[str]:
        file = self.file(f"password-{len(password)}", password)
        words = ["--kafka", self.password, "--kafka-tls", "--kafka-ca", str(self.folder / "broker.crt")]
        return [*words, "--kafka-sasl", mechanism, "--kafka-username", user, "--kafka-password-file", str(file)]

    def by_certificate(self, name: str | None = "worker", authority: str = "broker") -> list[str]:
        words = ["--kafka", self.mutual, "--kafka-tls", "--kafka-ca", str(self.folder / f"{authority}.crt")]
        return words if name is None else [*words, *self.pair("--kafka", name)]

    def to_triton(self, name: str | None = "worker", authority: str = "triton") -> list[str]:
        words = ["--triton", self.triton, "--triton-tls", "--triton-ca", str(self.folder / f"{authority}.crt")]
        return words if name is None else [*words, *self.pair("--triton", name)]

    def pair(self, option: str, name: str) -> list[str]:
        return [f"{option}-cert", str(self.folder / f"{name}.crt"), f"{option}-key", str(self.folder / f"{name}.key")]

    def command(self, process: str, *words: str) -> list[str]:
        deployments = str(self.folder / ".hybrid" / "deployments")
        return [sys.executable, "-m", "serving", process, "--deployments", deployments, *words]

    def worker(self, *words: str) -> list[str]:
        return self.command("worker", "--feast", str(self.folder / ".hybrid" / "feast"), *words)

    def group(self) -> list[str]:
        with closing(kafka_python.KafkaAdminClient(bootstrap_servers=self.plain)) as admin:
            return [member["member_id"] for member in admin.describe_groups([GROUP])[GROUP]["members"]]


def properties(folder: Path, plain: int, password: int, mutual: int) -> dict[str, str]:
    pem = folder / "broker.pem"
    pem.write_text((folder / "broker.key").read_text() + (folder / "broker.crt").read_text())
    hosts = {"PLAINTEXT": plain, "PASSWORD": password, "MUTUAL": mutual}
    listeners = ",".join(f"{name}://127.0.0.1:{port}" for name, port in hosts.items())
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule"
    return {
        "advertised.listeners": listeners,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PASSWORD:SASL_SSL,MUTUAL:SSL",
        "listener.name.password.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.password.scram-sha-512.sasl.jaas.config": f"{scram} required;",
        "listener.name.mutual.ssl.client.auth": "required",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(pem),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(folder / "worker.crt"),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }


def allow(admin: kafka_python.KafkaAdminClient) -> None:
    """Users, passwords, and no more rights than they need."""

    def acl(principal: str, operation: ACLOperation, kind: ResourceType, name: str) -> ACL:
        return ACL(principal, "*", operation, ACLPermissionType.ALLOW, ResourcePattern(kind, name))

    acls = [acl(user, op, ResourceType.TOPIC, name) for user, rights in RIGHTS.items() for op, name in rights]
    own = ResourcePattern(ResourceType.TRANSACTIONAL_ID, f"{GROUP}-", ACLResourcePatternType.PREFIXED)
    acls.append(ACL("User:CN=worker", "*", WRITE, ACLPermissionType.ALLOW, own))
    admin.create_acls([*acls, acl("User:CN=worker", READ, ResourceType.GROUP, GROUP)])
    for user in ("gateway", "operator"):
        kind = ScramMechanism.SCRAM_SHA_512
        admin.alter_user_scram_credentials([UserScramCredentialUpsertion(user, kind, PASSWORD, iterations=4096)])


@pytest.fixture(scope="module")
def broker(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A Kafka with users who may use topics that are not there yet, and may create none."""
    folder = tmp_path_factory.mktemp("secured")
    for name in ("broker", "triton", "worker", "other"):
        Certificate.write(folder, name)
    plain, controller, password, mutual = free_ports(4)
    more = properties(folder, plain, password, mutual)
    listeners = f"{more['advertised.listeners']},CONTROLLER://127.0.0.1:{controller}"
    data, ports = folder / "kafka", {"port": plain, "controller_port": controller}
    service = local_kafka.service(cache, data, **ports, properties=more | {"listeners": listeners})
    with running(service, folder / "logs"):
        with closing(kafka_python.KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{plain}")) as admin:
            allow(admin)
        yield Secured(folder, *(f"127.0.0.1:{port}" for port in (plain, password, mutual)))


def test_a_topic_that_is_absent_and_may_not_be_created_is_asked_for_by_name_and_settings(broker: Secured) -> None:
    """Of those that a worker needs; of the others it cannot tell, and says so."""
    done = ended(broker.worker(*broker.by_certificate(), "--triton", "127.0.0.1:1"))
    assert "worker: Kafka refuses to create topics that serving needs; have them created, like so:" in done
    assert f"{ASKED}: 4 partitions, retention.ms=3600000, segment.ms=600000, message.timestamp.type=CreateTime" in done
    assert f"{ANSWERED}: 8 partitions, " in done
    assert f"{ASKED}.dead: 1 partitions, retention.ms=604800000" in done
    assert REPLAYS not in done


@pytest.fixture(scope="module")
def secured(broker: Secured, cache: Path) -> Iterator[Secured]:
    """The coupon model with random weights and one offer; its topics, 6 and 8 partitions, and a Triton with mTLS."""
    folder = broker.folder
    (folder / "data").mkdir()
    (folder / "model.py").write_text(COUPON.read_text())
    offer = {"offer_id": "Bar/1d", "coupon": "Bar", "expiration": "1d", "acceptance_rate": 0.4}
    pd.DataFrame([offer | {"event_timestamp": datetime.now(UTC) - timedelta(hours=1)}]).to_parquet(
        folder / "data" / "offers.parquet"
    )
    workspace, model = Workspace(folder / ".hybrid"), load_model(folder / "model.py")
    network = Network.build(model)
    deployment_of(network, 1, "0" * 64, export(network, 1, workspace.triton)).write(workspace.deployments)
    apply(model, workspace.feast)
    materialize(model, workspace.feast, datetime.now(UTC))
    partitions = create_topics(Broker(broker.plain), requests=6)
    assert (partitions[ASKED], partitions[ANSWERED]) == (6, 8)
    assert create_topics(Broker(broker.plain), requests=7) == partitions  # a topic that is there stays as it is
    http, grpc, metrics = free_ports(3)
    service = local_triton.service(
        cache,
        workspace.triton,
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        shared_memory=f"hybrid-test-{grpc}-",
        options=[
            "--grpc-use-ssl-mutual=true",
            f"--grpc-server-cert={folder / 'triton.crt'}",
            f"--grpc-server-key={folder / 'triton.key'}",
            f"--grpc-root-cert={folder / 'worker.crt'}",
        ],
    )
    with running(service, folder / "logs"):
        broker.triton = f"127.0.0.1:{grpc}"
        yield broker


@pytest.fixture(scope="module")
def gateway(secured: Secured) -> Iterator[Callable[[], httpx.Response]]:
    """Asks a gateway that shows a password to Kafka, as the third pod of a StatefulSet."""
    (port,) = free_ports(1)
    words = ["--port", str(port), "--reply-partition", "from-hostname", *secured.by_password("gateway")]
    ready = http_ok(f"http://127.0.0.1:{port}/v2/health/ready")
    environment = {"HOSTNAME": "gateway-2"}
    service = Service("gateway", secured.command("gateway", *words), ready, environment=environment, stop_timeout_s=30)
    asked = json.loads((secured.folder / ".hybrid/deployments/coupon.json").read_text())
    width = asked["versions"][0]["device_embedding"]
    inputs = [
        {"name": "entity", "datatype": "BYTES", "shape": [1], "data": ["Bar/1d"]},
        {"name": "time", "datatype": "BYTES", "shape": [1], "data": ["6PM"]},
        {"name": "device_embedding", "datatype": "FP32", "shape": [1, width], "data": [0.5] * width},
    ]
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
    with client, running(service, secured.folder / "logs") as process:
        yield lambda: client.post("/v2/models/coupon/infer", json={"inputs": inputs})
    assert process.exit_status() == 0


@pytest.fixture
def worker(secured: Secured) -> Iterator[Callable[..., Process]]:
    """Starts a worker that shows a certificate to both; it is ready when its probe says so."""
    started: list[Process] = []

    def start(*words: str) -> Process:
        (port,) = free_ports(1)
        words = (*secured.by_certificate(), *secured.to_triton(), "--metrics-port", str(port), *words)
        ready, name = http_ok(f"http://127.0.0.1:{port}/health/ready"), f"worker-{len(started)}"
        service = Service(name, secured.worker(*words), ready, ports={"metrics": port})
        started.append(Process(service, secured.folder / "logs"))
        started[-1].wait_ready()
        return started[-1]

    yield start
    for process in started:
        process.stop()


def test_a_request_is_answered_over_tls_and_no_secret_is_logged(secured, gateway, worker) -> None:
    """By password at the gateway, by certificate at the worker, both with the rights of `RIGHTS` and no more."""
    process = worker()
    answer = gateway()
    assert answer.status_code == 200
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert (outputs["transport"], outputs["status"]) == (["kafka"], ["ok"])
    assert 0 < outputs["prediction"][0] < 1
    live = httpx.get(f"http://127.0.0.1:{process.service.ports['metrics']}/health/live")
    assert (live.status_code, live.text) == (200, "ok\n")
    for log in (secured.folder / "logs").glob("*.log"):
        assert PASSWORD not in log.read_text()
    words = ["dead-letters", "list", "--json", *secured.by_password("operator")]
    listing = [sys.executable, "-m", "hybrid", *words]
    listed = subprocess.run(listing, capture_output=True, text=True, timeout=120, check=False)
    assert (listed.returncode, listed.stdout) == (0, ""), listed.stderr


def test_exactly_once_needs_rights_on_transactions_alone(gateway, worker) -> None:
    """Those whose ids begin with the group's name."""
    worker("--exactly-once", "--instance", "worker-0")
    assert gateway().status_code == 200


def test_a_worker_that_is_told_to_end_leaves_its_group_and_nothing_is_lost(secured, gateway, worker) -> None:
    """Requests go on while one of two is ended by SIGTERM: all are answered, and the group knows of one member."""
    first, _ = worker(), worker()
    ending, answers = threading.Event(), []

    def ask(_: int) -> None:
        while not ending.is_set():
            answers.append(gateway().status_code)

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, number) for number in range(4)]
        try:
            wait_for(lambda: len(answers) > 20)
            before = len(answers)
            first._popen.send_signal(signal.SIGTERM)
            first._popen.wait(30)
            assert first.exit_status() == 0
            assert len(secured.group()) == 1
            wait_for(lambda: len(answers) > before + 20)
        finally:
            ending.set()
        for each in asking:
            each.result(30)
    assert set(answers) == {200}


def wait_for(done: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(command: list[str]) -> str:
    """What a process that ends by itself, with an error, said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    return done.stdout + done.stderr


REFUSED = {
    "a wrong password": (
        lambda s: [*s.by_password("gateway", WRONG), *s.to_triton()],
        "--kafka-username and --kafka-password-file must be what 127.0.0.1:",
    ),
    "another mechanism": (
        lambda s: [*s.by_password("gateway", mechanism="PLAIN"), *s.to_triton()],
        "--kafka-sasl must be a mechanism that 127.0.0.1:",
    ),
    "a password where none is asked for": (
        lambda s: [*s.by_password("gateway"), "--kafka", s.mutual, *s.pair("--kafka", "worker"), *s.to_triton()],
        "--kafka-sasl must be left out, or --kafka be another port",
    ),
    "no TLS": (lambda s: ["--kafka", s.mutual, *s.to_triton()], "--kafka-tls must be given: 127.0.0.1:"),
    "another authority of the broker": (
        lambda s: [*s.by_certificate(authority="other"), *s.to_triton()],
        "--kafka-ca must hold its authority",
    ),
    "no certificate for the broker": (
        lambda s: [*s.by_certificate(None), *s.to_triton()],
        "--kafka-cert and --kafka-key must be a certificate that the other side takes",
    ),
    "another certificate for the broker": (
        lambda s: [*s.by_certificate("other"), *s.to_triton()],
        "--kafka-cert and --kafka-key must be a certificate that the other side takes",
    ),
    "a gateway's rights for a worker": (
        lambda s: [*s.by_password("gateway"), *s.to_triton()],
        f"Kafka's user must have the rights of a worker (GroupAuthorizationFailedError): read {ASKED} and the group",
    ),
    "another authority of Triton": (
        lambda s: [*s.by_certificate(), *s.to_triton(authority="other")],
        "--triton-ca must hold its authority",
    ),
    "no certificate for Triton": (
        lambda s: [*s.by_certificate(), *s.to_triton(None)],
        "--triton-cert and --triton-key must be a certificate that the other side takes",
    ),
}


@pytest.mark.parametrize(("shown", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_ends_the_process_with_a_sentence_that_names_the_setting(secured, shown, sentence) -> None:
    """Within the time of a start, and without the password."""
    said = ended(secured.worker(*shown(secured)))
    assert sentence in said
    assert PASSWORD not in said
    assert WRONG not in said


def test_the_doctor_looks_with_what_is_shown_and_says_which_of_it_is_refused(secured, worker, monkeypatch) -> None:
    """By a certificate at Triton, and as users of Kafka with the rights of an operator: nothing fails.

    A wrong password and a wrong authority do, each by its option; no secret is in what is said.
    """
    monkeypatch.setenv("HYBRID_HOME", str(secured.folder / ".hybrid"))
    worker()

    def doctor(*words: str) -> tuple[int, dict[str, list[tuple[str, str]]]]:
        only = ("--only", "kafka", "--only", "triton")
        done = CliRunner().invoke(app, ["doctor", "--json", *only, *words], catch_exceptions=False)
        assert PASSWORD not in done.stdout
        by_check: dict[str, list[tuple[str, str]]] = {"kafka": [], "triton": []}
        for finding in json.loads(done.stdout)["findings"]:
            by_check[finding["check"]].append((finding["status"], finding["found"]))
        return done.exit_code, by_check

    code, found = doctor(*secured.by_password("operator"), *secured.to_triton())
    assert code == 0, found
    assert found["triton"] == [("ok", f"{secured.triton} is ready, with 2 models of 1 versions")]
    assert found["kafka"][-1][0] == "warn", "it may not make a topic for the doctor"
    code, found = doctor(*secured.by_password("operator", WRONG), *secured.to_triton(authority="other"))
    assert code == 1
    ((status, text),) = found["kafka"]
    assert (status, text[:50]) == ("fail", "--kafka-username and --kafka-password-file must be")
    ((status, text),) = found["triton"]
    assert (status, "--triton-ca must hold its authority" in text) == ("fail", True)
    code, found = doctor("--kafka", secured.plain)
    assert [status for status, _ in found["kafka"]] == ["ok", "ok"], "who may do all sends a record, too"
