"""The process that keeps the local stack: starts servers in order, watches them, stops all when one dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, Never

from pydantic import BaseModel, ConfigDict

from hybrid.errors import StackError
from hybrid.local.process import Process, Service, started

Stages = Sequence[Sequence[Service]]
_POLL_S = 0.1


class Server(BaseModel):
    """One server of the stack, as `hybrid status` shows it.

    Attributes:
        name: of the server.
        phase: what it is doing.
        pid: its process; None before its start.
        started: when that process started, in Unix seconds: with `pid`, its identity.
        ports: use -> TCP port on 127.0.0.1.
        log: its output.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    phase: Literal["waiting", "starting", "ready", "died", "stopped"] = "waiting"
    pid: int | None = None
    started: float | None = None
    ports: dict[str, int]
    log: Path


class State(BaseModel):
    """The stack, as its supervisor last wrote it.

    Attributes:
        phase: "failed" stays until the next `hybrid up` or `hybrid down`.
        message: why it failed; which server died, how, and the end of its log.
        supervisor, started: as `Server.pid` and `Server.started`.
        servers: in the order of their start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Literal["starting", "ready", "stopping", "failed"]
    message: str = ""
    supervisor: int
    started: float
    servers: tuple[Server, ...]

    @staticmethod
    def file(folder: Path) -> Path:
        """Where the supervisor of the stack in `folder` keeps its state."""
        return folder / "state.json"

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """What was last written, or None. A file that is not a state counts as none."""
        try:
            return cls.model_validate_json(cls.file(folder).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def write(self, folder: Path) -> None:
        """Replaces the state in one step."""
        draft = self.file(folder).with_suffix(".json.new")
        draft.write_text(self.model_dump_json(indent=2))
        draft.replace(self.file(folder))


class Stopped(Exception):
    """Somebody asked the supervisor to stop."""


class Supervisor:
    """Runs the servers of one stack until it is told to stop or one of them ends.

    Attributes:
        folder: of the stack's state and logs; one supervisor at a time.
        stages: servers of one stage start together, a stage when the one before is ready.
    """

    def __init__(self, folder: Path, stages: Stages) -> None:
        self.folder, self.stages = folder, stages
        self._processes: dict[str, Process] = {}
        self._phases = {service.name: "waiting" for service in chain(*stages)}

    def run(self) -> int:
        """Returns the exit status: 0 when it was told to stop, 1 when a server failed.

        Raises:
            StackError: another supervisor has the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _only_one(self.folder), _Signals() as signals:
            failure = ""
            try:
                self._keep(signals)
            except Stopped:
                pass
            except StackError as error:
                failure = str(error)
            finally:
                self._stop(failure)
            if failure:
                self._write("failed", failure)
                return 1
            State.file(self.folder).unlink()
            return 0

    def _keep(self, signals: _Signals) -> Never:
        """Starts all, then waits for a reason to stop, which it raises."""
        for stage in self.stages:
            self._start(stage, signals)
        self._write("ready")
        while True:
            signals.wait()
            self._check()

    def _start(self, stage: Sequence[Service], signals: _Signals) -> None:
        """Returns when all of the stage is ready."""
        for service in stage:
            self._phases[service.name] = "starting"
            self._write("starting")
            self._processes[service.name] = Process(service, self.folder / "logs")
        waiting = {service.name for service in stage}
        self._write("starting")
        while waiting:
            signals.wait(_POLL_S)
            self._check()
            ready = {name for name in waiting if self._processes[name].is_ready()}
            if ready:
                waiting -= ready
                self._phases.update(dict.fromkeys(ready, "ready"))
                self._write("starting")

    def _check(self) -> None:
        dead = [process for process in self._processes.values() if process.exit_status() is not None]
        if dead:
            self._phases.update({process.service.name: "died" for process in dead})
            raise StackError("\n".join(process.obituary() for process in dead))

    def _stop(self, failure: str) -> None:
        """Last started first, so that no server loses one it needs."""
        self._write("stopping", failure)
        for name, process in reversed(self._processes.items()):
            process.stop()
            if self._phases[name] != "died":
                self._phases[name] = "stopped"
            self._write("stopping", failure)

    def _write(self, phase: Literal["starting", "ready", "stopping", "failed"], message: str = "") -> None:
        State(
            phase=phase,
            message=message,
            supervisor=os.getpid(),
            started=started(os.getpid()),
            servers=tuple(self._server(service) for service in chain(*self.stages)),
        ).write(self.folder)

    def _server(self, service: Service) -> Server:
        process = self._processes.get(service.name)
        return Server.model_validate(
            {
                "name": service.name,
                "phase": self._phases[service.name],
                "pid": process and process.pid,
                "started": process and process.started,
                "ports": dict(service.ports),
                "log": self.folder / "logs" / f"{service.name}.log",
            }
        )


class _Signals:
    """Waits for a child's end, a request to stop, or a time."""

    def __enter__(self) -> _Signals:
        self._end, wakeup = socket.socketpair()
        self._end.setblocking(False)
        wakeup.setblocking(False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wakeup.fileno())
        self._wakeup = wakeup
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        self._wakeup.close()
        self._end.close()

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns after a child's end or `timeout_s`.

        Raises:
            Stopped: SIGTERM or SIGINT came.
        """
        if select.select([self._end], [], [], timeout_s)[0] and {signal.SIGTERM, signal.SIGINT} & set(
            self._end.recv(4096)
        ):
            raise Stopped


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the kernel lets go of it however this process ends."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"another `hybrid up` is running in {folder}") from None
        yield
