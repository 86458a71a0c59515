"""What one aggregator process carries, and how fast a fleet trains: `python -m benchmarks.fleet [--json FILE]`.

The process of an aggregator, with a round open, and simulated devices in processes of their own, which speak the
protocol as real ones do: each request over a connection of its own, one check-in and one upload a device.

check-ins   answered with the signed plan and its weights, and with a time to come back
uploads     each read, checked, dequantised, clipped and summed in float64; as float32 and in 8 bits a weight
memory      the process's, after a thousand uploads and after all

Beside them, what uvicorn answers at most that reads the same bodies and does nothing. Devices and aggregator share
the machine's cores. Then how long a fleet trains until its model is good: see `benchmarks.fleet_async`. Takes
about five minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import fleet_async, measure
from examples.coupon import folds
from hybrid.update import Upload

SMALL, LARGE = 6_300, 200_000  # weights
PROCESSES = 4  # of devices: each waits for its answers one after another
FIRST = 1000  # devices after which memory is to stay as it is
console = Console(stderr=True, highlight=False)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and figures there")
    parser.add_argument("--devices", type=int, default=10_000, help="at least 2,000 (default %(default)s)")
    parser.add_argument("--large", action="store_true", help=f"{LARGE} weights too, for a fifth of the devices")
    parser.add_argument("--seeds", type=int, default=3, help="of the asynchronous training (default %(default)s)")
    parser.add_argument("--only", choices=["process", "async"], help="one part")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    if arguments.only != "async":
        rows, figures = carried(arguments.devices, large=arguments.large)
        measure.show("One aggregator process", rows, figures)
    if arguments.only != "process":
        with folds.progress(console) as bar:
            trained, speedup = fleet_async.measured(arguments.seeds, bar)
        measure.show("A fleet with a heavy tail (oracle: simulated, measured on pooled data)", trained, speedup)
        rows, figures = rows + trained, figures | speedup
    measure.write(arguments.json, rows, figures)


def carried(devices: int, *, large: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and figures of one aggregator process."""
    rows: list[dict[str, Any]] = []
    for size in (SMALL, LARGE) if large else (SMALL,):
        for upload in ("float32", "int8"):
            console.print(f"{size} weights as {upload} ...")
            rows += measured(size, upload, max(2 * FIRST, devices // (5 if size == LARGE else 1)))
    figures = {
        "check_ins_per_s": _rate(rows, "check-in, 200", "float32"),
        "uploads_per_s": _rate(rows, "upload", "float32"),
        "uploads_per_s_int8": _rate(rows, "upload", "int8"),
        "http_share": _rate(rows, "upload", "float32") / _rate(rows, "upload, read alone", "float32"),
        "rss_growth_per_1000": max(
            row["MB a 1,000"] for row in rows if row["MB a 1,000"] != "" and row["weights"] == SMALL
        ),
        "rss_mb": max(row["MB"] for row in rows),
    }
    return rows, figures


def _rate(rows: list[dict[str, Any]], what: str, upload: str) -> float:
    found = (row for row in rows if (row["request"], row["as"], row["weights"]) == (what, upload, SMALL))
    return float(next(found)["a second"])


@dataclass(frozen=True)
class Load:
    """What devices did: requests, seconds from the first to the last, and milliseconds of each."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float


def measured(size: int, upload: Upload, devices: int) -> list[dict[str, Any]]:
    """Rows of one size and encoding."""
    rows = []

    def row(request: str, load: Load, megabytes: float, growth: float | str = "") -> None:
        rows.append(
            {
                "weights": size,
                "as": upload,
                "request": request,
                "a second": load.requests / load.seconds,
                "p50 ms": load.p50_ms,
                "p99 ms": load.p99_ms,
                "MB": megabytes,
                "MB a 1,000": growth,
            }
        )

    with process("aggregator", size, upload) as aggregator:
        row("check-in, 200", loaded("check-in", aggregator, size, upload, range(devices)), aggregator.rss_mb())
        loaded("upload", aggregator, size, upload, range(FIRST))
        before = aggregator.rss_mb()
        load = loaded("upload", aggregator, size, upload, range(FIRST, devices))
        after = aggregator.rss_mb()
        row("upload", load, after, (after - before) / (devices - FIRST) * 1000)
        received = aggregator.ask("close")
        assert received == devices, f"{received} of {devices} uploads were counted"
        row("check-in, 204", loaded("check-in", aggregator, size, upload, range(devices)), aggregator.rss_mb())
    with process("plain", size, upload) as plain:
        row("upload, read alone", loaded("upload", plain, size, upload, range(devices // 2)), plain.rss_mb())
    return rows


class Server:
    """A process that is listening, and answers what its parent asks it over its input."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.about: dict[str, Any] = self._read()

    def ask(self, word: str) -> Any:
        """One answer to one word."""
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        return self._read()

    def rss_mb(self) -> float:
        """Of its memory, what is resident."""
        return float(self.ask("rss"))

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark failed: {self._process.communicate()[1]}")
        return json.loads(line)


@contextmanager
def process(role: str, size: int, upload: Upload) -> Iterator[Server]:
    """Of `benchmarks.fleet_process`; gone after the block."""
    pipe = subprocess.PIPE
    words = [sys.executable, "-m", "benchmarks.fleet_process", role, str(size), upload]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as started:
        try:
            yield Server(started)
        finally:
            started.kill()


def loaded(what: str, server: Server, size: int, upload: Upload, devices: range) -> Load:
    """One request of each of some devices, from several processes at once."""
    step = -(-len(devices) // PROCESSES)
    parts = [devices[begin : begin + step] for begin in range(0, len(devices), step)]
    words = [sys.executable, "-m", "benchmarks.fleet_process", what, str(size), upload]
    words += [str(server.about["port"]), server.about["plan"]]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([*words, f"{part.start}:{part.stop}"], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for part in parts
    ]
    for each in started:  # all have imported what they need
        assert each.stdout is not None
        if each.stdout.readline() != "ready\n":
            raise SystemExit(f"a process of the benchmark failed: {each.communicate()[1]}")
    said = []
    for each in started:
        assert each.stdin is not None
        print(file=each.stdin, flush=True)
    for each in started:
        output, error = each.communicate()
        if each.returncode:
            raise SystemExit(f"a process of the benchmark failed: {error}")
        said.append(json.loads(output))
    times = sorted(time for one in said for time in one["ms"])
    seconds = max(one["end"] for one in said) - min(one["begin"] for one in said)
    return Load(len(devices), seconds, statistics.median(times), times[int(0.99 * len(times))])


if __name__ == "__main__":
    main()
