"""The local stack, seen from the command line: bring up, look at, bring down."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ConfigDict, Field

from hybrid.deployment import Window
from hybrid.errors import StackError
from hybrid.local import kafka, triton
from hybrid.local.process import Service, end_session, free_ports, http_ok, is_running, log_has
from hybrid.local.supervisor import Stages, State, Supervisor
from hybrid.workspace import Workspace

NOTICE = "The local stack is for development: loopback only, plaintext and unauthenticated."
_POLL_S = 0.1
_STOP_TIMEOUT_S = 60.0


class Ports(BaseModel):
    """TCP ports on 127.0.0.1, each in [1, 65535]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gateway: int = Field(8080, ge=1, le=65535)
    gateway_grpc: int = Field(8081, ge=1, le=65535)
    kafka: int = Field(19092, ge=1, le=65535)
    kafka_controller: int = Field(19093, ge=1, le=65535)
    triton_http: int = Field(18000, ge=1, le=65535)
    triton_grpc: int = Field(18001, ge=1, le=65535)
    triton_metrics: int = Field(18002, ge=1, le=65535)
    gateway_metrics: int = Field(18003, ge=1, le=65535)
    worker_metrics: int = Field(18004, ge=1, le=65535)

    @classmethod
    def choose(cls, wanted: dict[str, int | None], *, free: bool) -> Ports:
        """The ports asked for; for the others the defaults, or any that are free."""
        rest = dict(zip(cls.model_fields, free_ports(len(cls.model_fields)), strict=True)) if free else {}
        return cls.model_validate(rest | {name: port for name, port in wanted.items() if port is not None})

    def check_free(self) -> None:
        """Raises StackError if a port is asked for twice, or is taken; names the port, its option and who has it."""
        chosen: dict[int, str] = {}
        for name, port in self:
            option = f"--{name.replace('_', '-')}-port"
            if port in chosen:
                raise StackError(f"{chosen[port]} and {option} must differ, both are {port}")
            chosen[port] = option
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise StackError(
                        f"port {port} cannot be used ({_holder(port) or error.strerror}): "
                        f"choose another with {option}, or any free ones with --free-ports"
                    ) from None


class Settings(BaseModel):
    """All that a supervisor is told.

    Attributes:
        root: of the workspace.
        cache: where Kafka and Triton are installed.
        ports: to listen on.
        log_sample: share of the rows whose server side the worker keeps, for `hybrid skew`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path
    cache: Path
    ports: Ports
    log_sample: float = Field(0.0, ge=0, le=1)

    @property
    def folder(self) -> Path:
        """State and logs."""
        return Workspace(self.root).stack

    def stages(self) -> Stages:
        """Kafka and Triton, then merge worker and gateway.

        Raises:
            StackError: Kafka or Triton is not installed.
        """
        workspace, ports = Workspace(self.root), self.ports
        for folder in (workspace.triton, workspace.bundles):
            folder.mkdir(parents=True, exist_ok=True)
        reached = ["--kafka", f"127.0.0.1:{ports.kafka}", "--feast", str(workspace.feast)]
        reached += ["--triton", f"127.0.0.1:{ports.triton_grpc}"]
        return (
            (
                kafka.service(
                    self.cache, _kafka_data(workspace), port=ports.kafka, controller_port=ports.kafka_controller
                ),
                triton.service(
                    self.cache,
                    workspace.triton,
                    http_port=ports.triton_http,
                    grpc_port=ports.triton_grpc,
                    metrics_port=ports.triton_metrics,
                    shared_memory=shared_memory(workspace),
                ),
            ),
            (
                _serving(
                    "worker",
                    workspace,
                    [
                        *(*reached, "--metrics-port", str(ports.worker_metrics)),
                        *("--log-sample", str(self.log_sample), "--log", str(workspace.request_log)),
                    ],
                    log_has("ready"),
                    {"metrics": ports.worker_metrics},
                ),
                _serving(
                    "gateway",
                    workspace,
                    [
                        *(*reached, "--metrics-port", str(ports.gateway_metrics)),
                        *("--host", "127.0.0.1", "--port", str(ports.gateway), "--grpc-port", str(ports.gateway_grpc)),
                        *("--bundles", str(workspace.bundles)),
                    ],
                    http_ok(f"http://127.0.0.1:{ports.gateway}/v2/health/ready"),
                    {"gateway": ports.gateway, "gateway-grpc": ports.gateway_grpc, "metrics": ports.gateway_metrics},
                ),
            ),
        )


def up(settings: Settings, show: Callable[[State], None] = lambda _: None) -> State:
    """Starts the stack in the background and returns when it is ready.

    A stack that is up already is left as it is. What a crashed one left is removed first.

    Args:
        settings: of the stack.
        show: called with each new state on the way.

    Raises:
        StackError: nothing is promoted, a port is taken, a server is not installed
            or failed. Nothing is left running.
        KeyboardInterrupt: SIGINT or SIGTERM came. Nothing is left running.
    """
    workspace = Workspace(settings.root)
    state = status(workspace)
    if state is not None and state.phase == "ready":
        return state
    if state is not None and state.phase != "failed":
        raise StackError(f"the stack is {state.phase}: wait, or run `hybrid down`")
    check_promoted(workspace)
    settings.ports.check_free()
    settings.stages()  # before anything starts: is all installed?
    _sweep(workspace, state)
    with _noted_interrupts() as interrupted:
        supervisor = _spawn(settings)
        seen = None
        while supervisor.poll() is None:
            if interrupted:
                supervisor.terminate()
                supervisor.wait()
                raise KeyboardInterrupt
            state = State.read(settings.folder)
            if state is not None and state != seen and state.supervisor == supervisor.pid:
                show(state)
                seen = state
                if state.phase == "ready":
                    supervisor.returncode = 0  # it goes on without us
                    return state
            with contextlib.suppress(subprocess.TimeoutExpired):
                supervisor.wait(_POLL_S)
    state = State.read(settings.folder)
    if state is not None and state.message:
        raise StackError(state.message)
    log = settings.folder / "logs" / "supervisor.log"
    raise StackError(f"the supervisor ended with exit status {supervisor.returncode}:\n{log.read_text().strip()}")


def check_promoted(workspace: Workspace) -> None:
    """Raises StackError where there is nothing to serve."""
    if not Window.read_all(workspace.deployments):
        raise StackError("nothing is promoted yet: run `hybrid promote MODEL VERSION production` first")


def status(workspace: Workspace) -> State | None:
    """What the stack is doing; None when it is down. One whose supervisor is gone counts as failed."""
    state = State.read(workspace.stack)
    if state is None or state.phase == "failed" or is_running(state.supervisor, state.started):
        return state
    servers = tuple(
        server if is_running(server.pid, server.started) else server.model_copy(update={"phase": "died"})
        for server in state.servers
    )
    message = f"the supervisor (pid {state.supervisor}) was killed; on Linux its servers die with it"
    return state.model_copy(update={"phase": "failed", "message": message, "servers": servers})


def down(workspace: Workspace) -> bool:
    """Stops the stack and waits until all of it is gone; also removes what a crashed one left.

    Returns:
        Whether there was anything to stop or remove.

    Raises:
        StackError: it does not stop.
    """
    state = status(workspace)
    if state is None:
        return False
    if state.phase != "failed":
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.supervisor, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while is_running(state.supervisor, state.started):
            if time.monotonic() > deadline:
                raise StackError(f"the supervisor (pid {state.supervisor}) did not stop in {_STOP_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
    _sweep(workspace, state)
    return True


def supervise(settings: Settings) -> int:
    """What the supervisor process does; returns its exit status.

    Raises:
        StackError: another supervisor has the workspace, or a server is not installed.
    """
    return Supervisor(settings.folder, settings.stages()).run()


def shared_memory(workspace: Workspace) -> str:
    """What the names of this workspace's files in /dev/shm begin with."""
    return f"hybrid-{hashlib.sha256(str(workspace.stack).encode()).hexdigest()[:12]}-"


def _spawn(settings: Settings) -> subprocess.Popen[bytes]:
    """A supervisor in a session of its own, which a terminal's Ctrl-C or end does not reach."""
    logs = settings.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "supervisor.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "hybrid.local", "supervise", settings.model_dump_json()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _serving(
    name: str,
    workspace: Workspace,
    arguments: list[str],
    ready: Callable[[Path], bool],
    ports: dict[str, int],
) -> Service:
    """A process of the `serving` package."""
    key = workspace.keys / "dead-letters.pub"  # of `hybrid dead-letters keygen`
    return Service(
        name=name,
        # -P: a folder named `serving` where the user stands is not ours.
        command=[
            *(sys.executable, "-P", "-m", "serving", name),
            *("--deployments", str(workspace.deployments)),
            *(("--dead-letter-key", str(key)) if key.exists() else ()),
            *arguments,
        ],
        ready=ready,
        ports=ports,
        environment={"PYTHONUNBUFFERED": "1"},
    )


def _sweep(workspace: Workspace, state: State | None) -> None:
    """Removes what a stack that does not run any more may have left: servers, shared memory, data, state."""
    for server in state.servers if state else ():
        if server.pid is not None and server.started is not None:
            end_session(server.pid, server.started)
    triton.remove_shared_memory(shared_memory(workspace))
    shutil.rmtree(_kafka_data(workspace), ignore_errors=True)
    State.file(workspace.stack).unlink(missing_ok=True)


def _kafka_data(workspace: Workspace) -> Path:
    return workspace.stack / "kafka"


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """SIGINT and SIGTERM end in the list instead of anywhere in our code, so that none is lost between two steps."""
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _holder(port: int) -> str:
    """Who listens on the port, in words; "" where the system does not tell."""
    import psutil

    with contextlib.suppress(psutil.Error, PermissionError):
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and connection.pid and address and address.port == port:
                return f"{psutil.Process(connection.pid).name()}, pid {connection.pid}, has it"
    return ""
