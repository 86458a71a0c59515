import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hybrid.local.page import PageServer


@contextmanager
def serving(folder: Path, gateway: Callable[[], int | None]) -> Iterator[PageServer]:
    for name in ("index.html", "icon.svg"):
        (folder / name).write_text(name)
    with PageServer(0, folder, {}, gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "path", ["%2e%2e%2f%2e%2e%2fhealth%2fready%3f/bundle", "a%2fversions%2f1%2finfer/bundle", "../bundle", "A/bundle"]
)
def test_a_path_that_the_gateway_would_read_as_another_is_not_passed_on(tmp_path: Path, path: str):
    """A model's name has no sign that means a place; the gateway is not asked, or this would end in 502."""
    asked = []
    with serving(tmp_path, lambda: asked.append(1)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", f"/gateway/v2/models/{path}")
        assert connection.getresponse().status == 404
        connection.close()
    assert asked == []


@pytest.mark.parametrize("length", ["", "-1", "+5", "1048577", "9" * 5000])
def test_a_body_that_is_too_long_or_does_not_say_so_is_not_read(
    tmp_path: Path, length: str, capfd: pytest.CaptureFixture[str]
):
    """Also of a length that Python turns into no number; nothing is on the person's terminal."""
    with serving(tmp_path, lambda: None) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.putrequest("POST", "/gateway/v2/models/a/versions/1/infer")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()
    assert capfd.readouterr().err == ""


def test_a_connection_that_breaks_is_not_told_on_the_persons_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """It ends with a reset while it is answered, as a tab's does that is closed."""
    ended, go_on = threading.Event(), threading.Event()

    def gateway() -> None:
        ended.set()
        assert go_on.wait(10)

    with serving(tmp_path, gateway) as server:
        host = f"127.0.0.1:{server.server_port}"
        client = socket.create_connection(("127.0.0.1", server.server_port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(f"GET /gateway/v2/models/a/bundle HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert ended.wait(10)
        client.close()
        go_on.set()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", "/")  # it goes on
        assert connection.getresponse().status == 200
        connection.close()
        for thread in threading.enumerate():
            if "process_request_thread" in thread.name:
                thread.join(10)
    assert capfd.readouterr().err == ""
