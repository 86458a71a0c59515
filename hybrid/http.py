"""HTTP/1.1 as our services read it: uvicorn over httptools, with bounds on what a connection makes them keep."""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hybrid.errors import BadRequest, BodyTooLarge, ConfigError

if TYPE_CHECKING:
    from starlette.requests import Request

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10  # of a request's line and headers; h11's default too
HEAD_S = 20.0  # for a request's line and headers to come, from the connection, or the answer before them, on
BODY_S = 30.0  # for a body to come
READ_S = 60.0  # in which a peer that is slow to read must take what lies ready for it
LOOKED_AT = 32  # connections, for the one to cut where there is no room
FILES = 512  # descriptors of a process beside its connections
CONNECTION_S = 60.0  # of a `TimedHttp`, from its first to its last byte
BACKLOG = 2048  # connections that wait to be accepted; the system may allow less
DRAIN_S = 5  # for what is on its way when a service ends

Certificate = tuple[Path, Path]  # the chain's and the key's file (PEM)


class BoundedHttp(HttpToolsProtocol):
    """A connection whose peer can make us keep, and wait for, only so much.

    It is answered 400 and closed where a head, or a trailer, grows past `MAX_HEAD_BYTES`: httptools joins the pieces of
    a header, and uvicorn the headers of a request, for as long as they come. A head that came in one read is bounded
    by that read, 256 KiB, at most.

    It is cut where a head is not there within `HEAD_S`, or what is ready is not read within `READ_S`. uvicorn counts
    connections that say nothing among the most that it has (`limit_concurrency`), and would wait for ever: so few
    peers without a key could keep all others out. Where there is no room one that waited long gives way.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept = 0  # bytes since the parser last gave something on
        self._waiting: asyncio.TimerHandle | None = None  # for the peer
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """From the event loop."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._make_room()
        self._wait(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """From the event loop."""
        self._heard()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """From the transport, whose buffer is full."""
        self._unread = self.loop.call_later(READ_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """From the transport."""
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """From the connection."""
        self._kept += len(data)
        super().data_received(data)
        if self._kept > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of a request must have at most {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """From the parser."""
        self._kept = 0
        self._heard()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """From the parser."""
        self._kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """From the parser."""
        self._kept = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """From the application: what comes now is the rest of a body that was not wanted, or the next head."""
        super().on_response_complete()
        if self.transport.is_closing() or self.timeout_keep_alive_task is not None:  # nothing more is being answered
            self._wait(HEAD_S + self.timeout_keep_alive)

    def _make_room(self) -> None:
        """Cuts a connection whose peer has said nothing for longest, of some: who asks does so as it connects."""
        timers = ((each._waiting, each) for each in self.connections if isinstance(each, BoundedHttp))
        silent = ((timer.when(), each) for timer, each in timers if timer is not None)
        _, longest = min(islice(silent, LOOKED_AT), key=itemgetter(0), default=(0.0, None))
        if longest is not None:
            longest._heard()
            longest.transport.abort()
            self.connections.discard(longest)  # uvloop may read a request before it tells that this one is lost

    def _heard(self) -> None:
        """The peer is not waited for any more."""
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = None

    def _wait(self, most_s: float) -> None:
        self._heard()
        self._waiting = self.loop.call_later(most_s, self.transport.abort)


class TimedHttp(BoundedHttp):
    """A `BoundedHttp` that is cut after `CONNECTION_S`, whatever goes on: for peers that ask once and leave.

    A head, a body and an answer that trickle are all bounded by it.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """From the event loop."""
        super().connection_made(transport)
        self._cut = self.loop.call_later(CONNECTION_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """From the event loop."""
        self._cut.cancel()
        super().connection_lost(exc)


async def read_body(request: Request, most: int, *, dropped: int = 0, within_s: float | None = None) -> bytes:
    """A request's body, never more than `most` bytes of it in memory.

    Args:
        request: whose.
        most: bytes of it.
        dropped: bytes of a larger one that are read all the same, so that its sender sees the answer.
        within_s: for it to come; by default `BODY_S`.

    Raises:
        BodyTooLarge: it has more.
        BadRequest: it did not come in time, or its sender went away.
    """
    from starlette.requests import ClientDisconnect

    body, size, limit_s = bytearray(), 0, BODY_S if within_s is None else within_s
    try:
        async with asyncio.timeout(limit_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    body += chunk
                elif size > dropped:
                    break
    except TimeoutError:
        raise BadRequest(f"the body must arrive within {limit_s:g} s") from None
    except ClientDisconnect:
        raise BadRequest("the connection ended before the body did") from None
    if size > most:
        raise BodyTooLarge(f"the body must have at most {most} bytes")
    return bytes(body)


def allow(connections: int) -> None:
    """Lets this process have so many connections, and its files besides, as far as the system does; warns where not.

    Else connections that say nothing could keep it from opening its own files: a ledger, say.
    """
    wanted = connections + FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        log.warning("%d connections need %d open files, and the system allows %d", connections, wanted, hard)
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def listening(
    app: Any, host: str, port: int, *, name: str, certificate: Certificate | None = None, **options: Any
) -> Iterator[int]:
    """Serves an ASGI application from a thread of its own until the block ends, and logs no caller.

    Args:
        app: of ASGI.
        host: where.
        port: 0: a free one.
        name: of the thread.
        certificate: None: without TLS.
        options: of `uvicorn.Config`; without others heads are bounded, see `BoundedHttp`, and the loop is asyncio's.

    Yields:
        The port.

    Raises:
        ConfigError: it cannot be listened on, or the certificate cannot be read.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port {port} of {host} cannot be listened on: {error}") from None
    cert, key = certificate or (None, None)
    usual: dict[str, Any] = {"http": BoundedHttp, "loop": "asyncio"}
    config = uvicorn.Config(
        app,
        ws="none",
        backlog=BACKLOG,
        proxy_headers=False,  # nothing here asks for a caller's address
        server_header=False,
        date_header=False,
        access_log=False,
        log_config=None,
        log_level="warning",  # below it uvicorn names addresses and paths
        timeout_graceful_shutdown=DRAIN_S,
        ssl_certfile=cert,
        ssl_keyfile=key,
        **usual | options,
    )
    try:
        config.load()
    except OSError as error:
        bound.close()
        raise ConfigError(f"the certificate cannot be used: {error}") from None
    allow(config.limit_concurrency or 0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name=name, daemon=True)
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def told_to_end() -> threading.Event:
    """Set at SIGTERM or SIGINT, which from now on do nothing else. Of the main thread."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    return ended


def add_side(parser: argparse.ArgumentParser, side: str, whose: str, port: int) -> None:
    """Where one side of a service listens, as options of its process.

    Args:
        parser: of the process.
        side: before each option's name: "", or "control-".
        whose: who reaches it, for the help.
        port: by default.
    """
    parser.add_argument(f"--{side}host", default="127.0.0.1", help=f"where {whose} reach it (default %(default)s)")
    parser.add_argument(f"--{side}port", type=int, default=port, help="default %(default)s; 0: a free one")
    parser.add_argument(f"--{side}tls-cert", type=Path, default=None, help="certificate chain (PEM)")
    parser.add_argument(f"--{side}tls-key", type=Path, default=None, help="its key (PEM)")


def certificate_of(arguments: argparse.Namespace, parser: argparse.ArgumentParser, side: str) -> Certificate | None:
    """Of a side of `add_side`; None: it is without TLS. Half a certificate ends the process, as `parser.error` does."""
    chain, key = (getattr(arguments, f"{side}tls-{name}".replace("-", "_")) for name in ("cert", "key"))
    if (chain is None) != (key is None):
        parser.error(f"--{side}tls-cert and --{side}tls-key go together")
    return None if chain is None else (chain, key)
