"""A process of `benchmarks.fleet`: `python -m benchmarks.fleet_process ROLE WEIGHTS ENCODING ...`.

aggregator    an aggregator with an open round; says its port and plan, then answers "rss" and "close" on its input
plain         uvicorn alone: reads a body, answers 200; the same
check-in      PORT PLAN A:B: devices A to B check in, one after another, once a line comes in
upload        the same, with an update each
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.plan import CHECK_IN, UPDATE, CheckIn
from hybrid.update import Upload, encode

MODEL, VERSION = "benchmark", 1
ROUND_S = 3600.0
HEAD = (
    "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: hybrid-device\r\nAccept: application/octet-stream\r\n"
)
HEAD += "Accept-Encoding: identity\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"


def main() -> None:
    """Reads the command line."""
    role, size, upload, *more = sys.argv[1:]
    if role == "aggregator":
        aggregator(int(size), upload)  # type: ignore[arg-type]
    elif role == "plain":
        plain()
    else:
        port, plan, devices = more
        first, _, end = devices.partition(":")
        those = range(int(first), int(end))
        requests = check_ins(those) if role == "check-in" else uploads(int(size), upload, plan, those)  # type: ignore[arg-type]
        print(json.dumps(attend(requests, int(port))))


def aggregator(size: int, upload: Upload) -> None:
    """Noise would only take time once, at the end; without it no ledger is needed."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from hybrid.federation.aggregator import Round
    from hybrid.federation.checkin import listening
    from hybrid.federation.clock import ManualClock
    from hybrid.federation.fleet_aggregator import FleetAggregator, Task
    from hybrid.plan import Local, open_signed

    task = Task(
        model=MODEL,
        version=VERSION,
        definition_hash="0" * 64,
        local=Local(steps=1, lr=0.1),
        upload=upload,
        parameters=size,
        round_s=ROUND_S,
        wanted=10_000,
    )
    key, clock = Ed25519PrivateKey.generate(), ManualClock()
    fleet = FleetAggregator(task, Round(1.0, 1.0, 0.0, minimum=0), None, key, clock=clock)
    with listening(fleet) as port:
        with clock.during(lambda: fleet.run_round(1, np.zeros(size, np.float32)), ROUND_S) as release:
            signed = fleet.check_in(CheckIn(model=MODEL, version=VERSION, runtime=1)).body
            print(json.dumps({"port": port, "plan": open_signed(signed, key.public_key())[0].id}), flush=True)
            serve_parent("close")
        print(json.dumps(release.result().received), flush=True)
        serve_parent("end")


def plain() -> None:
    """The least that reads an update."""
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    bound = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(app, http="httptools", loop="asyncio", lifespan="off", access_log=False, log_config=None)
    threading.Thread(target=uvicorn.Server(config).run, args=([bound],), daemon=True).start()
    print(json.dumps({"port": bound.getsockname()[1], "plan": "0" * 32}), flush=True)
    serve_parent("end")


def serve_parent(last: str) -> None:
    """Answers "rss" until another word comes, or the parent is gone."""
    for line in sys.stdin:
        if line.strip() == last:
            return
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, flush=True)
    os._exit(0)


def attend(requests: Iterator[bytes], port: int) -> dict[str, Any]:
    """When the first of these devices began and the last ended, in Unix seconds, and milliseconds of each request."""
    first = next(requests)
    print("ready", flush=True)
    sys.stdin.readline()
    times, begin = [], time.time()
    times.append(answered(port, first))
    times.extend(answered(port, request) for request in requests)
    return {"begin": begin, "end": time.time(), "ms": times}


def check_ins(devices: range) -> Iterator[bytes]:
    """All alike."""
    body = CheckIn(model=MODEL, version=VERSION, runtime=1).model_dump_json().encode()
    head = HEAD.format(method="POST", path=CHECK_IN, kind="application/json", length=len(body))
    for _ in devices:
        yield head.encode() + body


def uploads(size: int, upload: Upload, plan: str, devices: range) -> Iterator[bytes]:
    """The same update under the id of each device: what is sent does not matter, and making it would take time."""
    rng = np.random.default_rng(devices.start)
    body = encode(rng.normal(size=size).astype(np.float32), upload, rng)
    for device in devices:
        path = UPDATE.format(plan=plan, upload=f"{device:032x}")
        yield HEAD.format(method="PUT", path=path, kind="application/octet-stream", length=len(body)).encode() + body


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """A connection of its own."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def answered(port: int, request: bytes) -> float:
    """Milliseconds from the connection to the last byte of the answer."""
    begun, received = time.perf_counter(), bytearray()
    with connected(port) as connection:
        connection.sendall(request)
        while part := connection.recv(1 << 18):
            received += part
    if received[9:12] not in (b"200", b"204"):
        raise SystemExit(f"answered {bytes(received[:80])!r}")
    return (time.perf_counter() - begun) * 1e3


if __name__ == "__main__":
    main()
