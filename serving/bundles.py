"""Device bundles over HTTP: known by the hash of their bytes, and resumed where a download was cut.

A bundle has no modification date here: the same version, promoted again or from
another gateway's folder, is the same bytes at another time. So dates never
match, and its entity tag always says the truth.

Source: RFC 9110, sections 8.8.3 (ETag), 13 (conditional requests) and 14 (ranges).
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
import re
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hybrid.deployment import Deployment
from hybrid.errors import ConfigError, NoBundle, Unavailable

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/octet-stream"
MAX_AGE_S = 86_400  # that a version's bundle is used unasked
CHUNK_BYTES = 256 << 10
_TAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')
_RANGE = re.compile(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Opened:
    """One file as it was when it was opened: what replaces it meanwhile changes neither its bytes nor its tag.

    Attributes:
        file: at any place; whoever has it closes it.
        size: in bytes.
        tag: strong entity tag, the SHA-256 of its bytes in quotes.
    """

    file: io.BufferedReader
    size: int
    tag: str


@dataclass(frozen=True)
class Bundles:
    """The bundles that `hybrid promote` wrote, of those versions that are served.

    Attributes:
        folder: holds `<model>-<version>.bundle`, each replaced in one step.
        private: whether clients must show who they are, so that no cache may serve what one of them got to another.

    Raises:
        ConfigError: there is no such folder.
    """

    folder: Path
    private: bool = False
    _tags: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict, repr=False)
    _hashing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ConfigError(f"the bundles' folder must be one that is there, got {str(self.folder)!r}")

    def open(self, deployment: Deployment) -> Opened:
        """The bundle of a served version; its bytes are hashed when it is first asked for, and when it has changed.

        Raises:
            NoBundle: it is not in the folder.
            Unavailable: it cannot be read.
        """
        name = f"{deployment.model}-{deployment.version}.bundle"
        if os.path.basename(name) != name:  # whoever writes deployments could otherwise have any file served
            raise NoBundle("the model's name is no file's name")
        try:
            file = open(self.folder / name, "rb")  # noqa: SIM115  it is closed where it was sent
        except FileNotFoundError:
            raise NoBundle(f"version {deployment.version} is served, but this gateway has no bundle of it") from None
        except OSError as error:
            log.error("bundle %s cannot be opened: %s", name, error.strerror)
            raise Unavailable("the bundle cannot be read now") from None
        try:
            stat = os.fstat(file.fileno())
            stamp = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
            return Opened(file, stat.st_size, self._tag(name, stamp, file))
        except BaseException:
            file.close()
            raise

    def _tag(self, name: str, stamp: tuple[int, ...], file: io.BufferedReader) -> str:
        with self._hashing:  # of many that ask for a new one, the first computes it
            known, tag = self._tags.get(name, ((), ""))
            if known != stamp:
                tag = f'"{hashlib.file_digest(file, "sha256").hexdigest()}"'
                self._tags[name] = stamp, tag
            return tag

    async def answer(self, request: Request, deployment: Deployment, *, versioned: bool) -> Response:
        """What a GET or HEAD of a bundle gets.

        Several ranges at once, and those that are none, are answered with all of it, as RFC 9110, section 14.2, allows.

        Args:
            request: with its conditions.
            deployment: whose bundle.
            versioned: whether the path names the version; that of the default is another after the next promotion.

        Raises:
            NoBundle, Unavailable: see `open`.
        """
        opened = await asyncio.to_thread(self.open, deployment)
        headers = {
            "ETag": opened.tag,
            "Accept-Ranges": "bytes",
            "Cache-Control": self._cache_control(versioned=versioned),
            "Content-Location": f"/v2/models/{deployment.model}/versions/{deployment.version}/bundle",
        }
        response = _conditional(request, opened, headers)
        if not isinstance(response, _Part):
            opened.file.close()
        return response

    def _cache_control(self, *, versioned: bool) -> str:
        who = "private" if self.private else "public"
        return f"{who}, max-age={MAX_AGE_S}, immutable" if versioned else f"{who}, no-cache"


class _Part(StreamingResponse):
    """Bytes `start` to `end` of an open file, which is closed in the end, however that comes."""

    def __init__(self, file: io.BufferedReader, start: int, end: int, status: int, headers: dict[str, str]) -> None:
        headers = headers | {"Content-Length": str(end - start)}
        super().__init__(self._chunks(start, end), status, headers, MEDIA_TYPE)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)

    async def _chunks(self, start: int, end: int) -> AsyncIterator[bytes]:
        while start < end:
            chunk = await asyncio.to_thread(os.pread, self._file.fileno(), min(CHUNK_BYTES, end - start), start)
            if not chunk:  # somebody wrote into the file in place of replacing it
                raise Unavailable("the bundle became shorter while it was sent")
            start += len(chunk)
            yield chunk


def _conditional(request: Request, opened: Opened, headers: dict[str, str]) -> Response:
    """The conditions in their order (RFC 9110, section 13.2.2), then what is left of the file to send."""
    asked = request.headers
    if "if-match" in asked and not _matches(asked, "if-match", opened.tag, weak=False):
        return _refusal(412, "precondition_failed", "the bundle is another than If-Match names", headers)
    if "if-none-match" in asked and _matches(asked, "if-none-match", opened.tag, weak=True):
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":  # a range is of a GET alone, section 14.2
        return Response(headers=headers | {"Content-Length": str(opened.size)}, media_type=MEDIA_TYPE)
    whole = "if-range" in asked and asked["if-range"].strip() != opened.tag
    found = None if whole else _range(asked.getlist("range"), opened.size)
    if found is None:
        return _Part(opened.file, 0, opened.size, 200, headers)
    start, end = found
    if start >= end:
        headers = headers | {"Content-Range": f"bytes */{opened.size}"}
        message = f"the bundle has {opened.size} bytes, and none of the range that was asked for"
        return _refusal(416, "range_not_satisfiable", message, headers)
    return _Part(opened.file, start, end, 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{opened.size}"})


def _matches(asked: Headers, name: str, tag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags names this one, which is strong; a weak one there counts where `weak`."""
    listed = ",".join(asked.getlist(name))
    return listed.strip() == "*" or any(found[2] == tag and (weak or not found[1]) for found in _TAG.finditer(listed))


def _range(asked: list[str], size: int) -> tuple[int, int] | None:
    """(start, end) within a file of `size` bytes, start >= end where nothing of it was asked for; None: all of it."""
    found = _RANGE.fullmatch(asked[0]) if len(asked) == 1 else None
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None  # not a range at all, section 14.1.1
    return int(first), min(size, int(last) + 1) if last else size


def _refusal(status: int, code: str, message: str, headers: dict[str, str]) -> Response:
    headers = {name: value for name, value in headers.items() if name not in {"Cache-Control", "Content-Location"}}
    return Response(orjson.dumps({"error": message, "code": code}), status, headers, media_type="application/json")
