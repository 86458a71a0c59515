"""Fetches a model's bundle from the gateway, no more of it than is not here.

First the file's head by a range request: once its signature is verified and it may be installed, the ranges of those
programs whose SHA-256 no installed bundle has; the zip's directory behind them is made anew. What came so far is kept,
so that a download that broke goes on where it did, as long as the server's entity tag says that it is the same file. A
server without ranges is asked for all of it. Whatever a server says of lengths, no more is read than was asked for, and
of a whole file no more than its head promises. The bytes count for nothing before `hybrid.bundle.read_bundle` verified
them. A tag is shown again only where it is the SHA-256 of the bytes, as the gateway's is: any other could be made for
one device, and tell it apart.

Source: RFC 9110, sections 8.8.3 (ETag), 13.1 (conditions) and 14 (ranges).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from device_runtime import RUNTIME
from device_runtime.access import authorization, refused
from device_runtime.bundles import Installed, none_halted
from hybrid.bundle import MAX_BYTES, Head, head_size, read_head
from hybrid.deployment import Canary
from hybrid.errors import BundleError, ConfigError, PlanError, Unauthenticated
from hybrid.journal import UNTRIED, Phase
from hybrid.rollout import MAX_BYTES as ROLLOUT_BYTES
from hybrid.rollout import ROLLOUT, Rollout

FIRST = 16 << 10  # bytes of the file that are asked for first; the heads of most bundles are within
TOGETHER = 1 << 10  # ranges that lie closer than this are fetched as one
PART, PLAN = "download", "download.json"  # in the folder: bytes so far, and of which file and where they lie
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(?:\d{1,18}|\*)", re.ASCII)
_TAG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')  # a strong one: a weak one says nothing of bytes
Outcome = Literal["installed", "unchanged", "refused", "interrupted"]
_MODEL = re.compile(r"[a-z][a-z0-9_]{0,62}")


@dataclass(frozen=True)
class Update:
    """What became of one attempt.

    Attributes:
        outcome: "refused": what the server has may not be installed; "interrupted": it did not come whole, and what
            came is kept for the next attempt. In both the installed bundle goes on.
        version: that is installed now; None: none is.
        bytes: of answers' bodies that were received.
        reason: why it was refused or interrupted.
        offered: version that was refused, or did not come whole; None: none was, or it was not said which.
        shadow: version that is installed as the shadow; None: none is.
    """

    outcome: Outcome
    version: int | None
    bytes: int
    reason: str | None = None
    offered: int | None = None
    shadow: int | None = None

    @property
    def noted(self) -> tuple[int, Phase, str] | None:
        """What a journal notes of it: version, phase, and why no further; None: no version was heard of."""
        if self.outcome in ("refused", "interrupted"):
            return None if self.offered is None else (self.offered, Phase.CHECKED, self.outcome)
        return None if self.version is None else (self.version, Phase.DOWNLOADED, UNTRIED)


def update(
    installed: Installed,
    gateway: str,
    *,
    now_ms: int,
    halted: Callable[[int], bool] = none_halted,
    shadows: bool = False,
    api_key: str | None = None,
    timeout_s: float = 10.0,
    deadline_s: float = 600.0,
) -> Update:
    """Installs what the gateway has for this model, if that is something else.

    Args:
        installed: where to.
        gateway: base URL.
        now_ms: Unix time in UTC.
        halted: whether a version was, by the kill switch.
        shadows: whether this device may be asked to compute a shadow, for which it releases a second time; without it
            none is left here. Whether one could be had changes nothing of the rest.
        api_key: see `device_runtime.client.InferenceClient`.
        timeout_s: for each wait on the network, > 0.
        deadline_s: for all of it, > 0.

    Raises:
        ConfigError: the folder, the gateway or a setting is wrong, or another process is at it.
        Unauthenticated: the gateway does not take the API key, or wants one.
    """
    if not _MODEL.fullmatch(installed.model):
        raise ConfigError(f"model must be a name such as 'coupon', got {installed.model!r}")
    if not (timeout_s > 0 and deadline_s > 0):
        raise ConfigError(f"timeout_s and deadline_s must be > 0, got {timeout_s} and {deadline_s}")
    with (
        installed.alone(),
        _Source.of(gateway, installed.model, api_key, timeout_s=timeout_s, deadline_s=deadline_s) as source,
    ):
        if not shadows:
            _leave(installed.shadow)
        before = installed.record().current
        outcome, why, offered = _attempt(_Download(installed, source, now_ms, halted))
        shadow = _shade(_Download(installed.shadow, source, now_ms, halted)) if shadows else None
        after = installed.record().current
        if outcome == "installed" and before and after and before.sha256 == after.sha256:
            outcome = "unchanged"  # the server calls the same bytes something else
        elif outcome == "unchanged" and before != after:
            outcome = "installed"  # the one before, of a version that was taken back
        return Update(outcome, after.version if after else None, source.received, why, offered, shadow)


def _wanted(installed: Installed, told: Rollout | None) -> int | None:
    """The version to fetch; None: the default. What the control plane took back is left first."""
    if told is None:
        return None
    if halts := told.halts(installed.trusted):
        installed.halt_alone(halts)
    return _drawn(installed, told.canary)


def _drawn(installed: Installed, tried: Canary | None) -> int | None:
    """The version of a canary, or a shadow, where this device is to have it."""
    if tried is None or tried.version in installed.record().halted:
        return None
    return tried.version if installed.drawn_alone(tried.version) < tried.share else None


def _leave(shadow: Installed) -> None:
    """Empties the folder, also where nothing can be written."""
    if shadow.folder.exists():
        with shadow.alone(), suppress(BundleError):
            _discard(shadow.folder)
            shadow.empty_alone()


def _shade(download: _Download) -> int | None:
    """Installs the shadow that the gateway told of, or leaves it; returns which is there then.

    Whatever is with it, the default goes on.
    """
    shadow, source = download.installed, download.source
    with shadow.alone(), suppress(BundleError, _Interrupted):
        if source.told is not None:  # else nobody says that it is another than before
            shadow.halt_alone(source.told.halts(shadow.trusted))
            source.version = _drawn(shadow, source.told.shadow)
            current = shadow.record().current
            if current is not None and current.version != source.version:
                shadow.empty_alone()
            if source.version is None:
                _discard(shadow.folder)
            else:
                _install(download)
    after = shadow.record().current
    return after.version if after else None


def _attempt(download: _Download) -> tuple[Outcome, str | None, int | None]:
    """What became of it, why, and which version it is about, where it failed."""
    installed, source = download.installed, download.source
    offered = None
    try:
        told = source.rollout()
        source.version = _wanted(installed, told)
        offered = told.default if told is not None and source.version is None else source.version
        return _install(download), None, None
    except BundleError as error:
        return "refused", str(error), offered
    except _Interrupted as error:
        return "interrupted", str(error), offered


def _install(download: _Download) -> Literal["installed", "unchanged"]:
    """Fetches what the source has, and makes it current."""
    installed, fetched = download.installed, download.fetch()
    if fetched is None:
        return "unchanged"
    try:
        data, tag = fetched
        # A tag of another kind could be this device's own, and tell it apart at each update from now on.
        own = tag if tag == f'"{hashlib.sha256(data).hexdigest()}"' else None
        installed.install_alone(data, now_ms=download.now_ms, halted=download.halted, tag=own)
    finally:
        _discard(installed.folder)
    return "installed"


class _Interrupted(Exception):
    """The file did not come, or not whole; the text says why."""


class _Changed(Exception):
    """The server has another file than the one whose parts are here."""


@dataclass
class _Source:
    """The bundle at a gateway: bytes, counted and bounded."""

    http: httpx.Client
    gateway: str
    model: str
    shown: bool
    deadline_s: float  # by the monotonic clock
    version: int | None = None  # None: the default
    received: int = 0
    told: Rollout | None = None  # once the gateway said it

    @classmethod
    @contextmanager
    def of(
        cls, gateway: str, model: str, api_key: str | None, timeout_s: float, deadline_s: float
    ) -> Iterator[_Source]:
        if not gateway.startswith(("http://", "https://")):
            raise ConfigError(f"gateway must be an http:// or https:// URL, got {gateway!r}")
        shown = authorization(api_key, gateway)
        # As the inference client: no proxy from the environment, and no other host that an answer names.
        with httpx.Client(
            headers=shown | {"Accept-Encoding": "identity"},
            timeout=timeout_s,
            trust_env=False,
            follow_redirects=False,
        ) as http:
            # A server that sends a byte now and again keeps to every timeout: in the end its connection is closed.
            deadline = time.monotonic() + deadline_s
            end = threading.Timer(deadline_s, http.close)
            end.daemon = True
            end.start()
            try:
                yield cls(http, gateway.rstrip("/"), model, bool(shown), deadline)
            finally:
                end.cancel()

    def rollout(self) -> Rollout | None:
        """What devices of the model are to fetch; None: the gateway is older than rollouts.

        Raises:
            BundleError: it says something else.
            _Interrupted: it does not answer.
        """
        with self.get(ROLLOUT.format(model=self.model), {}, statuses=(200, 404)) as response:
            if response.status_code == 404:
                return None
            data = b"".join(self.read(response, ROLLOUT_BYTES))
        try:
            self.told = Rollout.read(data, self.model)
        except PlanError as error:
            raise BundleError(str(error)) from None
        return self.told

    def bundle(self, headers: dict[str, str]) -> AbstractContextManager[httpx.Response]:
        """The answer to a request for the bundle, of which nothing was read but its head."""
        version = "" if self.version is None else f"/versions/{self.version}"
        path = f"/v2/models/{self.model}{version}/bundle"
        return self.get(path, headers, statuses=(200, 206, 304, 412, 416))

    @contextmanager
    def get(self, path: str, headers: dict[str, str], *, statuses: tuple[int, ...]) -> Iterator[httpx.Response]:
        """One answer, of which nothing was read but its head; with a status that means something here."""
        try:
            with self.http.stream("GET", self.gateway + path, headers=headers) as response:
                if response.status_code == Unauthenticated.status:
                    raise refused(self.shown)
                if response.status_code not in statuses:
                    raise _Interrupted(f"the gateway answered {response.status_code}")
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise BundleError("the gateway sends the bundle encoded, though it was asked not to")
                yield response
        except (httpx.HTTPError, RuntimeError) as error:  # a client that was closed raises the latter
            if time.monotonic() > self.deadline_s:
                raise _Interrupted("the download took too long") from None
            if isinstance(error, RuntimeError):
                raise
            raise _Interrupted(f"the connection to the gateway broke ({type(error).__name__})") from None

    def read(self, response: httpx.Response, most: int) -> Iterator[bytes]:
        """The body as it comes.

        Raises:
            BundleError: it has more than `most` bytes.
        """
        for chunk in response.iter_raw():
            self.received += len(chunk)
            most -= len(chunk)
            if most < 0:
                raise BundleError("the gateway sends more than was asked for")
            if time.monotonic() > self.deadline_s:
                raise _Interrupted("the download took too long")
            yield chunk

    def span(self, span: range, tag: str) -> Iterator[bytes]:
        """The bytes of the file that has this tag in `span`, or its first ones: a server may send fewer at once.

        Raises:
            _Changed: the server has another file.
        """
        headers = {"Range": f"bytes={span.start}-{span.stop - 1}", "If-Range": tag}
        with self.bundle(headers) as response:
            if response.status_code != 206 or response.headers.get("ETag") != tag:
                raise _Changed
            yield from self.read(response, len(_content_range(response, span)))


def _content_range(response: httpx.Response, asked: range) -> range:
    """Which bytes a 206 has; those that were asked for, or the first of them."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    given = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    if not given or given.start != asked.start or given.stop > asked.stop:
        raise BundleError("the gateway sends another range than was asked for")
    return given


@dataclass
class _Part:
    """What is here of a file that is being downloaded: `spans` of it, one after another, the last ones not yet.

    Attributes:
        folder: of the two files.
        tag: of the file at the server.
        spans: ascending; the first begins at 0 and holds the head.
    """

    folder: Path
    tag: str
    spans: list[range]
    here: int = field(default=0)

    @classmethod
    def begin(cls, folder: Path, tag: str, first: bytes, rest: list[range]) -> _Part:
        """A new one, in place of any other."""
        _discard(folder)
        part = cls(folder, tag, [range(len(first)), *rest])
        (folder / PLAN).write_text(json.dumps({"tag": tag, "spans": [[s.start, s.stop] for s in part.spans]}))
        part.append(first)
        return part

    @classmethod
    def left(cls, folder: Path) -> _Part | None:
        """What an attempt before this one left; None: nothing that can be used."""
        try:
            plan: dict[str, Any] = json.loads((folder / PLAN).read_bytes())
            part = cls(folder, str(plan["tag"]), [range(int(a), int(b)) for a, b in plan["spans"]])
            part.here = (folder / PART).stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not _TAG.fullmatch(part.tag):  # no server is asked with what a damaged file holds
            return None
        fits = all(len(span) > 0 for span in part.spans) and sum(map(len, part.spans)) <= MAX_BYTES
        usable = fits and part.spans and len(part.spans[0]) <= part.here <= sum(map(len, part.spans))
        return part if usable and part.spans[0].start == 0 else None

    def append(self, data: bytes) -> None:
        with (self.folder / PART).open("ab") as handle:
            handle.write(data)
        self.here += len(data)

    def missing(self) -> range | None:
        """The next bytes to fetch; None: all are here."""
        here = self.here
        for span in self.spans:
            if here < len(span):
                return span[here:]
            here -= len(span)
        return None

    def bytes_at(self, wanted: range) -> bytes | None:
        """Bytes of the file; None where the spans have not all of them."""
        data, place = b"", 0
        with (self.folder / PART).open("rb") as handle:
            for span in self.spans:
                at = wanted.start + len(data)
                if span.start <= at < span.stop:
                    handle.seek(place + at - span.start)
                    data += handle.read(min(wanted.stop, span.stop) - at)
                place += len(span)
        return data if len(data) == len(wanted) else None


def _discard(folder: Path) -> None:
    for name in (PLAN, PART):
        (folder / name).unlink(missing_ok=True)


@dataclass
class _Download:
    """One attempt to have the file that the server has."""

    installed: Installed
    source: _Source
    now_ms: int
    halted: Callable[[int], bool]

    def fetch(self) -> tuple[bytes, str | None] | None:
        """The file and its tag; None where what is installed is it."""
        folder = self.installed.folder
        try:
            for _ in range(3):  # it may be promoted again while it is fetched
                try:
                    part = _Part.left(folder)
                    # One that was installed before it could be removed says nothing of what the server has now.
                    return self._rest(part) if part and part.tag != self.installed.tag() else self._anew()
                except _Changed:
                    _discard(folder)
        except BundleError:
            _discard(folder)
            raise
        except OSError as error:
            _discard(folder)
            raise BundleError(f"the download cannot be kept: {error.strerror}") from None
        raise _Interrupted("the gateway's bundle changed while it was fetched, again and again")

    def _anew(self) -> tuple[bytes, str | None] | None:
        headers = {"Range": f"bytes=0-{FIRST - 1}"}
        if known := self.installed.tag():
            headers["If-None-Match"] = known
        with self.source.bundle(headers) as response:
            tag = response.headers.get("ETag", "")
            tag = tag if _TAG.fullmatch(tag) else ""
            if response.status_code == 304:
                return None
            if response.status_code == 200:
                return self._whole(response), tag or None
            if response.status_code != 206 or not tag:
                raise _Interrupted(f"the gateway answered {response.status_code} without what makes sense of it")
            first = b"".join(self.source.read(response, len(_content_range(response, range(FIRST)))))
        while len(first) < (needed := head_size(first)):
            before = len(first)
            first += b"".join(self.source.span(range(len(first), needed), tag))
            if len(first) == before:
                raise _Interrupted("the gateway sent nothing")
        head = self._head(first)
        part = _Part.begin(self.installed.folder, tag, first, self._spans(head, len(first)))
        return self._rest(part)

    def _whole(self, response: httpx.Response) -> bytes:
        """Of a server without ranges: all of it, or the part that shows that it may not be installed."""
        data, limit = bytearray(), MAX_BYTES
        checked = False
        for chunk in self.source.read(response, MAX_BYTES):
            data += chunk
            if not checked and len(data) >= FIRST and len(data) >= head_size(bytes(data[:FIRST])):
                limit, checked = self._head(bytes(data)).size, True
            if len(data) > limit:
                raise BundleError("the gateway sends more than the bundle's head promises")
        return bytes(data)

    def _rest(self, part: _Part) -> tuple[bytes, str | None]:
        """Fetches what is missing, and puts the file together."""
        head = self._head(part.bytes_at(part.spans[0]) or b"")
        while (span := part.missing()) is not None:
            before = part.here
            for chunk in self.source.span(span, part.tag):
                part.append(chunk)
            if part.here == before:
                raise _Interrupted("the gateway sent nothing")
        here = self.installed.programs()
        programs: dict[str, bytes] = {}
        for name, span in head.ranges().items():
            data = part.bytes_at(span)
            data = here.get(head.manifest.programs[name].sha256) if data is None else data
            if data is None:  # what was here when the spans were chosen is no more
                raise _Changed
            programs[name] = data
        return head.join(programs), part.tag

    def _head(self, data: bytes) -> Head:
        """Verified, and of a bundle that may be installed as far as can be told by now."""
        head = read_head(data, self.installed.trusted, runtime=RUNTIME)
        if head.size > MAX_BYTES:
            raise BundleError(f"a bundle has at most {MAX_BYTES} bytes, this one {head.size}")
        self.installed.check(head.manifest, now_ms=self.now_ms, halted=self.halted)
        return head

    def _spans(self, head: Head, first: int) -> list[range]:
        """Where the programs lie that are not here, without what came first; close ones as one."""
        here = self.installed.programs()
        spans: list[range] = []
        for name, span in head.ranges().items():
            wanted = range(max(span.start, first), span.stop)
            if not wanted or head.manifest.programs[name].sha256 in here:
                continue
            if spans and wanted.start - spans[-1].stop < TOGETHER:
                spans[-1] = range(spans[-1].start, wanted.stop)
            else:
                spans.append(wanted)
        return spans
