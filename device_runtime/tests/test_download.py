import base64
import hashlib
import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_runtime import RUNTIME, download
from device_runtime.bundles import Installed
from device_runtime.download import FIRST, Update, update
from hybrid.bundle import MAX_BYTES, Bundle, read_head, write_bundle
from hybrid.errors import BundleError, ConfigError, Unauthenticated
from hybrid.plan import Halt
from hybrid.plan import sign as sign_message

NOW = 1_000_000
Sign = Callable[..., bytes]
LARGE = 400_000  # bytes of a program that no inference runs, so that there is something to fetch


@dataclass
class Peer:
    """A server of one file, which keeps to RFC 9110 but for what a test tells it.

    Attributes:
        file: that it has now.
        ranges: whether it knows of them.
        cut: bodies end after so many bytes, and the connection with them; -1: never.
        extra: bytes sent behind each body, and counted in its length.
        length: whether it says how long a body is.
        status: answers everything with it, where it is set.
        headers: added to each answer.
        asked: the requests' headers.
        key: bearer that it wants; None: none.
        chosen: called when what a request is answered was chosen, and is not sent yet.
        after: called when a request was answered; the next one may have come by then.
        own_tag: in place of the file's SHA-256.
        rollout: what it tells all devices of one; None: it is older than rollouts.
        files: of versions that are asked for by their number.
    """

    file: bytes = b""
    ranges: bool = True
    cut: int = -1
    extra: bytes = b""
    length: bool = True
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, str]] = field(default_factory=list)
    key: str | None = None
    chosen: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    url: str = ""
    own_tag: str = ""
    rollout: bytes | None = None
    files: dict[int, bytes] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return self.own_tag or f'"{hashlib.sha256(self.file).hexdigest()}"'

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = dict(handler.headers)
        if handler.path == "/v2/models/meals/rollout":
            self._send(handler, *self._told(asked))
            return
        if named := re.fullmatch(r"/v2/models/meals/versions/(\d+)/bundle", handler.path):
            self.file = self.files[int(named[1])]
        else:
            assert handler.path == "/v2/models/meals/bundle"
            self.file = self.files.get(0, self.file)
        self.asked.append(asked)
        status, body, headers = self._answer(asked)
        self.chosen()
        self._send(handler, status, body + self.extra, headers | self.headers)
        self.after()

    def _send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        headers |= {"Connection": "close"}
        handler.send_response(status)
        if self.length:
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        with suppress(ConnectionError):  # the device may have had enough
            handler.wfile.write(body if self.cut < 0 else body[: self.cut])

    def _told(self, asked: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        return (404, b"", {}) if self.rollout is None else self._refused(asked) or (200, self.rollout, {})

    def _refused(self, asked: dict[str, str]) -> tuple[int, bytes, dict[str, str]] | None:
        if self.key and asked.get("Authorization") != f"Bearer {self.key}":
            return 401, b"", {}
        return (self.status, b"", {}) if self.status else None

    def _answer(self, asked: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        if refused := self._refused(asked):
            return refused
        if asked.get("If-None-Match") == self.tag:
            return 304, b"", {"ETag": self.tag}
        if not self.ranges or "Range" not in asked or asked.get("If-Range", self.tag) != self.tag:
            return 200, self.file, {"ETag": self.tag}
        first, last = map(int, asked["Range"].removeprefix("bytes=").split("-"))
        last = min(last, len(self.file) - 1)
        said = {"ETag": self.tag, "Content-Range": f"bytes {first}-{last}/{len(self.file)}"}
        return 206, self.file[first : last + 1], said


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            peer.answer(self)

        def log_message(self, *_: object) -> None:
            """The tests look at what was asked."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        peer.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield peer
        server.shutdown()
        thread.join()


@pytest.fixture
def sign(bundle: Bundle, key: Ed25519PrivateKey, tmp_path: Path) -> Sign:
    """(version, extra programs, and manifest's fields) -> a bundle's file, made at `version` ms."""

    def signed(version: int, extra: dict[str, bytes] | None = None, **fields: object) -> bytes:
        manifest = bundle.manifest.model_copy(update={"version": version, "created_ms": version} | fields)
        write_bundle(tmp_path / "signed.bundle", manifest, bundle.programs | (extra or {}), key)
        return (tmp_path / "signed.bundle").read_bytes()

    return signed


@pytest.fixture
def installed(tmp_path: Path, key: Ed25519PrivateKey) -> Installed:
    return Installed(tmp_path / "device", "meals", key.public_key(), engine="onnx")


def noise(seed: int) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(LARGE)


def end(file: bytes) -> int:
    """Where the last program ends: the zip's directory behind it follows from the head, and is not fetched."""
    return file.rindex(b"PK\x05\x06") - sum(46 + len(name) for name in zipfile.ZipFile(io.BytesIO(file)).namelist())


def current(installed: Installed) -> bytes:
    return (installed.folder / f"{installed.record().current.sha256}.bundle").read_bytes()


def test_what_the_gateway_has_is_installed_once(peer: Peer, installed: Installed, sign: Sign):
    """Each byte comes once; afterwards the server is told what is here, and sends nothing."""
    peer.file = sign(3)
    assert update(installed, peer.url, now_ms=NOW) == Update("installed", 3, end(peer.file))
    assert current(installed) == peer.file
    assert update(installed, peer.url, now_ms=NOW) == Update("unchanged", 3, 0)
    assert peer.asked[-1]["If-None-Match"] == peer.tag
    assert sorted(file.suffix for file in installed.folder.iterdir()) == [".bundle", ".json"]


def test_only_programs_that_are_not_here_are_fetched(peer: Peer, installed: Installed, sign: Sign):
    """Version 4 has one new program of 400 kB beside the large one of version 3: that and the head come, 16 kB more."""
    peer.file = sign(3, {"old.bin": noise(1)})
    update(installed, peer.url, now_ms=NOW)
    peer.file = sign(4, {"new.bin": noise(2), "old.bin": noise(1)})
    moved = update(installed, peer.url, now_ms=NOW)
    assert (moved.outcome, moved.version) == ("installed", 4)
    assert LARGE < moved.bytes <= LARGE + FIRST
    assert current(installed) == peer.file
    peer.file = sign(5, {"new.bin": noise(2), "old.bin": noise(1)})  # nothing but the manifest is new
    assert update(installed, peer.url, now_ms=NOW) == Update("installed", 5, FIRST)
    assert current(installed) == peer.file


def test_a_download_that_broke_goes_on_where_it_did(peer: Peer, installed: Installed, sign: Sign):
    """Each answer is cut after 50,000 bytes: each attempt keeps what came, and in the end each byte came once."""
    peer.file, peer.cut = sign(3, {"large.bin": noise(1)}), 50_000
    total, attempts = 0, 0
    while (moved := update(installed, peer.url, now_ms=NOW)).outcome == "interrupted":
        assert "broke" in moved.reason
        assert moved.version is None
        total, attempts = total + moved.bytes, attempts + 1
    assert moved.outcome == "installed"
    assert attempts > 5
    assert total + moved.bytes == end(peer.file)
    assert current(installed) == peer.file


@pytest.mark.parametrize("ranges", [True, False])
def test_a_tag_that_could_be_this_devices_own_is_not_shown_again(
    peer: Peer, installed: Installed, sign: Sign, ranges: bool
):
    """A gateway that gives each device a tag of its own would know it by that; at the price of a head each time."""
    peer.file, peer.ranges, peer.own_tag = sign(3, {"large.bin": noise(1)}), ranges, '"device-4711"'
    assert update(installed, peer.url, now_ms=NOW).outcome == "installed"
    peer.asked.clear()
    again = update(installed, peer.url, now_ms=NOW)
    assert (again.outcome, again.bytes) == ("unchanged", FIRST if ranges else len(peer.file))
    assert not any("4711" in value for asked in peer.asked for value in asked.values())


def test_a_file_that_changed_meanwhile_is_begun_anew(peer: Peer, installed: Installed, sign: Sign):
    """Half of version 3, then the server has 4: nothing of 3 is put into it."""
    peer.file, peer.cut = sign(3, {"large.bin": noise(1)}), 100_000
    assert update(installed, peer.url, now_ms=NOW).outcome == "interrupted"
    peer.file, peer.cut = sign(4, {"large.bin": noise(2)}), -1
    assert update(installed, peer.url, now_ms=NOW).outcome == "installed"
    assert current(installed) == peer.file


def test_a_file_that_changes_again_and_again_is_given_up(peer: Peer, installed: Installed, sign: Sign):
    """After each answer the server has another version: a few requests, and a sentence."""
    versions = [sign(version, {"large.bin": noise(version)}) for version in range(3, 12)]
    peer.file = versions.pop()

    def promote() -> None:
        peer.file = versions.pop()

    peer.chosen = promote
    moved = update(installed, peer.url, now_ms=NOW)
    assert moved.outcome == "interrupted"
    assert "again and again" in moved.reason
    assert len(peer.asked) == 6


@pytest.mark.parametrize("length", [True, False])
def test_a_server_without_ranges_is_asked_for_all(peer: Peer, installed: Installed, sign: Sign, length: bool):
    """Each byte comes once there too, whether it says how many there are or not."""
    peer.file, peer.ranges, peer.length = sign(3, {"large.bin": noise(1)}), False, length
    assert update(installed, peer.url, now_ms=NOW) == Update("installed", 3, len(peer.file))
    assert current(installed) == peer.file
    assert update(installed, peer.url, now_ms=NOW) == Update("unchanged", 3, 0)


def test_a_bundle_that_may_not_be_installed_is_not_fetched(peer: Peer, installed: Installed, sign: Sign):
    """Its head tells: 16 kB of 400 come, the reason is told, and the old one goes on."""
    peer.file = sign(3)
    update(installed, peer.url, now_ms=NOW)
    large = {"large.bin": noise(1)}
    for file, why in (
        (sign(2, large), "older than version 3"),
        (sign(4, large, expires_ms=NOW - 1), "expired"),
        (sign(4, large, model="drinks"), "of model 'drinks'"),
        (sign(4, large, minimum_runtime=RUNTIME + 1), "the app must be updated"),
        (sign(13, large), "halted"),
        (b"<html>" + bytes(LARGE), "must hold manifest.json first"),
    ):
        peer.file = file
        moved = update(installed, peer.url, now_ms=NOW, halted=lambda version: version == 13)
        assert (moved.outcome, moved.version, moved.bytes) == ("refused", 3, FIRST)
        assert why in moved.reason
        assert sorted(f.suffix for f in installed.folder.iterdir()) == [".bundle", ".json"]


def test_a_bundle_signed_by_another_is_not_fetched(peer: Peer, tmp_path: Path, sign: Sign):
    """A device trusts its host app's key, and reads nothing that another signed."""
    installed = Installed(tmp_path / "device", "meals", Ed25519PrivateKey.generate().public_key(), engine="onnx")
    peer.file = sign(3, {"large.bin": noise(1)})
    moved = update(installed, peer.url, now_ms=NOW)
    assert (moved.outcome, moved.version, moved.bytes) == ("refused", None, FIRST)
    assert "not signed by the key this device trusts" in moved.reason


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 206 Partial Content\r\n"])
def test_an_answer_that_comes_drop_by_drop_ends_with_the_time_that_it_may_take(installed: Installed, head: bytes):
    """A byte now and again is enough for each wait on the network, and not for all of them together."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(head)
                while not select.select([connection], [], [], 0.05)[0] or connection.recv(4096):
                    connection.sendall(b"X")

        thread = threading.Thread(target=drip)
        thread.start()
        url, begun = f"http://127.0.0.1:{server.getsockname()[1]}", time.monotonic()
        moved = update(installed, url, now_ms=NOW, timeout_s=1.0, deadline_s=0.5)
        thread.join(10)
    assert (moved.outcome, moved.reason) == ("interrupted", "the download took too long")
    assert time.monotonic() - begun < 5
    assert not thread.is_alive()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_program_with_another_s_bytes_is_refused_and_not_kept(
    peer: Peer, installed: Installed, sign: Sign, ranges: bool
):
    """A flip behind the head, of the last program: the whole comes, is refused, and the next attempt begins anew."""
    peer.ranges, whole = ranges, sign(3, {"large.bin": noise(1)})
    flip = read_head(whole, installed.trusted).ranges()["large.bin"].stop - 1
    peer.file = whole[:flip] + bytes([whole[flip] ^ 1]) + whole[flip + 1 :]
    moved = update(installed, peer.url, now_ms=NOW)
    assert moved.outcome == "refused"
    assert "'large.bin' is not the one that was signed" in moved.reason or "damaged" in moved.reason
    peer.file = whole
    assert update(installed, peer.url, now_ms=NOW) == Update("installed", 3, end(whole) if ranges else len(whole))


@pytest.mark.parametrize(("ranges", "length"), [(True, True), (True, False), (False, True), (False, False)])
def test_no_more_is_read_than_was_asked_for(peer: Peer, installed: Installed, sign: Sign, ranges: bool, length: bool):
    """64 MB behind each body, whatever its length says: the connection is left within some buffers."""
    peer.file, peer.ranges, peer.length = sign(3, {"large.bin": noise(1)}), ranges, length
    peer.extra = bytes(2 * MAX_BYTES)
    moved = update(installed, peer.url, now_ms=NOW)
    assert moved.outcome == "refused"
    assert "sends more than" in moved.reason
    assert moved.bytes < len(peer.file) + (1 << 20)


@pytest.mark.parametrize(
    ("headers", "outcome", "why"),
    [
        ({"Content-Range": "bytes 1-16384/900000"}, "refused", "another range"),
        ({"Content-Range": "bytes 0-99999999/900000"}, "refused", "another range"),
        ({"Content-Range": "pages 1-2/3"}, "refused", "another range"),
        ({"Content-Encoding": "gzip"}, "refused", "encoded"),
        ({"ETag": 'W/"weak"'}, "interrupted", "206 without"),
        ({"ETag": ""}, "interrupted", "206 without"),
    ],
)
def test_an_answer_that_makes_no_sense_is_none(
    peer: Peer, installed: Installed, sign: Sign, headers: dict[str, str], outcome: str, why: str
):
    """A sentence, and nothing in the folder."""
    peer.file, peer.headers = sign(3), headers
    moved = update(installed, peer.url, now_ms=NOW)
    assert moved.outcome == outcome
    assert why in moved.reason
    assert not list(installed.folder.iterdir())


@pytest.mark.parametrize("status", [301, 307, 403, 404, 429, 500, 503])
def test_a_gateway_that_has_none_is_said_to(peer: Peer, installed: Installed, sign: Sign, status: int):
    """By the number of its answer; where it points elsewhere, nobody goes there."""
    peer.status, peer.headers = status, {"Location": "http://127.0.0.1:1/elsewhere"}
    moved = update(installed, peer.url, now_ms=NOW)
    assert moved == Update("interrupted", None, 0, f"the gateway answered {status}")


def test_a_gateway_that_is_not_there_is_said_to_be(installed: Installed):
    """Port 1 of this machine: a sentence."""
    moved = update(installed, "http://127.0.0.1:1", now_ms=NOW)
    assert moved == Update("interrupted", None, 0, "the connection to the gateway broke (ConnectError)")


def test_the_gateway_is_shown_the_api_key(peer: Peer, installed: Installed, sign: Sign):
    """With each request; without it, the error says what to set."""
    peer.file, peer.key = sign(3, {"large.bin": noise(1)}), "k" * 43
    with pytest.raises(Unauthenticated, match="asks for an API key"):
        update(installed, peer.url, now_ms=NOW)
    assert update(installed, peer.url, now_ms=NOW, api_key="k" * 43).outcome == "installed"
    assert [asked.get("Authorization") for asked in peer.asked] == [None, *[f"Bearer {'k' * 43}"] * 2]


@pytest.mark.parametrize(
    ("gateway", "model", "why"),
    [
        ("ftp://127.0.0.1", "meals", "must be an http:// or https:// URL"),
        ("http://127.0.0.1", "../meals", "model must be a name"),
        ("http://user:word@127.0.0.1", "meals", "without user name"),
    ],
)
def test_a_wrong_setting_is_named(installed: Installed, gateway: str, model: str, why: str):
    """Before anything is asked."""
    wrong = Installed(installed.folder, model, installed.trusted)
    with pytest.raises(ConfigError, match=why):
        update(wrong, gateway, now_ms=NOW)


def test_what_a_damaged_part_holds_is_not_believed(peer: Peer, installed: Installed, sign: Sign):
    """Of the two files that an interrupted download leaves, each damaged in some way: in the end the right bundle."""
    peer.file = sign(3, {"large.bin": noise(1)})
    for name, damage in (
        (download.PLAN, lambda data: b""),
        (download.PLAN, lambda data: b"[1]"),
        (download.PLAN, lambda data: data.replace(b"[[0", b"[[1")),
        (download.PLAN, lambda data: json.dumps({"tag": peer.tag, "spans": [[0, 10**12]]}).encode()),
        (download.PLAN, lambda data: data.replace(b'{"tag": "', b'{"tag": "\\n')),
        (download.PLAN, lambda data: data.replace(b'{"tag": "', b'{"tag": "\\u20ac')),
        (download.PART, lambda data: b""),
        (download.PART, lambda data: data + bytes(MAX_BYTES)),
        (download.PART, lambda data: data[:FIRST] + bytes(len(data) - FIRST)),
        (download.PART, lambda data: bytes(len(data))),
    ):
        peer.cut = 100_000
        assert update(installed, peer.url, now_ms=NOW).outcome == "interrupted"
        file = installed.folder / name
        file.write_bytes(damage(file.read_bytes()))
        peer.cut = -1
        if update(installed, peer.url, now_ms=NOW).outcome != "installed":
            assert update(installed, peer.url, now_ms=NOW).outcome == "installed"
        assert current(installed) == peer.file
        for left in installed.folder.iterdir():
            left.unlink()


FETCH = """
import sys
from pathlib import Path
from device_runtime.bundles import Installed
from device_runtime.download import update
from hybrid.bundle import trusted_key
installed = Installed(Path(sys.argv[1]), "meals", trusted_key(Path(sys.argv[2])), engine="onnx")
print(update(installed, sys.argv[3], now_ms=1).outcome)
"""


def test_a_process_that_is_killed_while_it_fetches_is_gone_on_from(
    peer: Peer, installed: Installed, sign: Sign, key: Ed25519PrivateKey, tmp_path: Path
):
    """`kill -9` in the middle of the body: the old one runs, and the next process fetches the rest alone."""
    from device_runtime.tests.test_program import public

    installed.install(sign(2), now_ms=NOW)
    peer.file = sign(3, {"large.bin": noise(1)})
    command = [sys.executable, "-c", FETCH, installed.folder, public(key, tmp_path), peer.url]
    peer.cut, peer.length = 150_000, True
    hold, reached = threading.Event(), threading.Event()

    def wait() -> None:
        if len(peer.asked) == 2:  # the range behind the head
            reached.set()
            hold.wait(60)

    peer.after = wait
    with subprocess.Popen(command) as process:
        assert reached.wait(60)
        part = installed.folder / download.PART
        while part.stat().st_size < 100_000:
            os.sched_yield()
        process.send_signal(signal.SIGKILL)
    hold.set()
    kept = part.stat().st_size
    assert installed.open().manifest.version == 2
    peer.cut, peer.after = -1, lambda: None
    assert subprocess.check_output(command, text=True) == "installed\n"
    assert installed.open().manifest.version == 3
    assert peer.asked[-1]["Range"].startswith("bytes=")
    assert kept >= 100_000
    assert len(peer.asked) == 3


def rollout(
    *halts: bytes,
    default: int = 2,
    canary: tuple[int, float] | None = None,
    shadow: tuple[int, float] | None = None,
    model: str = "meals",
    **more: object,
) -> bytes:
    """As a gateway tells it."""
    told = {"model": model, "default": default, "halted": [base64.b64encode(halt).decode() for halt in halts], **more}
    beside = {name: one for name, one in (("canary", canary), ("shadow", shadow)) if one}
    tried = {name: dict(zip(("version", "share"), one, strict=True)) for name, one in beside.items()}
    return json.dumps(told | tried).encode()


def test_a_device_below_the_share_has_the_canary_and_the_others_the_default(
    peer: Peer, tmp_path: Path, key: Ed25519PrivateKey, sign: Sign
):
    """Each draws once for a version: who has it keeps it, and a larger share only adds devices."""
    peer.files = {0: sign(2), 3: sign(3)}
    devices = [Installed(tmp_path / f"device-{i}", "meals", key.public_key(), engine="onnx") for i in range(30)]
    tried: list[set[int]] = []
    for share in (0.3, 0.3, 0.7, 1.0):
        peer.rollout = rollout(canary=(3, share))
        versions = [update(device, peer.url, now_ms=NOW).version for device in devices]
        assert set(versions) <= {2, 3}
        tried.append({i for i, version in enumerate(versions) if version == 3})
        draws = [device.record().draw for device in devices]
        assert tried[-1] == {i for i, draw in enumerate(draws) if draw is not None and draw[1] < share}
    assert tried[0] == tried[1] <= tried[2] <= tried[3] == set(range(30))
    assert 0 < len(tried[0]) < 30  # of 2^30 outcomes or so, fewer than one in ten thousand is otherwise
    assert all(draw is not None and draw[0] == 3 and (draw[1] * 1000) == round(draw[1] * 1000) for draw in draws)


def test_a_version_that_was_taken_back_gives_way_to_the_one_before_it(
    peer: Peer, installed: Installed, key: Ed25519PrivateKey, sign: Sign
):
    """Where the control plane signed it, and for good: a gateway that offers it again is not believed."""
    peer.files = {0: sign(2), 3: sign(3)}
    update(installed, peer.url, now_ms=NOW)
    peer.rollout = rollout(canary=(3, 1.0))
    assert update(installed, peer.url, now_ms=NOW).version == 3
    taken_back = sign_message(Halt(model="meals", versions=(3,), reason="worse"), key)
    other = sign_message(Halt(model="meals", versions=(3,), reason="worse"), Ed25519PrivateKey.generate())
    drinks = sign_message(Halt(model="drinks", versions=(3,), reason="worse"), key)
    peer.rollout = rollout(other, drinks, b"", b"nonsense", canary=(3, 1.0))
    assert update(installed, peer.url, now_ms=NOW) == Update("unchanged", 3, len(peer.rollout))
    peer.rollout = rollout(taken_back)
    assert update(installed, peer.url, now_ms=NOW) == Update("installed", 2, len(peer.rollout))
    assert installed.open().manifest.version == 2
    peer.rollout = rollout(canary=(3, 1.0))  # as if it had never been taken back
    assert update(installed, peer.url, now_ms=NOW).version == 2
    with pytest.raises(BundleError, match="version 3 was halted"):
        installed.install(sign(3), now_ms=NOW)
    peer.files[0], peer.rollout = sign(4), rollout(default=4)
    assert update(installed, peer.url, now_ms=NOW).version == 4


def test_who_has_only_what_was_taken_back_takes_the_older_default(
    peer: Peer, installed: Installed, key: Ed25519PrivateKey, sign: Sign
):
    """It was new when the canary was all that there was for it; nothing older than what is left is let in else."""
    peer.files, peer.rollout = {0: sign(2), 3: sign(3)}, rollout(canary=(3, 1.0))
    assert update(installed, peer.url, now_ms=NOW).version == 3
    peer.rollout = rollout(sign_message(Halt(model="meals", versions=(3,), reason="worse"), key))
    assert update(installed, peer.url, now_ms=NOW).version == 2
    peer.files[0] = sign(1)
    assert update(installed, peer.url, now_ms=NOW).outcome == "refused"


def test_a_halted_version_is_left_even_where_nothing_can_be_fetched(
    peer: Peer, installed: Installed, key: Ed25519PrivateKey, sign: Sign
):
    """And a device whose only bundle it was has none then: it does not predict with it."""
    peer.files, peer.rollout = {0: sign(2), 3: sign(3)}, rollout(canary=(3, 1.0))
    update(installed, peer.url, now_ms=NOW)
    peer.files[0] = b"nothing that can be installed"
    peer.rollout = rollout(sign_message(Halt(model="meals", versions=(3,), reason="worse"), key))
    moved = update(installed, peer.url, now_ms=NOW)
    assert (moved.outcome, moved.version) == ("refused", None)
    with pytest.raises(BundleError, match="no bundle of 'meals' is installed"):
        installed.open()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (b"<html>", "the gateway's rollout is none"),
        (rollout(model="drinks"), "the gateway's rollout is of 'drinks', not of 'meals'"),
        (rollout(canary=(3, 1.5)), "the gateway's rollout is none: 1 fields differ"),
        (rollout(halted=["x"] * 17), "the gateway's rollout is none: 1 fields differ"),
        (b" " * (1 << 17), "sends more than was asked for"),
    ],
)
def test_a_rollout_that_is_none_is_refused_and_the_old_bundle_goes_on(
    peer: Peer, installed: Installed, sign: Sign, told: bytes, why: str
):
    """Nothing is fetched; the reason is told."""
    peer.files = {0: sign(2)}
    update(installed, peer.url, now_ms=NOW)
    before, peer.asked, peer.rollout = installed.record(), [], told
    moved = update(installed, peer.url, now_ms=NOW)
    assert (moved.outcome, moved.version, peer.asked) == ("refused", 2, [])
    assert why in (moved.reason or "")
    assert installed.record() == before


def test_a_journal_notes_which_version_was_not_had_and_which_was(peer: Peer, installed: Installed, sign: Sign):
    """The one that was offered, canary or default; nothing where the gateway did not say which."""
    peer.files, peer.rollout = {0: sign(2), 3: b"none"}, rollout()
    assert update(installed, peer.url, now_ms=NOW).noted == (2, "downloaded", "untried")
    assert update(installed, peer.url, now_ms=NOW).noted == (2, "downloaded", "untried")
    peer.rollout = rollout(canary=(3, 1.0))
    assert update(installed, peer.url, now_ms=NOW).noted == (3, "checked", "refused")
    peer.files[0], peer.rollout = b"none", rollout(default=4)
    assert update(installed, peer.url, now_ms=NOW).noted == (4, "checked", "refused")
    peer.rollout = b"<html>"
    assert update(installed, peer.url, now_ms=NOW).noted is None


def test_a_shadow_is_installed_below_the_default_where_the_host_app_lets_it(
    peer: Peer, installed: Installed, sign: Sign
):
    """By default a device takes no part: nothing of it is asked for, and who takes part no more has none any more."""
    peer.files, peer.rollout = {0: sign(2), 3: sign(3)}, rollout(shadow=(3, 1.0))
    moved = update(installed, peer.url, now_ms=NOW)
    assert (moved.outcome, moved.version, moved.shadow) == ("installed", 2, None)
    assert peer.file == peer.files[0], "nothing else was asked for"
    assert not installed.shadow.folder.exists()
    moved = update(installed, peer.url, now_ms=NOW, shadows=True)
    assert (moved.outcome, moved.version, moved.shadow) == ("unchanged", 2, 3)
    assert moved.noted == (2, "downloaded", "untried"), "a shadow is no version that the device was offered"
    assert (installed.open().manifest.version, installed.shadow.open().manifest.version) == (2, 3)
    assert update(installed, peer.url, now_ms=NOW, shadows=True).bytes == len(peer.rollout), "it comes once"
    peer.status = 503  # it is removed whatever the gateway says
    assert update(installed, peer.url, now_ms=NOW).shadow is None
    assert [file.name for file in installed.shadow.folder.iterdir()] == ["installed.json"]
    with pytest.raises(BundleError, match="no bundle of 'meals' is installed"):
        installed.shadow.open()


def test_a_device_draws_for_a_shadow_apart_from_a_canary(
    peer: Peer, tmp_path: Path, key: Ed25519PrivateKey, sign: Sign
):
    """Once for a version; so that who is among the first with one is not so with the other."""
    peer.files = {0: sign(2), 3: sign(3), 4: sign(4)}
    devices = [Installed(tmp_path / f"device-{i}", "meals", key.public_key(), engine="onnx") for i in range(6)]
    have: list[list[int | None]] = []
    for share in (0.5, 0.5, 1.0):
        peer.rollout = rollout(canary=(3, 0.001), shadow=(4, share))
        have.append([update(device, peer.url, now_ms=NOW, shadows=True).shadow for device in devices])
        draws = [device.shadow.record().draw for device in devices]
        assert have[-1] == [4 if draw is not None and draw[1] < share else None for draw in draws]
    assert have[0] == have[1]
    assert have[2] == [4] * 6
    assert [device.record().draw[1] for device in devices] != [draw[1] for draw in draws]


def test_a_shadow_that_is_none_any_more_is_left_and_one_that_was_taken_back_for_good(
    peer: Peer, installed: Installed, key: Ed25519PrivateKey, sign: Sign
):
    """Its bundle goes where there is none, or another; what was taken back comes from nobody again."""

    def shadow(told: bytes) -> int | None:
        peer.rollout = told
        moved = update(installed, peer.url, now_ms=NOW, shadows=True)
        assert moved.version == 2
        return moved.shadow

    peer.files = {0: sign(2), 3: sign(3), 4: b"none", 5: sign(5)}
    assert shadow(rollout(shadow=(3, 1.0))) == 3
    assert shadow(rollout()) is None
    assert shadow(rollout(shadow=(3, 1.0))) == 3
    assert shadow(rollout(shadow=(4, 1.0))) is None, "another that cannot be had"
    assert shadow(rollout(shadow=(5, 1.0))) == 5
    assert shadow(rollout(shadow=(3, 1.0))) is None, "it is older"
    taken_back = sign_message(Halt(model="meals", versions=(5,), reason="worse"), key)
    assert shadow(rollout(taken_back)) is None
    assert shadow(rollout(shadow=(5, 1.0))) is None
    assert not list(installed.shadow.folder.glob("*.bundle"))


def test_a_shadow_that_fails_leaves_the_default_as_it_is(peer: Peer, installed: Installed, tmp_path: Path, sign: Sign):
    """Signed by another, broken off, or where the gateway's rollout cannot be read: the default is what it was."""
    mine = sign(3)
    write_bundle(tmp_path / "other", read_head(mine, installed.trusted).manifest, {}, Ed25519PrivateKey.generate())
    peer.files, peer.rollout = {0: sign(2), 3: (tmp_path / "other").read_bytes()}, rollout(shadow=(3, 1.0))
    moved = update(installed, peer.url, now_ms=NOW, shadows=True)
    assert (moved.outcome, moved.version, moved.reason, moved.shadow) == ("installed", 2, None, None)
    peer.files[3] = mine
    assert update(installed, peer.url, now_ms=NOW, shadows=True).shadow == 3
    peer.rollout = b"<html>"
    moved = update(installed, peer.url, now_ms=NOW, shadows=True)
    assert (moved.outcome, moved.version, moved.shadow) == ("refused", 2, 3), "nobody said that it is another"
