import contextlib
import itertools
import socket
import threading

import pytest
import uvicorn

from hybrid.http import MAX_HEAD_BYTES, BoundedHttp


async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def connection():
    """To a server with nothing behind it."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
        config = uvicorn.Config(app, http=BoundedHttp, ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        with socket.create_connection(listening.getsockname(), timeout=10) as connection:
            yield connection
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


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
