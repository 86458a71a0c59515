"""`hybrid up`, `status` and `down` with real Kafka, Triton, gateway and worker, and what can befall them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
import pytest

from feature_store.materialize import apply, materialize
from hybrid.export.promote import deployment_of
from hybrid.export.triton import export
from hybrid.local.stack import shared_memory
from hybrid.network import Network
from hybrid.spec import load_model
from hybrid.workspace import Workspace

COUPON = Path(__file__).parents[1] / "examples" / "coupon" / "model.py"
SERVERS = ["kafka", "triton", "worker", "gateway"]


@dataclass
class Project:
    """A workspace with a promoted version, and the command line over it."""

    workspace: Workspace
    cache: Path
    processes_naming: Callable[[str], list[str]]

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {"HYBRID_HOME": str(self.workspace.root), "HYBRID_CACHE": str(self.cache)}
        return subprocess.Popen(
            [sys.executable, "-m", "hybrid", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hybrid(self, *arguments: str, status: int = 0) -> str:
        """Runs a command and returns what it says; checks its exit status."""
        with self.command(*arguments) as process:
            output, error = process.communicate(timeout=150)
        assert process.returncode == status, output + error
        return output if status == 0 else output + error

    def up(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.hybrid("up", "--free-ports", "--json"))
        return state

    def left(self) -> list[str]:
        """Processes that name the workspace, and files in shared memory."""
        files = Path("/dev/shm").glob(f"{shared_memory(self.workspace)}*")
        return [*self.processes_naming(str(self.workspace.root)), *(file.name for file in files)]


@pytest.fixture(scope="module")
def promoted(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, processes_naming: Callable[[str], list[str]]
) -> Project:
    """The coupon model with random weights, exported and deployed, and one offer in the feature store."""
    folder = tmp_path_factory.mktemp("stack")
    (folder / "data").mkdir()
    file = folder / "model.py"
    file.write_text(COUPON.read_text())
    offer = {"offer_id": "Bar/1d", "coupon": "Bar", "expiration": "1d", "acceptance_rate": 0.4}
    pd.DataFrame([offer | {"event_timestamp": datetime.now(UTC) - timedelta(hours=1)}]).to_parquet(
        folder / "data" / "offers.parquet"
    )
    workspace, model = Workspace(folder / ".hybrid"), load_model(file)
    network = Network.build(model)
    deployment_of(network, 1, "0" * 64, export(network, 1, workspace.triton)).write(workspace.deployments)
    apply(model, workspace.feast)
    materialize(model, workspace.feast, datetime.now(UTC))
    return Project(workspace, cache, processes_naming)


@pytest.fixture
def project(promoted: Project) -> Iterator[Project]:
    """The same, down before and after the test."""
    yield promoted
    promoted.hybrid("down")
    assert promoted.left() == []


def wait_until_none(remaining: Callable[[], list[str]], timeout_s: float = 60) -> None:
    """Looks again and again; what is still there in the end is the message."""
    deadline = time.monotonic() + timeout_s
    while left := remaining():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def ask(port: int) -> httpx.Response:
    """What a client does that knows the model's name only: metadata, then one request."""
    model = f"http://127.0.0.1:{port}/v2/models/coupon"
    shapes = {each["name"]: each["shape"] for each in httpx.get(model).json()["inputs"]}
    size = shapes["device_embedding"][1]
    inputs = [("entity", "BYTES", [1], ["Bar/1d"]), ("time", "BYTES", [1], ["6PM"])]
    inputs.append(("device_embedding", "FP32", [1, size], [0.0] * size))
    names = ("name", "datatype", "shape", "data")
    body = {"inputs": [dict(zip(names, each, strict=True)) for each in inputs]}
    return httpx.post(f"{model}/infer", json=body, timeout=20)


def test_up_serves_on_loopback_only_until_down(project: Project):
    """The state names four ready servers; a prediction is answered; a second `up` changes nothing; `down` ends all."""
    state = project.up()
    assert state["phase"] == "ready"
    assert [(server["name"], server["phase"]) for server in state["servers"]] == [(name, "ready") for name in SERVERS]
    answer = ask(state["servers"][3]["ports"]["gateway"])
    assert answer.status_code == 200, answer.text
    assert 0 < {output["name"]: output["data"] for output in answer.json()["outputs"]}["prediction"][0] < 1
    for server in state["servers"]:
        listening = [c for c in psutil.Process(server["pid"]).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::ffff:127.0.0.1"}
        assert {c.laddr.port for c in listening} == set(server["ports"].values())
        assert Path(server["log"]).is_file()
    assert not list(project.workspace.triton.rglob("__pycache__"))  # Triton would load every model again
    assert json.loads(project.hybrid("status", "--json")) == state
    assert json.loads(project.hybrid("up", "--json")) == state
    assert "plaintext and unauthenticated" in project.hybrid("status")
    project.hybrid("down")
    assert project.left() == []
    assert "down" in project.hybrid("status", status=1)
    assert "is not up" in project.hybrid("down")


def test_a_taken_port_is_named_and_nothing_is_started(project: Project):
    """The message has the port, the option and the process that has it: this one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = project.hybrid("up", "--free-ports", "--kafka-port", str(port), status=1)
    assert f"port {port}" in said
    assert f"pid {os.getpid()}" in said
    assert "--kafka-port" in said
    assert project.left() == []


def test_after_a_crash_nothing_is_left_and_up_works_again(project: Project):
    """Kafka is killed: the supervisor stops the rest and says so. The supervisor is: the kernel ends its servers."""
    state = project.up()
    os.kill(state["servers"][0]["pid"], signal.SIGKILL)
    wait_until_none(project.left)
    assert "kafka was killed by SIGKILL" in project.hybrid("status", status=1)
    state = project.up()
    assert state["phase"] == "ready"
    os.kill(state["supervisor"], signal.SIGKILL)
    root = str(project.workspace.root)
    wait_until_none(lambda: [line for line in project.left() if root in line])  # shared memory stays until `down`
    assert "was killed" in project.hybrid("status", status=1)


def test_ctrl_c_during_up_ends_all(project: Project):
    """It comes when Kafka has begun to start; the exit status is the shell's for it."""
    with project.command("up", "--free-ports") as process:
        assert process.stderr is not None
        while "kafka: starting" not in process.stderr.readline():
            assert process.poll() is None, "it ended before Kafka began to start"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Nothing is left running" in said
    assert project.left() == []
