"""The gateway's two fronts as real processes, asked by clients that know only the protocol, with and without keys."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import numpy as np
import pandas as pd
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from cryptography.hazmat.primitives.asymmetric import ec
from tritonclient.utils import InferenceServerException

from feature_store.materialize import apply, materialize
from hybrid.deployment import Deployment
from hybrid.export.promote import deployment_of
from hybrid.export.triton import export
from hybrid.local.process import Process, Service, free_ports, http_ok, log_has, running
from hybrid.network import Network
from hybrid.spec import load_model
from hybrid.workspace import Workspace
from serving.testing import Certificate

COUPON = Path(__file__).parents[1] / "examples" / "coupon" / "model.py"


@dataclass
class Stack:
    """Kafka, Triton and a worker that serve the coupon model; gateways are the tests' own."""

    folder: Path
    broker: str
    deployment: Deployment
    gateways: int = field(default=0)
    worker: Process | None = field(default=None)

    def command(self, process: str, *arguments: str) -> list[str]:
        where = ["--deployments", str(self.folder / ".hybrid" / "deployments"), "--kafka", self.broker]
        return [sys.executable, "-m", "serving", process, *where, *arguments]

    @contextlib.contextmanager
    def gateway(self, *arguments: str, partition: int = 0, secure: bool = False) -> Iterator["Front"]:
        """A gateway with both fronts; ready when it is entered, gone with exit status 0 when it is left."""
        self.gateways += 1
        http, grpc = free_ports(2)
        ports = ("--port", str(http), "--grpc-port", str(grpc), "--reply-partition", str(partition))
        ready = tcp_open(grpc) if secure else http_ok(f"http://127.0.0.1:{http}/v2/health/ready")
        name = f"gateway-{self.gateways}"
        service = Service(name, self.command("gateway", *ports, *arguments), ready, stop_timeout_s=30)
        with running(service, self.folder / "logs") as process:
            yield Front(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", process, self.folder / "logs" / f"{name}.log")
        assert process.exit_status() == 0


@dataclass(frozen=True)
class Front:
    """Where a gateway answers, as HOST:PORT."""

    http: str
    grpc: str
    process: Process
    log: Path


def tcp_open(port: int) -> Callable[[Path], bool]:
    def check(_: Path) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return check


@pytest.fixture(scope="module")
def stack(kafka: str, triton: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The coupon model with random weights and one offer, without a gateway."""
    folder = tmp_path_factory.mktemp("access")
    (folder / "data").mkdir()
    (folder / "model.py").write_text(COUPON.read_text())
    offer = {"offer_id": "Bar/1d", "coupon": "Bar", "expiration": "1d", "acceptance_rate": 0.4}
    pd.DataFrame([offer | {"event_timestamp": datetime.now(UTC) - timedelta(hours=1)}]).to_parquet(
        folder / "data" / "offers.parquet"
    )
    workspace, model = Workspace(folder / ".hybrid"), load_model(folder / "model.py")
    network = Network.build(model)
    deployment = deployment_of(network, 1, "0" * 64, export(network, 1, workspace.triton))
    deployment.write(workspace.deployments)
    apply(model, workspace.feast)
    materialize(model, workspace.feast, datetime.now(UTC))
    found = Stack(folder, kafka, deployment)
    arguments = ["--feast", str(workspace.feast), "--triton", triton(workspace.triton).grpc]
    worker = Service("worker", found.command("worker", *arguments), log_has("ready"))
    with running(worker, folder / "logs") as found.worker:
        yield found


@pytest.fixture(scope="module")
def front(stack: Stack) -> Iterator[Front]:
    """A gateway on loopback that asks nobody who they are, with all that it can do."""
    (stack.folder / "bundles").mkdir()
    (stack.folder / "bundles" / "coupon-1.bundle").write_bytes(bytes(range(256)) * 8)
    folders = ["--bundles", str(stack.folder / "bundles"), "--results", str(stack.folder / "results")]
    with stack.gateway(*folders) as opened:
        yield opened


def columns(stack: Stack, rows: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows)
    embedding = random.normal(size=(rows, stack.deployment.device_embedding)).astype(np.float32)
    text = {"entity": ["Bar/1d"] * rows, "time": ["6PM", "10AM", "never"][:rows]}
    return {name: np.array(values, dtype=object) for name, values in text.items()} | {"device_embedding": embedding}


def tensors(client: Any, values: dict[str, np.ndarray]) -> list[Any]:
    inputs = []
    for name, column in values.items():
        inputs.append(client.InferInput(name, list(column.shape), "FP32" if column.dtype == np.float32 else "BYTES"))
        inputs[-1].set_data_from_numpy(column)
    return inputs


def test_tritonclient_gets_the_same_over_both_fronts(stack: Stack, front: Front) -> None:
    """Health, metadata and a batch: as plain clients, with equal answers."""
    values = columns(stack)
    answers = []
    for client, url in ((triton_http, front.http), (triton_grpc, front.grpc)):
        with contextlib.closing(client.InferenceServerClient(url)) as server:
            assert server.is_server_live()
            assert server.is_server_ready()
            assert server.is_model_ready("coupon")
            assert server.is_model_ready("coupon", "1")
            options = {} if client is triton_http else {"as_json": True}
            metadata = server.get_server_metadata(**options)
            model = server.get_model_metadata("coupon", **options)
            shapes = [(i["name"], i["datatype"], [int(n) for n in i["shape"]]) for i in model["inputs"]]
            answer = server.infer("coupon", tensors(client, values), request_id="7", timeout=4_000_000)
            predicted = {n: answer.as_numpy(n).tolist() for n in ("prediction", "version", "merged")}
            answers.append((metadata["name"], model["versions"], shapes, predicted))
    assert answers[0] == answers[1]
    prediction = answers[0][3]["prediction"]
    assert answers[0][3] == {"prediction": prediction, "version": [1] * 3, "merged": [b"server"] * 3}
    assert all(0 < each < 1 for each in prediction)


def test_what_cannot_be_predicted_has_a_status_over_grpc(stack: Stack, front: Front) -> None:
    """An unknown entity, another model, a missing input, a deadline too short: each its own."""
    good = columns(stack, 1)
    wrong = [
        ("coupon", good | {"entity": np.array(["Mars/1d"], dtype=object)}, {}, "StatusCode.NOT_FOUND"),
        ("other", good, {}, "StatusCode.NOT_FOUND"),
        ("coupon", {"entity": good["entity"]}, {}, "StatusCode.INVALID_ARGUMENT"),
        ("coupon", good, {"timeout": 1}, "StatusCode.UNAVAILABLE"),
    ]
    with contextlib.closing(triton_grpc.InferenceServerClient(front.grpc)) as server:
        for model, values, options, status in wrong:
            with pytest.raises(InferenceServerException) as refused:
                server.infer(model, tensors(triton_grpc, values), **options)
            assert refused.value.status() == status
        assert server.infer("coupon", tensors(triton_grpc, good)).as_numpy("version").tolist() == [1]


def test_schemathesis_finds_no_server_error(front: Front, tmp_path: Path) -> None:
    """Examples, boundary values and random requests, right and wrong, for half a minute."""
    hooks = tmp_path / "hooks.py"
    hooks.write_text(
        "import schemathesis\n\n\n"
        "@schemathesis.hook\n"
        "def map_body(context, body):\n"
        "    # A caller that waits a microsecond is told so with 503: no fault of the gateway.\n"
        '    if isinstance(body, dict) and isinstance(body.get("parameters"), dict):\n'
        '        body["parameters"].pop("timeout", None)\n'
        "    return body\n"
    )
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"http://{front.http}/openapi.json"),
        # A schema cannot say that a tensor has as many values as its shape says, so what it allows may be refused.
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
        *("--max-examples", "40", "--max-time", "45", "--seed", "1", "--no-color"),
        *("--continue-on-failure", "--warnings", "off", "--no-shrink"),
    ]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": str(hooks), "PYTHONPATH": os.pathsep.join(sys.path)}
    options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    run = subprocess.run(command, check=False, timeout=180, **options)
    assert run.returncode == 0, run.stdout[-6_000:] + run.stderr[-2_000:]
    assert int(re.search(r"(\d+) generated", run.stdout).group(1)) > 300
    assert "internal error" not in front.log.read_text()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.write(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file of keys, and the text of one in it."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    command = [sys.executable, "-m", "serving", "api-key", "coupon-app", "--file", str(file)]
    return file, subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def infer_grpc(stack: Stack, front: Front, certificate: Certificate, headers: dict[str, str]) -> list[int]:
    client = triton_grpc.InferenceServerClient(front.grpc, ssl=True, root_certificates=str(certificate.chain))
    with contextlib.closing(client):
        answer = client.infer("coupon", tensors(triton_grpc, columns(stack, 1)), headers=headers)
        return answer.as_numpy("version").tolist()


def question(stack: Stack) -> dict[str, Any]:
    """The JSON of a request of one row."""
    inputs = [
        {
            "name": n,
            "datatype": "FP32" if c.dtype == np.float32 else "BYTES",
            "shape": list(c.shape),
            "data": c.tolist(),
        }
        for n, c in columns(stack, 1).items()
    ]
    return {"inputs": inputs}


def infer_http(stack: Stack, front: Front, trust: ssl.SSLContext, headers: dict[str, str]) -> httpx.Response:
    body = question(stack)
    with httpx.Client(verify=trust, timeout=20) as client:
        return client.post(f"https://{front.http}/v2/models/coupon/infer", json=body, headers=headers)


def ready(front: Front, trust: ssl.SSLContext) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"https://{front.http}/v2/health/ready", verify=trust).status_code == 200
    return False


def wait_for(holds: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_behind_tls_and_keys_two_processes_serve_both_fronts(
    stack: Stack, certificate: Certificate, key: tuple[Path, str]
) -> None:
    """With a key, answers from either process; without, 401. One is killed: it comes again, and all is answered.

    Each has metrics on a port of its own, the second on the next.
    """
    file, text = key
    trust, shown = ssl.create_default_context(cafile=certificate.chain), {"authorization": f"Bearer {text}"}
    arguments = ["--api-keys", str(file), "--processes", "2", "--tls-cert", str(certificate.chain)]

    def is_free(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    metrics = next(port for port in free_ports(20) if is_free(port + 1))
    arguments += ["--tls-key", str(certificate.key), "--metrics-port", str(metrics)]
    with stack.gateway(*arguments, partition=2, secure=True) as front:
        parent = psutil.Process(front.process._popen.pid)

        def children() -> list[psutil.Process]:
            """Those of them that serve HTTP, the last that they begin with: multiprocessing has a helper of its own."""
            port = int(front.http.rpartition(":")[2])
            served = [
                (c, [s.laddr.port for s in c.net_connections("tcp") if s.status == "LISTEN"]) for c in parent.children()
            ]
            return [child for child, ports in served if port in ports]

        def both_ready() -> bool:
            return len(children()) == 2 and all(ready(front, trust) for _ in range(10))

        wait_for(both_ready)
        for _ in range(20):  # each a connection of its own, which either process may get
            assert infer_http(stack, front, trust, shown).status_code == 200
            assert infer_grpc(stack, front, certificate, shown) == [1]
        pages = [httpx.get(f"http://127.0.0.1:{metrics + number}/metrics").text for number in range(2)]
        counted = r'^hybrid_gateway_requests_total{code="ok",.*} (\S+)$'
        assert sum(float(count) for page in pages for count in re.findall(counted, page, re.M)) == 40
        refused = infer_http(stack, front, trust, {})
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated")
        with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
            infer_grpc(stack, front, certificate, {"authorization": f"Bearer {text}x"})
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{front.http}/v2/health/live")
        killed = children()[0]
        killed.send_signal(signal.SIGKILL)
        killed.wait(10)
        wait_for(lambda: killed not in children() and both_ready())
        for _ in range(20):
            assert infer_http(stack, front, trust, shown).status_code == 200
            assert infer_grpc(stack, front, certificate, shown) == [1]
        family = parent.children(recursive=True)
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert "ended with -9 and is started again" in front.log.read_text()
    assert not any(secret in front.log.read_text() for secret in (text, text.split("_")[1], "coupon-app"))


def test_a_large_body_without_a_key_is_told_so(stack: Stack, key: tuple[Path, str]) -> None:
    """A megabyte that nobody reads: the client still sees the 401, and the gateway goes on."""
    with stack.gateway("--api-keys", str(key[0]), partition=4) as front:
        for _ in range(5):
            refused = httpx.post(f"http://{front.http}/v2/models/coupon/infer", content=bytes(1 << 20))
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, 'Bearer realm="hybrid"')
        assert httpx.get(f"http://{front.http}/v2/health/live").status_code == 200


def test_a_token_of_the_issuer_lets_in(stack: Stack, tmp_path: Path) -> None:
    """A JWT whose key is in the issuer's set: it answers; one of a stranger's key: 401; past its rate: 429."""
    known, stranger = (ec.generate_private_key(ec.SECP256R1()) for _ in "ab")
    public = jwt.algorithms.ECAlgorithm.to_jwk(known.public_key(), as_dict=True) | {"kid": "1"}
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [public]}))
    claims = {"iss": "https://issuer", "aud": "hybrid", "sub": "app-7", "exp": int(time.time()) + 600}
    good, bad = (jwt.encode(claims, each, "ES256", headers={"kid": "1"}) for each in (known, stranger))
    issuer = ["--jwt-issuer", "https://issuer", "--jwt-audience", "hybrid", "--jwt-keys", str(tmp_path / "jwks.json")]
    with stack.gateway(*issuer, "--requests-per-s", "0.01", partition=5) as front:
        url = f"http://{front.http}/v2/models/coupon"
        with contextlib.closing(triton_grpc.InferenceServerClient(front.grpc)) as client:
            values, shown = tensors(triton_grpc, columns(stack)), {"authorization": f"Bearer {good}"}
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.infer("coupon", values, headers={"authorization": f"Bearer {bad}"})
            assert client.infer("coupon", values, headers=shown).as_numpy("version").tolist() == [1] * 3
        assert httpx.get(url, headers={"Authorization": f"Bearer {bad}"}).status_code == 401
        limited = httpx.get(url, headers={"Authorization": f"Bearer {good}"})
        assert (limited.status_code, limited.json()["code"]) == (429, "rate_limited")
        assert 90 <= int(limited.headers["Retry-After"]) <= 100
    assert not any(secret in front.log.read_text() for secret in (good, bad, "app-7"))


def test_with_a_client_ca_a_client_must_show_a_certificate(
    stack: Stack, certificate: Certificate, tmp_path: Path
) -> None:
    """Over both fronts; a stranger's certificate is none."""
    known, stranger = Certificate.write(tmp_path, "known"), Certificate.write(tmp_path, "stranger")
    arguments = ["--tls-cert", str(certificate.chain), "--tls-key", str(certificate.key)]
    with stack.gateway(*arguments, "--tls-client-ca", str(known.chain), partition=4, secure=True) as front:
        for shown, let_in in ((known, True), (stranger, False), (None, False)):
            trust = ssl.create_default_context(cafile=certificate.chain)
            options: dict[str, Any] = {"ssl": True, "root_certificates": str(certificate.chain)}
            if shown is not None:
                trust.load_cert_chain(shown.chain, shown.key)
                options |= {"private_key": str(shown.key), "certificate_chain": str(shown.chain)}
            if let_in:
                wait_for(lambda trust=trust: ready(front, trust))
                assert infer_http(stack, front, trust, {}).status_code == 200
            else:
                assert not ready(front, trust)
            with contextlib.closing(triton_grpc.InferenceServerClient(front.grpc, **options)) as client:
                if let_in:
                    assert client.is_server_ready(client_timeout=10)
                else:
                    with pytest.raises(InferenceServerException):
                        client.is_server_ready(client_timeout=2)


def predicted(answer: httpx.Response) -> dict[str, Any]:
    """What an answer says, without the time that has passed."""
    assert answer.status_code == 200
    return {o["name"]: o["data"] for o in answer.json()["outputs"] if o["name"] != "feature_age_ms"}


def test_an_answer_is_fetched_later_from_either_of_two_processes_whatever_ends_meanwhile(
    stack: Stack, tmp_path: Path
) -> None:
    """The ticket of one is known to both, and to no other client. Processes that are killed leave it pending until
    its answer is due, and then it says that they ended; one that is told to end answers it first."""
    make = [sys.executable, "-m", "serving", "api-key"]
    keys = {
        name: subprocess.run(
            [*make, name, "--file", str(tmp_path / "keys")], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("coupon-app", "other-app")
    }
    shown, other = ({"Authorization": f"Bearer {text}"} for text in keys.values())
    later = shown | {"Prefer": "respond-async, wait=1"}
    common = ["--api-keys", str(tmp_path / "keys"), "--results", str(tmp_path / "results"), "--deadline-s", "2"]
    infer, body = "/v2/models/coupon/infer", question(stack)

    def done(url: str) -> httpx.Response | None:
        found = httpx.get(url, headers=shown)  # a connection of its own, which either process may get
        if found.status_code == 202:
            assert found.headers["Retry-After"] == "1"
            return None
        return found

    with stack.gateway(*common, "--processes", "2", partition=6) as front:
        url = f"http://{front.http}"
        parent = psutil.Process(front.process.pid)

        def serving() -> list[psutil.Process]:
            port = int(front.http.rpartition(":")[2])
            return [c for c in parent.children() if any(s.laddr.port == port for s in c.net_connections("tcp"))]

        wait_for(lambda: len(serving()) == 2 and all(http_ok(f"{url}/v2/health/ready")(tmp_path) for _ in range(10)))
        taken = httpx.post(url + infer, json=body, headers=later)
        assert (taken.status_code, taken.headers["Preference-Applied"]) == (202, "respond-async")
        result = url + taken.headers["Location"]
        at_once = predicted(httpx.post(url + infer, json=body, headers=shown))
        assert predicted(wait_for(lambda: done(result))) == at_once
        assert all(predicted(httpx.get(result, headers=shown)) == at_once for _ in range(20))
        assert {httpx.request(method, result, headers=other).status_code for method in ("GET", "DELETE")} == {404}
        assert httpx.delete(result, headers=shown).status_code == 204
        assert {httpx.get(result, headers=shown).status_code for _ in range(20)} == {404}

        os.kill(stack.worker.pid, signal.SIGSTOP)  # from here on nothing is answered
        try:
            lost = httpx.post(url + infer, json=body, headers=later).headers["Location"]
            killed = serving()
            for each in killed:
                each.kill()
            psutil.wait_procs(killed, timeout=10)
            wait_for(lambda: len(serving()) == 2 and http_ok(f"{url}/v2/health/ready")(tmp_path))
            told = wait_for(lambda: done(url + lost))
            assert (told.status_code, told.json()["code"]) == (503, "unavailable")
            assert "the gateway that took it ended" in told.json()["error"]
            last = httpx.post(url + infer, json=body, headers=later).headers["Location"]
            front.process.stop()
            assert front.process.exit_status() == 0
        finally:
            os.kill(stack.worker.pid, signal.SIGCONT)
    assert not any(secret in front.log.read_text() for secret in (*keys, *keys.values(), last.rpartition("/")[2]))
    with stack.gateway(*common, partition=6) as front:
        url = f"http://{front.http}"
        told = httpx.get(url + last, headers=shown)
        assert (told.status_code, told.json()["error"]) == (503, "no answer in time (2 s)")
        wait_for(lambda: httpx.post(url + infer, json=body, headers=shown).status_code == 200)
