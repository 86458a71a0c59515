"""Serves the browser device's page on loopback, with a way to the local stack's gateway on the same origin.

So the page needs no other origin, and is allowed none. What a page of another site, or one that gave
its name this machine's address, asks for is refused.
"""

from __future__ import annotations

import http.client
import json
import re
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hybrid.errors import StackError

GATEWAY = "/gateway"
MAX_BODY = 1 << 20  # as the gateway takes
TIMEOUT_S = 30.0
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
# What the page's client asks the gateway for, and nothing else of it.
_PASSED = {
    "GET": re.compile(r"/v2/(?:health/ready|models/[a-z0-9_]+/(?:rollout|(?:versions/\d+/)?bundle))", re.ASCII),
    "POST": re.compile(r"/v2/models/[a-z0-9_]+/versions/\d+/infer", re.ASCII),
}
_LENGTH = re.compile(r"\d{1,9}", re.ASCII)
_ASKED = ("Content-Type", "Inference-Header-Content-Length", "If-None-Match", "Range", "If-Range", "Authorization")
_ANSWERED = ("Content-Type", "ETag", "Content-Range", "Retry-After", "WWW-Authenticate")
_OFF = (
    "camera",
    "display-capture",
    "geolocation",
    "microphone",
    "midi",
    "payment",
    "serial",
    "usb",
    "hid",
)
HEADERS = {
    # 'wasm-unsafe-eval' is what compiling WebAssembly needs, and allows nothing else.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": ", ".join(f"{feature}=()" for feature in _OFF) + ", compute-pressure=(self)",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class PageServer(ThreadingHTTPServer):
    """The page, its settings and the way to the gateway, on 127.0.0.1.

    Args:
        port: to listen on; 0: any.
        dist: the built page.
        config: what `/config.json` says.
        gateway: asked at each request for the gateway's port on this machine; None: it is not up.

    Raises:
        StackError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, dist: Path, config: Mapping[str, Any], gateway: Callable[[], int | None]) -> None:
        self.files = {f"/{file.name}": (_TYPES[file.suffix], file.read_bytes()) for file in sorted(dist.iterdir())}
        self.files["/"] = self.files["/index.html"]
        self.files["/favicon.ico"] = self.files["/icon.svg"]  # asked for beside documents that name none
        self.files["/config.json"] = ("application/json", json.dumps(config).encode())
        self.gateway = gateway
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise StackError(
                f"port {port} cannot be used ({error.strerror}): choose another with --port, or any free one with "
                "--port 0"
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A tab that is closed meanwhile is no error: the terminal is for the person."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def hosts(self) -> frozenset[str]:
        """What a browser on this machine calls it. Any other name was made to point here by somebody else."""
        return frozenset(f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost"))


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hybrid", ""
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        if not self._own():
            return
        path = self.path.partition("?")[0]
        if path.startswith(f"{GATEWAY}/"):
            self._pass(b"")
        elif path in self.server.files:
            kind, data = self.server.files[path]
            self._send(200, {"Content-Type": kind}, data)
        else:
            self._refuse(404, "unknown_path", "the page has nothing of that name")

    def do_POST(self) -> None:
        if not self._own():
            return
        length = self.headers.get("Content-Length", "")
        if not _LENGTH.fullmatch(length) or int(length) > MAX_BODY:
            self.close_connection = True  # what would follow is not read
            self._refuse(413, "body_too_large", f"a request must have at most {MAX_BODY} bytes, and say how many")
            return
        self._pass(self.rfile.read(int(length)))

    def _own(self) -> bool:
        """Whether it is this page, or a person at this machine, that asks."""
        origin = self.headers.get("Origin")
        own = self.headers.get("Host") in self.server.hosts
        own &= origin is None or origin.removeprefix("http://") in self.server.hosts
        own &= self.headers.get("Sec-Fetch-Site") in (None, "same-origin", "none")
        if not own:
            self.close_connection = True
            self._refuse(403, "forbidden", "only the page itself may ask here")
        return own

    def _pass(self, body: bytes) -> None:
        """Asks the gateway the same, and answers what it answers."""
        path = self.path.removeprefix(GATEWAY)
        if not _PASSED[self.command].fullmatch(path):
            self._refuse(404, "unknown_path", "the page asks the gateway for bundles and predictions only")
            return
        port = self.server.gateway()
        if port is None:
            self._refuse(502, "unreachable", "the gateway is not up: run `hybrid up`, or this command again")
            return
        asked = {name: value for name in _ASKED if (value := self.headers.get(name)) is not None}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        try:
            connection.request(self.command, path, body or None, asked)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._refuse(502, "unreachable", f"the gateway cannot be reached ({type(error).__name__})")
            return
        finally:
            connection.close()
        answered = {name: value for name in _ANSWERED if (value := answer.getheader(name)) is not None}
        self._send(answer.status, answered, data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = json.dumps({"error": message, "code": code}).encode()
        self._send(status, {"Content-Type": "application/json"}, text)

    def _send(self, status: int, headers: Mapping[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status != HTTPStatus.NOT_MODIFIED:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing: a path names a model, and the terminal is for the person."""
