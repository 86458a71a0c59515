"""HTTP/1.1 as our services read it: uvicorn over httptools, with bounds on what a connection makes them keep."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10  # of a request's line and headers; h11's default too
CONNECTION_S = 60.0  # of a `TimedHttp`, from its first to its last byte


class BoundedHttp(HttpToolsProtocol):
    """A connection that is answered 400 and closed where its head, or a trailer, grows past `MAX_HEAD_BYTES`.

    httptools joins the pieces of a header, and uvicorn the headers of a request,
    for as long as they come. A head that came in one read is bounded by that
    read, 256 KiB, at most.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept = 0  # bytes since the parser last gave something on

    def data_received(self, data: bytes) -> None:
        """From the connection."""
        self._kept += len(data)
        super().data_received(data)
        if self._kept > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of a request must have at most {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """From the parser."""
        self._kept = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """From the parser."""
        self._kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """From the parser."""
        self._kept = 0
        super().on_message_complete()


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
