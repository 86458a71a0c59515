"""A real gateway's bundles, fetched as a device does: over a connection that breaks, with what it has already."""

import json
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from hybrid.bundle import Manifest, read_bundle, signing_key, trusted_key, write_bundle
from hybrid.export.onnx import onnx_bytes
from hybrid.features import Features, Numeric
from hybrid.local.process import Process, Service, free_ports, http_ok, running
from hybrid.network import DeviceProgram
from hybrid.spec import Clear
from serving.testing import deployment

PROGRAM = 12 << 20  # bytes: more than the sockets between hold, so that a download can be cut


@dataclass(frozen=True)
class Served:
    """A gateway, and the folder that a promotion writes to."""

    url: str
    folder: Path
    process: Process

    def promote(self, seed: int) -> bytes:
        """Writes the bundle of version 1 in one step, as `hybrid promote` does; its one program is random bytes."""
        return self.write({"embed.pte": np.random.default_rng(seed).bytes(PROGRAM)}, created_ms=seed)

    def write(self, programs: dict[str, bytes], *, created_ms: int, version: int = 1) -> bytes:
        """Writes a bundle of these programs in the place of version 1's."""
        manifest = Manifest(
            model="shop",
            version=version,
            definition_hash="0" * 64,
            features=Features.of({"mood": Numeric()}),
            server_embedding=2,
            device_embedding=2,
            merge="server",
            release=Clear(reason="random bytes in a test"),
            programs={},
            created_ms=created_ms,
        )
        file = self.folder / "bundles" / "shop-1.bundle"
        write_bundle(file, manifest, programs, signing_key(self.folder / "keys"))
        return file.read_bytes()

    def update(self, device: Path, gateway: str | None = None) -> dict[str, object]:
        """What `python -m device_runtime update` prints, in a process of its own."""
        command = [sys.executable, "-m", "device_runtime", "update", "--folder", str(device), "--model", "shop"]
        command += ["--trust", str(self.folder / "keys" / "bundle-signing.pub"), "--engine", "onnx"]
        command += ["--gateway", gateway or self.url.partition("/v2/")[0]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        summary: dict[str, object] = json.loads(done.stdout or "{}")
        assert done.returncode == (summary.get("outcome") not in ("installed", "unchanged")), done.stderr
        return summary

    def verify(self, downloaded: bytes) -> None:
        """As a device does; raises what `read_bundle` does."""
        assert read_bundle(downloaded, trusted_key(self.folder / "keys" / "bundle-signing.pub")).manifest.version == 1

    def cut(self, size: int) -> tuple[bytes, str]:
        """The first bytes of a download whose connection ends after `size` of them, and the bundle's tag."""
        part = b""
        with httpx.stream("GET", self.url) as answer:
            for chunk in answer.iter_raw():
                part += chunk
                if len(part) >= size:
                    break
        return part, answer.headers["ETag"]

    def files(self) -> list[str]:
        """Bundles that the gateway has open."""
        found = [file.path for file in psutil.Process(self.process.pid).open_files()]
        return [path for path in found if path.endswith(".bundle")]


@pytest.fixture(scope="module")
def served(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bundles")
    (folder / "bundles").mkdir()
    deployment().write(folder / "deployments")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "serving", "gateway", "--port", str(port), "--kafka", kafka]
    command += ["--deployments", str(folder / "deployments"), "--bundles", str(folder / "bundles")]
    ready = http_ok(f"http://127.0.0.1:{port}/v2/health/ready")
    with running(Service("gateway", command, ready), folder / "logs") as process:
        yield Served(f"http://127.0.0.1:{port}/v2/models/shop/versions/1/bundle", folder, process)


def test_a_download_that_was_cut_is_resumed_and_verifies(served: Served) -> None:
    """The second request asks for the rest of the same bytes: together they are the signed bundle."""
    whole = served.promote(1)
    part, tag = served.cut(1 << 20)
    assert len(part) < len(whole)
    rest = httpx.get(served.url, headers={"Range": f"bytes={len(part)}-", "If-Range": tag})
    assert (rest.status_code, rest.headers["Content-Range"]) == (
        206,
        f"bytes {len(part)}-{len(whole) - 1}/{len(whole)}",
    )
    served.verify(part + rest.content)
    assert part + rest.content == whole


def test_who_has_it_is_sent_nothing(served: Served) -> None:
    """304 without a body, at the version's address and at the default's; HEAD says how large it is."""
    whole = served.promote(2)
    head = httpx.head(served.url)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(whole)))
    for url in (served.url, served.url.replace("/versions/1", "")):
        known = httpx.get(url, headers={"If-None-Match": head.headers["ETag"]})
        assert (known.status_code, known.content) == (304, b"")


def test_what_changed_meanwhile_is_sent_from_its_beginning(served: Served) -> None:
    """Cut, promoted again, resumed: 200 with the new bundle, which verifies; the old part would not fit it."""
    before = served.promote(3)
    part, tag = served.cut(1 << 20)
    after = served.promote(4)
    again = httpx.get(served.url, headers={"Range": f"bytes={len(part)}-", "If-Range": tag})
    assert (again.status_code, again.content == after) == (200, True)
    assert again.headers["ETag"] != tag
    served.verify(again.content)
    assert before != after


def test_a_download_goes_on_with_the_bytes_it_began_with(served: Served) -> None:
    """Replaced after its first bytes arrived: the rest is of the old bundle, and it verifies."""
    before = served.promote(5)
    with httpx.stream("GET", served.url) as answer:
        chunks = answer.iter_raw()
        first = next(chunks)
        served.promote(6)
        downloaded = first + b"".join(chunks)
    assert downloaded == before
    served.verify(downloaded)


def test_a_hundred_downloads_that_are_cut_leave_no_file_open(served: Served) -> None:
    """Each closes its own, and the next one is answered."""
    whole = served.promote(7)
    for _ in range(100):
        served.cut(1)
    deadline = time.monotonic() + 30
    while served.files():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert httpx.get(served.url).content == whole


@contextmanager
def breaking(gateway: str, after: int) -> Iterator[str]:
    """An address whose connections lead to the gateway, and are reset once `after` bytes came back over one of them."""
    port = int(gateway.rpartition(":")[2])

    class Relay(socketserver.BaseRequestHandler):
        def ask(self, other: socket.socket) -> None:
            with suppress(OSError):  # either side may be gone
                while data := self.request.recv(1 << 16):
                    other.sendall(data)

        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as other:
                threading.Thread(target=self.ask, args=(other,), daemon=True).start()
                left = after
                while left > 0 and (data := other.recv(min(left, 1 << 16))):
                    self.request.sendall(data)
                    left -= len(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_device_follows_promotions_and_fetches_what_it_lacks(served: Served, tmp_path: Path) -> None:
    """The command, against the gateway: installed, unchanged for what it is told, cut and gone on from, refused.

    Of 12 MB that stay the same nothing is fetched again, and after a break the rest alone.
    """
    embed = DeviceProgram(Features.of({"mood": Numeric()}), torch.nn.Linear(2, 2)).eval()
    small = {"embed.onnx": onnx_bytes("embed", embed, {"inputs": torch.randn(5, 1)}, "embedding")}
    first, second = (np.random.default_rng(seed).bytes(PROGRAM) for seed in (1, 2))
    gateway, device = served.url.partition("/v2/")[0], tmp_path / "device"

    served.write(small | {"table.bin": first}, created_ms=1)
    fetched = served.update(device)
    assert (fetched["outcome"], fetched["version"]) == ("installed", 1)
    assert PROGRAM < fetched["bytes"] < PROGRAM + 40_000
    told = len(httpx.get(f"{gateway}/v2/models/shop/rollout").content)
    unchanged = {"model": "shop", "outcome": "unchanged", "version": 1, "reason": None, "offered": None, "shadow": None}
    assert served.update(device) == unchanged | {"bytes": told}

    served.write(small | {"table.bin": first}, created_ms=2, version=2)
    fetched = served.update(device)
    assert (fetched["outcome"], fetched["version"]) == ("installed", 2)
    assert fetched["bytes"] < 40_000

    whole = served.write(small | {"table.bin": second}, created_ms=3, version=3)
    with breaking(gateway, 5 << 20) as bad:
        broken = served.update(device, bad)
    assert (broken["outcome"], broken["version"]) == ("interrupted", 2)
    assert (4 << 20) < broken["bytes"] < PROGRAM
    fetched = served.update(device)
    assert (fetched["outcome"], fetched["version"]) == ("installed", 3)
    assert broken["bytes"] + fetched["bytes"] < PROGRAM + 40_000
    current = json.loads((device / "installed.json").read_text())["current"]
    assert (device / f"{current['sha256']}.bundle").read_bytes() == whole

    served.write(small | {"table.bin": first}, created_ms=4, version=2)
    refused = served.update(device)
    assert (refused["outcome"], refused["version"]) == ("refused", 3)
    assert "older than version 3" in refused["reason"]
    assert refused["bytes"] < 40_000
