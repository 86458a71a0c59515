import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hybrid.cli import promote
from hybrid.errors import ConfigError, StackError
from hybrid.local.process import started
from hybrid.local.supervisor import Server, State
from hybrid.workspace import Workspace
from serving.testing import deployment

DEPLOYMENT = deployment(4)


class Triton(HTTPServer):
    """Answers 400 to the first `loading` requests, then 200; keeps their paths."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Ready)
        self.loading, self.paths = 0, []


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.send_response(400 if len(self.server.paths) <= self.server.loading else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    workspace.stack.mkdir(parents=True)
    return workspace


@pytest.fixture
def triton(workspace: Workspace) -> Iterator[Triton]:
    """The Triton of a stack that is up: its supervisor is this process."""
    with Triton() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        one = Server(name="triton", ports={"triton-http": server.server_port}, log=workspace.stack / "triton.log")
        pid = os.getpid()
        State(phase="ready", supervisor=pid, started=started(pid), servers=(one,)).write(workspace.stack)
        yield server
        server.shutdown()
        thread.join()


def test_serving_is_switched_once_triton_has_both_models(workspace: Workspace, triton: Triton):
    """It is asked for the tower's version until that is ready, then for the head's."""
    triton.loading = 2
    promote.wait_loaded(DEPLOYMENT, workspace)
    tower, head = "/v2/models/shop_server_tower/versions/4/ready", "/v2/models/shop_head/versions/4/ready"
    assert triton.paths == [tower, tower, tower, head]


def test_models_that_triton_does_not_load_are_not_waited_for_forever(
    workspace: Workspace, triton: Triton, monkeypatch: pytest.MonkeyPatch
):
    """The message names the model, the time and the log."""
    triton.loading = 1_000_000
    monkeypatch.setattr(promote, "LOAD_TIMEOUT_S", 0.2)
    with pytest.raises(StackError, match=r"did not load shop_server_tower version 4 within 0\.2 s.*triton\.log"):
        promote.wait_loaded(DEPLOYMENT, workspace)


def test_without_a_stack_nothing_is_waited_for(workspace: Workspace):
    """The first promotion comes before the first `hybrid up`."""
    promote.wait_loaded(DEPLOYMENT, workspace)


def test_a_triton_of_the_environment_is_waited_for_in_place_of_the_local_stack_s(
    workspace: Workspace, triton: Triton, monkeypatch: pytest.MonkeyPatch
):
    """Both models, at the address of `$HYBRID_TRITON`."""
    with Triton() as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        monkeypatch.setenv("HYBRID_TRITON", f"http://127.0.0.1:{other.server_port}")
        promote.wait_loaded(DEPLOYMENT, workspace)
        other.shutdown()
        thread.join()
    assert len(other.paths) == 2
    assert triton.paths == []


def test_every_address_that_a_name_has_is_waited_for(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """In a cluster a headless Service has one for each pod, and each serves its share of the requests."""
    told = [(None, None, None, "", (host, 8000)) for host in ("10.0.0.2", "10.0.0.1", "fd00::1")]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: told)
    monkeypatch.setenv("HYBRID_TRITON", "http://triton-pods:8000")
    asked = [url for url, _ in promote._tritons(workspace)]
    assert asked == ["http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://[fd00::1]:8000"]


@pytest.mark.parametrize("told", ["triton:8000", "https://triton:8000", "http://triton", "http://triton:x"])
def test_what_is_no_address_of_a_triton_is_refused_by_name(
    workspace: Workspace, told: str, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is served that nobody looked for."""
    monkeypatch.setenv("HYBRID_TRITON", told)
    with pytest.raises(ConfigError, match=r"HYBRID_TRITON must be http://HOST:PORT"):
        promote.wait_loaded(DEPLOYMENT, workspace)
