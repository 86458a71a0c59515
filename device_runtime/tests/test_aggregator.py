import asyncio
import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field

import pytest

from device_runtime.aggregator import MAX_SAID, Aggregator
from device_runtime.caller import MAX_WAIT_S, Reply
from hybrid.errors import ConfigError
from hybrid.plan import CheckIn

ASKED = CheckIn(model="meals", version=7, runtime=1)


@dataclass
class Peer:
    """Answers each connection with given bytes, piece by piece, and keeps what came in over it.

    Attributes:
        pieces: of every answer; a number is a pause of so many seconds.
        requests: what each connection sent, in full.
        ports: the clients' ports.
    """

    pieces: list
    requests: list = field(default_factory=list)
    ports: list = field(default_factory=list)

    def __enter__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, (_, port) = self._listener.accept()
                self.ports.append(port)
                with contextlib.suppress(OSError), client:
                    self.requests.append(self._request(client))
                    for piece in self.pieces:
                        if isinstance(piece, bytes):
                            client.sendall(piece)
                        else:
                            time.sleep(piece)

    @staticmethod
    def _request(client):
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.recv(1 << 16)
        head, _, body = data.partition(b"\r\n\r\n")
        (length,) = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")]
        while len(body) < length:
            body += client.recv(1 << 16)
        return head + b"\r\n\r\n" + body


def answer(body: bytes = b"", status: str = "200 OK", length: int | None = None, more: str = "") -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{more}\r\n".encode() + body


def check_in(url: str, most: int = 1000, **options: float) -> Reply:
    return asyncio.run(Aggregator(url, **options).check_in(ASKED, most))


def upload(url: str) -> Reply:
    return asyncio.run(Aggregator(url).upload("0f" * 16, "1e" * 16, b"update"))


def test_each_request_is_these_bytes_and_no_others():
    """Written out by hand: the whole of what a check-in and an upload say, over two connections."""
    with Peer([answer(b"plan")]) as peer:
        host = peer.url.removeprefix("http://")
        assert check_in(peer.url) == Reply(200, b"plan")
        assert upload(peer.url) == Reply(200, b"plan")
    same = f"Host: {host}\r\nUser-Agent: hybrid-device\r\nAccept: application/octet-stream\r\n"
    same += "Accept-Encoding: identity\r\nConnection: close\r\n"
    said = '{"model":"meals","version":7,"runtime":1}'
    first = f"POST /v1/check-in HTTP/1.1\r\n{same}Content-Type: application/json\r\n"
    assert peer.requests[0] == f"{first}Content-Length: {len(said)}\r\n\r\n{said}".encode()
    second = f"PUT /v1/plans/{'0f' * 16}/updates/{'1e' * 16} HTTP/1.1\r\n{same}"
    second += "Content-Type: application/octet-stream\r\nContent-Length: 6\r\n\r\nupdate"
    assert peer.requests[1] == second.encode()
    assert len(set(peer.ports)) == 2


def test_a_cookie_and_a_tag_are_not_given_back():
    """Whatever a peer would mark a device with, the next request is the one that was sent before."""
    marks = 'Set-Cookie: id=7; Path=/\r\nETag: "7"\r\nAlt-Svc: h2="seven:443"\r\nConnection: keep-alive\r\n'
    with Peer([answer(b"plan", more=marks)]) as peer:
        aggregator = Aggregator(peer.url)
        for _ in range(2):
            assert asyncio.run(aggregator.check_in(ASKED, 1000)).status == 200
    assert peer.requests[0] == peer.requests[1]
    assert len(set(peer.ports)) == 2


def test_the_environment_has_no_say(monkeypatch: pytest.MonkeyPatch):
    """Neither a proxy nor a password file."""
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with Peer([answer(b"plan")]) as peer:
        assert check_in(peer.url).status == 200


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_a_redirection_is_not_followed(status: str):
    """To where an update would be seen by another."""
    with Peer([answer(b"", "200 OK")]) as other, Peer([answer(b"", status, more=f"Location: {other.url}\r\n")]) as peer:
        assert upload(peer.url).status == int(status[:3])
    assert other.requests == []


def test_an_answer_is_read_no_further_than_it_may_be_long():
    """One byte more than is taken; a length of gigabytes; one without end, in chunks; one that would be unpacked."""
    for pieces in (
        [answer(b"x" * 1001)],
        [answer(b"x" * 2000, length=1 << 40)],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"3e8\r\n" + b"x" * 1000 + b"\r\n"] * 1000],
    ):
        with Peer(pieces) as peer:
            assert check_in(peer.url) == Reply(0, error="the aggregator's answer has more than 1000 bytes")
    with Peer([answer(b"x" * 1000)]) as peer:
        assert check_in(peer.url).body == b"x" * 1000
    with Peer([answer(b"x", more="Content-Encoding: gzip\r\n")]) as peer:
        assert "compressed" in check_in(peer.url).error
    with Peer([answer(b"x" * (MAX_SAID + 1))]) as peer:
        assert upload(peer.url).status == 0


def test_an_answer_that_comes_drop_by_drop_ends_with_the_time_that_it_may_take():
    """Each byte comes soon enough for a limit on each read, of the head as of the body: together they take too long."""
    for head in (b"HTTP/1.1 200 OK\r\nX: ", answer(b"", length=10_000)):
        with Peer([head, *[b"x", 0.05] * 40]) as peer:
            began = time.monotonic()
            assert check_in(peer.url, timeout_s=0.5) == Reply(0, error="the aggregator did not answer in time")
            assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"HTTP/1.1 200 OK\r\n"],
        [answer(b"half", length=8)],
        [b"garbage\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nX: " * 9999],
    ],
    ids=["nothing", "half a head", "half a body", "garbage", "a head without end"],
)
def test_a_connection_that_breaks_is_no_answer(pieces: list):
    """Status 0 and a sentence, without what was sent."""
    with Peer(pieces) as peer:
        reply = check_in(peer.url)
    assert (reply.status, reply.body) == (0, b"")
    assert reply.error.startswith("the connection to the aggregator broke")


def test_nobody_there_is_no_answer():
    """A port where nobody listens."""
    with Peer([]) as peer:
        pass
    assert check_in(peer.url) == Reply(0, error="the aggregator cannot be reached")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("86400", MAX_WAIT_S),
        ("86401", MAX_WAIT_S),
        ("9" * 400, MAX_WAIT_S),
        ("-1", None),
        ("1.5", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None),
        ("²", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_up_to_a_day(text: str, seconds: float | None):
    """Of any length; anything else counts as not said."""
    more = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: " + text.encode("latin-1") + b"\r\n\r\n"
    with Peer([more]) as peer:
        assert check_in(peer.url) == Reply(503, retry_after_s=seconds)


@pytest.mark.parametrize(
    "url",
    [
        "http://aggregator.example",
        "http://10.0.0.1:80",
        "http://127.0.0.1.example",
        "ftp://127.0.0.1",
        "aggregator.example",
        "https://",
        "",
        "https://me:secret@aggregator.example",
        "https://aggregator.example/?device=7",
        "https://aggregator.example/#7",
        "http://[::1",
    ],
)
def test_an_address_that_others_on_the_way_could_read_or_that_names_the_device_is_refused(url: str):
    """Nothing is sent to it; the sentence does not repeat a password."""
    with pytest.raises(ConfigError, match="aggregator must be") as refused:
        Aggregator(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["https://aggregator.example", "http://localhost:1", "http://[::1]:1"])
def test_https_and_this_machine_are_taken(url: str):
    """Where nobody else reads it."""
    assert Aggregator(url)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_request_may_take_some_time(seconds: float):
    """More than none."""
    with pytest.raises(ConfigError, match="timeout_s must be > 0"):
        Aggregator("https://aggregator.example", timeout_s=seconds)
