"""People as devices: their rows in one encrypted store, and processes of devices that ask the gateway.

`python -m examples.coupon.devices` asks for the people of one fold, of the promoted version.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hybrid.bundle import Manifest, read_bundle, trusted_key
from hybrid.cli import command_line
from hybrid.errors import ConfigError, StackError
from hybrid.federation.population import Population, parse_fold
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from device_runtime.store import Store

PROCESSES = 2
CONCURRENCY = 4  # requests in flight of one process: people's devices ask now and then, they do not saturate a server


@dataclass(frozen=True)
class Answers:
    """What became of the requests.

    Attributes:
        requests, answered: how many rows were asked about, and got a prediction or an explained error.
        row: (p,) of the predicted ones: place among the rows asked about.
        prediction: (p,) as served.
        latency_ms: (requests,) from a row's inputs to its answer.
        examples: how many the devices' store holds afterwards, to train with.
    """

    requests: int
    answered: int
    row: NDArray[np.int64]
    prediction: NDArray[np.float64]
    latency_ms: NDArray[np.float64]
    examples: int


def store_rows(store: Store, population: Population, users: NDArray[np.bool_], manifest: Manifest) -> int:
    """Writes the rows of some users as devices would hold them, device u = u-th of these users; returns how many."""
    from device_runtime.rows import Rows

    counts = np.diff(population.offsets)
    mine = np.repeat(users, counts)
    rows = Rows(
        device=np.repeat(np.arange(users.sum()), counts[users]),
        row=np.arange(mine.sum()),
        entity=population.column("offer_id")[mine].tolist(),
        request={name: population.column(name)[mine].tolist() for name in manifest.request},
        features={name: population.column(name)[mine].tolist() for name in manifest.features.names},
    )
    store.write(rows, _now_ms())
    return len(rows)


def store_labels(store: Store, population: Population, users: NDArray[np.bool_]) -> int:
    """Joins to each answered row whether its driver took the coupon; returns to how many, which are examples then."""
    counts = np.diff(population.offsets)
    taken = population.column("Y")[np.repeat(users, counts)]
    device = np.repeat(np.arange(users.sum()), counts[users])
    now_ms, joined = _now_ms(), 0
    with store.together():
        for row in range(len(taken)):
            inference = store.id_of(int(device[row]), row)
            if inference is not None and store.label(int(taken[row]), now_ms, inference=inference) is not None:
                joined += 1
    return joined


def ask(workspace: Workspace, version: int, users: NDArray[np.bool_], folder: Path) -> Answers:
    """Stores some users' rows as their devices would, asks about each from processes of devices, and stores what came.

    Afterwards the store holds examples: what the server contributed, and whether the coupon was taken.

    Args:
        workspace: whose local stack is up.
        version: promoted; its bundle is verified as a device would.
        users: (users,) of the population whose devices ask.
        folder: for the store, its key and the results.

    Raises:
        StackError: a device process failed; the message is what it said.
    """
    from device_runtime.store import Store

    bundle = workspace.bundles / f"coupon-{version}.bundle"
    trust = workspace.keys / "bundle-signing.pub"
    manifest = read_bundle(bundle.read_bytes(), trusted_key(trust)).manifest
    file, key_file = folder / "devices.sqlite", folder / "devices.key"
    key = store_key(key_file)
    population = Population.open("coupon", workspace)
    with Store.open(file, key, manifest) as store:
        store_rows(store, population, users, manifest)
    gateway = f"http://127.0.0.1:{ports(workspace)['gateway']}"
    infer = [sys.executable, "-m", "device_runtime", "infer", "--bundle", bundle, "--trust", trust, "--store", file]
    infer += ["--key-file", key_file, "--contribution"]
    cuts = np.linspace(0, users.sum(), PROCESSES + 1).astype(int).tolist()
    results = [folder / f"results-{part}.parquet" for part in range(PROCESSES)]
    summaries = run_together(
        [*infer, "--gateway", gateway, "--concurrency", str(CONCURRENCY), "--out", out, "--devices", f"{first}:{end}"]
        for out, first, end in zip(results, cuts[:-1], cuts[1:], strict=True)
    )
    with Store.open(file, key, manifest) as store:
        examples = store_labels(store, population, users)
    table = pd.concat([pd.read_parquet(file) for file in results])
    predicted = table[table.status == "ok"]
    return Answers(
        requests=sum(summary["requests"] for summary in summaries),
        answered=sum(summary["answered"] for summary in summaries),
        row=predicted.row.to_numpy(),
        prediction=predicted.prediction.to_numpy(),
        latency_ms=table.latency_ms.to_numpy(),
        examples=examples,
    )


def store_key(file: Path) -> bytes:
    """The key of the devices' store, made at first use; on a phone the system's keystore has it."""
    from device_runtime.secret import read_store_key

    if not file.exists():
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            handle.write(secrets.token_hex(32))
    return read_store_key(file, {})


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def run_together(commands: Iterable[Sequence[str | Path]]) -> list[dict[str, Any]]:
    """Runs device processes at once and returns the summary that each prints.

    Raises:
        StackError: one failed.
    """
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        said = [process.communicate() for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [error for process, (_, error) in zip(running, said, strict=True) if process.returncode]
    if failed:
        raise StackError(f"a device process failed: {failed[0].strip()}")
    return [json.loads(output) for output, _ in said]


def ports(workspace: Workspace) -> dict[str, int]:
    """Use -> TCP port of the local stack."""
    from hybrid.local.stack import status

    state = status(workspace)
    return {use: port for server in (state.servers if state else ()) for use, port in server.ports.items()}


def servers(workspace: Workspace) -> dict[str, Any]:
    """For report.json: what served, in which version, and how many records went through the broker."""
    from hybrid.local import kafka

    listening = ports(workspace)
    with urllib.request.urlopen(f"http://127.0.0.1:{listening['triton-http']}/v2", timeout=10) as answer:
        triton = json.load(answer)["version"]
    return {
        "kafka": {"version": kafka.VERSION},
        "triton": {"version": triton},
        "broker_records": broker_records(f"127.0.0.1:{listening['kafka']}"),
    }


def broker_records(bootstrap: str) -> int:
    """Records that Kafka itself says its two topics hold."""
    from kafka import KafkaConsumer, TopicPartition

    from hybrid.messages import DeviceEmbeddings, Predictions

    with KafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False) as consumer:
        found = 0
        for topic in (DeviceEmbeddings.TOPIC, Predictions.TOPIC):
            partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
            first, end = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
            found += sum(end.values()) - sum(first.values())
    return found


@contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """A new folder to keep, or one that goes.

    Raises:
        ConfigError: it is there already.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as gone:
            yield Path(gone)
        return
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"--keep must be a folder that can be made, got {str(folder)!r}: {error.strerror}") from None
    yield folder


def main() -> None:
    """Reads the command line."""
    from hybrid.registry import Registry

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", default="1/5", help="K/N: whose devices ask (default %(default)s)")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="new folder for the devices' store, key and results"
    )
    arguments = parser.parse_args()
    workspace = Workspace.current()
    served = Registry(workspace).version("coupon", "production")
    users = Population.open("coupon", workspace).fold(*parse_fold(arguments.fold))
    with kept(arguments.keep) as folder:
        answers = ask(workspace, served.number, users, folder)
    p50, p99 = np.percentile(answers.latency_ms, [50, 99])
    print(
        f"{answers.requests} requests from {users.sum()} devices, {answers.answered} answered, {len(answers.row)} "
        f"predicted; latency p50 {p50:.0f} ms, p99 {p99:.0f} ms; the devices keep {answers.examples} examples"
    )


if __name__ == "__main__":
    with command_line():
        main()
