import contextlib
import itertools
import select
import socket
import subprocess
import sys
from functools import partial

import pytest

from hybrid import http
from hybrid.http import MAX_HEAD_BYTES

LARGE = 32 << 20  # bytes, more than sockets have room for


async def app(scope, receive, send):
    """Reads the body, unless the path says not to; then answers."""
    while scope["path"] != "/refused" and (await receive()).get("more_body"):
        pass
    size = LARGE if scope["path"] == "/large" else 0
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    for _ in range(size >> 20):
        await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture(params=["asyncio", "uvloop"])
def connecting(request):
    """Makes connections to a server with nothing behind it, which takes two at once; on the loops that we run on."""
    options = {"loop": request.param, "lifespan": "off", "timeout_keep_alive": 1, "limit_concurrency": 3}
    with (
        http.listening(app, "127.0.0.1", 0, name="test", **options) as port,
        contextlib.ExitStack() as opened,
    ):
        connect = partial(socket.create_connection, ("127.0.0.1", port), timeout=10)
        yield lambda: opened.enter_context(connect())


@pytest.fixture
def connection(connecting):
    """One of those."""
    return connecting()


def answers(connection, pieces):
    """Sends until the server ends the connection or the pieces do; what came back."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
            sent += len(piece)
            assert sent < 8 << 20, "the server takes any amount"
        connection.shutdown(socket.SHUT_WR)
    received = b""
    with contextlib.suppress(ConnectionError):
        while found := connection.recv(1 << 16):
            received += found
    return received


START = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
FILL = b"a" * 1000


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"POST /", FILL),
        (START + b"X: ", FILL),
        (START, b"X: " + FILL + b"\r\n"),
        (CHUNKED + b"0\r\nX: ", FILL),
        (CHUNKED + b"0\r\n", b"X: " + FILL + b"\r\n"),
        (CHUNKED + b"3;x=", FILL),
    ],
    ids=["path", "one header", "headers", "one trailer", "trailers", "chunk extension"],
)
def test_a_head_or_trailer_without_an_end_is_refused_and_the_connection_closed(connection, begin, piece):
    """Without the bound, all of it is kept; the server's own buffers are the difference to 8 MiB."""
    received = answers(connection, itertools.chain([begin], itertools.repeat(piece)))
    assert not received or b"400 Bad Request" in received


def test_requests_one_after_another_and_large_bodies_are_no_heads(connection):
    """Twenty requests of 100 kB in one connection, then one in chunks with a trailer."""
    whole = START + b"Content-Length: 100000\r\n\r\n" + b"b" * 100_000
    chunked = CHUNKED + b"%x\r\n" % (2 * MAX_HEAD_BYTES) + b"b" * (2 * MAX_HEAD_BYTES) + b"\r\n0\r\nX: y\r\n\r\n"
    with connection.makefile("rb") as received:
        for request in [whole] * 20 + [chunked]:
            connection.sendall(request)
            assert received.readline() == b"HTTP/1.1 200 OK\r\n"
            while received.readline() != b"\r\n":
                pass


def ended(connection):
    """Whether the server has ended a connection, of which all that it sends is read."""
    with contextlib.suppress(TimeoutError):
        try:
            while connection.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        return True
    return False


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (START, b""),
        (START, b"X"),
        (b"POST /refused HTTP/1.1\r\nContent-Length: 99\r\n\r\n", b"b"),
    ],
    ids=["nothing", "empty lines", "half a head", "a head that trickles", "a body that nobody reads"],
)
def test_a_connection_on_which_no_request_comes_is_cut(connecting, monkeypatch, begin, piece):
    """Without that, as many as may be connected at once keep everybody else out, without a key, for nothing."""
    monkeypatch.setattr(http, "HEAD_S", 0.3)
    connection = connecting()
    connection.sendall(begin)
    connection.settimeout(0.1)
    for _ in range(60):
        if ended(connection):
            return
        with contextlib.suppress(ConnectionError):
            connection.sendall(piece)
    pytest.fail("the connection is still there after 6 s")


def test_a_body_that_takes_longer_than_a_head_is_the_applications_matter(connection, monkeypatch):
    """Ten pieces over three times as long as a head may take; it is answered."""
    monkeypatch.setattr(http, "HEAD_S", 0.2)
    connection.sendall(START + b"Content-Length: 11\r\n\r\n")
    connection.settimeout(0.06)
    for _ in range(10):
        connection.sendall(b"b")
        assert not ended(connection)
    connection.settimeout(10)
    connection.sendall(b"b")
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")


def test_who_does_not_read_its_answer_is_cut(connection, monkeypatch):
    """Of 32 MiB nothing is read: the connection ends all the same, as who writes to it sees."""
    monkeypatch.setattr(http, "READ_S", 0.3)
    connection.sendall(b"GET /large HTTP/1.1\r\n\r\n")
    errors = select.poll()
    errors.register(connection, 0)
    with contextlib.suppress(ConnectionError):
        for _ in range(60):
            connection.sendall(b"\r\n")  # before a head it means nothing
            errors.poll(100)
        pytest.fail("the connection is still there after 6 s")


HELD = b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"  # and no body: the application waits


def test_who_comes_while_all_are_being_answered_is_told_so(connecting):
    """Two are, of three less one; the third is answered 503."""
    for connection in (connecting(), connecting()):
        connection.sendall(HELD)
        connection.settimeout(0.2)
        assert not ended(connection)
    third = connecting()
    third.sendall(HELD)
    assert third.recv(1 << 16).startswith(b"HTTP/1.1 503 ")


def test_who_says_nothing_gives_way_to_who_asks(connecting):
    """Thirty connections in silence, of three that there may be; each that asks is answered."""
    silent = [connecting() for _ in range(30)]
    for _ in range(3):
        asking = connecting()
        asking.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert asking.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        silent.append(connecting())
    assert ended(silent[0])


def test_a_process_may_open_what_its_connections_need():
    """Given 256 descriptors of the 2,000 that the system allows, it has 1,512 for 1,000 connections, 2,000 for more."""
    code = """if True:
        import resource
        from hybrid.http import allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2000))
        for connections in (100, 1000, 5000):
            allow(connections)
            print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["612", "1512", "2000"]
    assert said.stderr == "5000 connections need 5512 open files, and the system allows 2000\n"
