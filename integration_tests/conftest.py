"""Real servers for integration tests, and the proof that none of them is left."""

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from hybrid.local import kafka as local_kafka
from hybrid.local import triton as local_triton
from hybrid.local import web
from hybrid.local.process import default_cache, free_ports, running
from integration_tests.documents import ROOT, clone, typed


@dataclass(frozen=True)
class TritonServer:
    """Where a Triton answers, as HOST:PORT, and its process."""

    http: str
    grpc: str
    pid: int


@dataclass
class Recorder:
    """Passes connections on to a port, and keeps what the client of each sent, byte for byte."""

    port: int
    sent: list = field(default_factory=list)

    def __enter__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                self.sent.append(bytearray())
                for pair in ((client, server, self.sent[-1]), (server, client, bytearray())):
                    self._threads.append(threading.Thread(target=self._pass, args=pair, daemon=True))
                    self._threads[-1].start()

    @staticmethod
    def _pass(source, target, kept):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def _processes_naming(text: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if text in line:
                found.append(f"{process.pid}: {line}")
    return found


@pytest.fixture(scope="session")
def processes_naming() -> Callable[[str], list[str]]:
    """Gives the command lines in the process table that contain a text."""
    return _processes_naming


@pytest.fixture(scope="session")
def recording() -> type[Recorder]:
    """Gives, of a port, a way to it that keeps what its clients send: see `Recorder`."""
    return Recorder


@pytest.fixture(scope="session", autouse=True)
def nothing_remains(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every server is given a folder below pytest's own; at the end no process names it."""
    yield
    assert _processes_naming(str(tmp_path_factory.getbasetemp())) == []


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where Kafka and Triton are installed, downloaded if need be."""
    folder = default_cache()
    local_kafka.install(folder)
    local_triton.install(folder)
    return folder


@pytest.fixture(scope="session")
def kafka(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of an empty Kafka, the same for the whole session."""
    folder = tmp_path_factory.mktemp("kafka")
    port, controller_port = free_ports(2)
    service = local_kafka.service(cache, folder / "data", port=port, controller_port=controller_port)
    with running(service, folder):
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="session")
def triton(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], TritonServer]]:
    """Starts a Triton over a model repository; it runs until the session's end."""
    with contextlib.ExitStack() as servers:

        def start(repository: Path) -> TritonServer:
            http, grpc, metrics = free_ports(3)
            service = local_triton.service(
                cache,
                repository,
                http_port=http,
                grpc_port=grpc,
                metrics_port=metrics,
                shared_memory=f"hybrid-test-{grpc}-",
            )
            process = servers.enter_context(running(service, tmp_path_factory.mktemp("triton")))
            return TritonServer(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", process.pid)

        yield start


@pytest.fixture(scope="session")
def package(cache: Path) -> Path:
    """The browser device's npm package, built."""
    return web.install(cache)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's own Chromium, for one file: as long as it is there an event loop runs, and no other may."""
    executable = web.chromium()
    if executable is None:
        why = f"none of {', '.join(web.CHROMIUMS)} is on the PATH; on Debian: apt-get install chromium"
        (pytest.fail if os.environ.get("HYBRID_TEST_BROWSER") == "required" else pytest.skip)(why)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox is not for root
        launched = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield launched
        launched.close()


@pytest.fixture
def tab(browser: Browser) -> Callable[..., AbstractContextManager[BrowserContext]]:
    """A browser context with a profile of its own, in which no error of a page stays unseen but an `expected` one."""

    @contextlib.contextmanager
    def opened(*, expected: str | None = None, **options: object) -> Iterator[BrowserContext]:
        errors: list[str] = []
        context = browser.new_context(**options)
        context.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        try:
            yield context
        finally:
            context.close()
        assert [error for error in errors if expected is None or expected not in error] == []

    return opened


@pytest.fixture
def type_commands(tmp_path):
    """(script) -> what typing it in one shell printed, in a folder like a fresh clone's."""
    clone(tmp_path)
    yield lambda script: typed(tmp_path, script)
    subprocess.run([ROOT / ".venv/bin/hybrid", "down"], cwd=tmp_path, check=True, capture_output=True)
