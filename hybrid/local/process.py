"""Starting, watching and stopping one server process, so that nothing of it outlives us."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybrid.errors import StackError

_POLL_S = 0.1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Service:
    """How to run one server, as data.

    Attributes:
        name: what people call it; its log is `<name>.log`.
        command: program and arguments.
        ready: log file -> whether the server can be used now. Asked again and again; must be cheap and not raise.
        ports: use -> TCP port on 127.0.0.1 that it listens on.
        environment: variables added to ours.
        prepare: run before each start.
        cleanup: run after its end, however it ended; safe to run twice.
        start_timeout_s: a server not ready by then has failed.
        stop_timeout_s: how long after SIGTERM it is killed.
    """

    name: str
    command: Sequence[str]
    ready: Callable[[Path], bool]
    ports: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    cleanup: Callable[[], None] = lambda: None
    start_timeout_s: float = 90.0
    stop_timeout_s: float = 10.0


class Process:
    """A service that was started, in a session of its own.

    On Linux the kernel kills it when the process that started it dies, also of
    SIGKILL; other systems have no such call, so there a killed parent leaves it
    running until `hybrid down`.
    """

    def __init__(self, service: Service, logs: Path) -> None:
        """Starts it with its output in `<logs>/<name>.log`, replacing an earlier one.

        Raises:
            StackError: the program cannot be started.
        """
        _adopt_orphans()
        service.prepare()
        logs.mkdir(parents=True, exist_ok=True)
        self.service = service
        self.log = logs / f"{service.name}.log"
        try:
            with self.log.open("wb") as output:
                self._popen = subprocess.Popen(
                    list(service.command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **service.environment},
                    start_new_session=True,
                    preexec_fn=die_with(os.getpid()),  # noqa: PLW1509
                )
        except OSError as error:
            raise StackError(f"{service.name} could not be started: {error}") from None
        self.pid, self.started = self._popen.pid, started(self._popen.pid)
        self._deadline = time.monotonic() + service.start_timeout_s

    def exit_status(self) -> int | None:
        """None while it runs; negative is the signal that ended it."""
        return self._popen.poll()

    def is_ready(self) -> bool:
        """Whether it can be used now.

        Raises:
            StackError: its time to start is over.
        """
        if self.service.ready(self.log):
            return True
        if time.monotonic() > self._deadline:
            raise StackError(
                f"{self.service.name} was not ready within {self.service.start_timeout_s:g} s; {self._log_end()}"
            )
        return False

    def wait_ready(self) -> None:
        """Returns when it can be used.

        Raises:
            StackError: it ended, or its time to start is over.
        """
        while not self.is_ready():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_POLL_S)
                raise StackError(self.obituary())

    def stop(self) -> None:
        """SIGTERM, SIGKILL after `stop_timeout_s`; returns when it and all that it started are gone."""
        if self.exit_status() is None:
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(self.service.stop_timeout_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies is not permitted
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        with contextlib.suppress(ChildProcessError):
            while True:  # what it started is ours now, see `_adopt_orphans`
                os.waitpid(-self.pid, 0)
        self.service.cleanup()

    def obituary(self) -> str:
        """How it ended, with the last lines of its log."""
        status = self.exit_status()
        assert status is not None, f"{self.service.name} runs"
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        return f"{self.service.name} {how}; {self._log_end()}"

    def _log_end(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        if not text:
            return f"its log {self.log} is empty"
        return "\n".join([f"the last lines of {self.log}:", *(f"  {line}" for line in text)])


@contextlib.contextmanager
def running(service: Service, logs: Path) -> Iterator[Process]:
    """The service, ready, for the length of a `with` block.

    Raises:
        StackError: it did not become ready; nothing of it is left.
    """
    process = Process(service, logs)
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


def log_has(line: str) -> Callable[[Path], bool]:
    """A readiness check: some line of the log is `line`, a regular expression for all of it."""
    pattern = re.compile(line)
    return lambda log: any(map(pattern.fullmatch, log.read_text(errors="replace").splitlines()))


def http_ok(url: str, authority: Path | None = None) -> Callable[[Path], bool]:
    """A readiness check: GET `url` is answered with status 200, by this machine itself and through no proxy.

    Args:
        url: http:// or https://.
        authority: a PEM file of who signed the server's certificate.
    """
    import ssl
    from urllib.error import URLError
    from urllib.request import HTTPSHandler, ProxyHandler, build_opener

    context = None if authority is None else ssl.create_default_context(cafile=authority)
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))

    def check(_log: Path) -> bool:
        try:
            with opener.open(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    return check


def default_cache() -> Path:
    """Where downloaded servers are kept: `$HYBRID_CACHE`, or `.cache` in the current folder."""
    return Path(os.environ.get("HYBRID_CACHE", ".cache")).resolve()


def free_ports(count: int) -> list[int]:
    """TCP ports on 127.0.0.1 that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def started(pid: int) -> float:
    """When the process started, in Unix seconds: with its pid, its identity.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    import psutil

    return float(psutil.Process(pid).create_time())


def is_running(pid: int | None, since: float | None) -> bool:
    """Whether the process that had this pid and start time still runs; one that took the pid over does not count."""
    import psutil

    if pid is None or since is None:
        return False
    try:
        process = psutil.Process(pid)
        # The clock that start times are told by may be set by a second or so in between.
        return bool(abs(process.create_time() - since) < 2 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_session(pid: int, since: float, timeout_s: float = 5.0) -> None:
    """SIGKILL to what is left of the session that this process led; returns when it is gone."""
    import psutil

    if psutil.pid_exists(pid) and not is_running(pid, since) and psutil.Process(pid).create_time() - since >= 2:
        return  # the pid, and so the session's name, is somebody else's now
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=timeout_s)


def _adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind, so that it can wait for them. Linux only."""
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> Callable[[], None] | None:
    """What the child runs between fork and exec so that the kernel kills it when `parent` dies. Linux only."""
    if _libc is None:
        return None
    prctl, kill = _libc.prctl, int(signal.SIGKILL)

    def ask_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, kill)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask_kernel
