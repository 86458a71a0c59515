"""How fast predictions are served: `python -m benchmarks.serving [--json FILE] [--quick]`.

One run on real Kafka, Triton and Feast (SQLite, in the drain Redis too), each started here:

drain     a merge worker's process over a filled topic, against the same topic row by row as a person would
          write it (kafka-python, get_online_features, tritonclient), and against bare Triton
clients   the whole path from HTTP clients, against a row-at-a-time HTTP service with as many clients
latency   open loop at 50, 200 and 500 requests/s, from when each request was due, over each front; and bare
          Triton and a bare Kafka round trip of two hops at the same rates, as the floor
soak      memory of each process while 200 requests/s come

Takes about 20 minutes, with --quick about four. Contestants take turns, and a
ratio is of the same turn, since the machine may be slower when it is the other's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kafka
import numpy as np
import psutil
from rich.console import Console

from benchmarks import measure, world
from hybrid.errors import StackError
from hybrid.local.process import Process, free_ports
from hybrid.messages import DeviceEmbeddings, Predictions
from serving.connection import Broker, TritonAddress
from serving.kafka import GROUP
from serving.topics import PARTITIONS, create_topics
from serving.triton import Triton

RATES = (50, 200, 500)
BATCH = 512  # rows of a record that a busy gateway writes, and of a bare Triton call
NO_CACHE = ("--reread-s", "0", "--cache-mb", "0")
NO_DEADLINE = ("--deadline-s", "3600")  # a filled topic's rows were asked long ago
CLIENTS = 128
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Lengths:
    """How long each part runs.

    Attributes:
        rows: of a filled topic.
        turns: of contestants, in the drain and of the clients.
        at_a_time_s, triton_s, clients_s, latency_s, soak_s: of one turn.
    """

    rows: int = 400_000
    turns: int = 3
    at_a_time_s: float = 10
    triton_s: float = 5
    clients_s: float = 15
    latency_s: float = 20
    soak_s: float = 300


QUICK = Lengths(rows=100_000, turns=1, at_a_time_s=5, triton_s=2, clients_s=5, latency_s=5, soak_s=30)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and figures there")
    parser.add_argument("--quick", action="store_true", help="run each part for a short time: figures are rough")
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part (may be repeated)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers are stopped
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        console.print("preparing a model, its features and the servers ...")
        with world.world(Path(folder)) as served:
            create_topics(Broker(served.kafka))
            for name in arguments.only or PARTS:
                console.print(f"{name} ...")
                PARTS[name](served, QUICK if arguments.quick else Lengths(), rows, figures)
    measure.show("Serving", rows, figures)
    measure.write(arguments.json, rows, figures)


# Drain -------------------------------------------------------------------------------------------


def drain(served: world.World, lengths: Lengths, rows: list[dict[str, Any]], figures: dict[str, float]) -> None:
    """The worker alone; what has no target is measured in one turn."""
    found: dict[str, list[float]] = {}
    for turn in range(lengths.turns):
        at_a_time = contestant(served, lengths.at_a_time_s, turn)
        one = drained(served, lengths.rows, workers=1, seed=3 * turn)
        two = drained(served, lengths.rows, workers=2, seed=3 * turn + 1)
        bare = bare_triton(served, lengths.triton_s)
        rates = {"at a time": at_a_time, "one worker": one.rows_per_s, "two": two.rows_per_s, "bare Triton": bare}
        rows.append({"part": "drain, rows/s", "turn": turn + 1} | rates)
        ratios = {
            "speedup_over_record_at_a_time": one.rows_per_s / at_a_time,
            "fraction_of_bare_triton": one.rows_per_s / bare,
            "worker_cpu_per_row_2_over_1": two.cpu_s_per_row / one.cpu_s_per_row,
            "us_cpu_per_row": 1e6 * one.cpu_s_per_row,
        }
        if turn == 0:
            ratios |= drained_otherwise(served, lengths, at_a_time, rows)
        for name, value in ratios.items():
            found.setdefault(name, []).append(value)
    figures |= {name: statistics.median(taken) for name, taken in found.items()}


def drained_otherwise(
    served: world.World, lengths: Lengths, at_a_time: float, rows: list[dict[str, Any]]
) -> dict[str, float]:
    """Without what is kept, in small records, and over Redis: each over the row-at-a-time pipeline of its store."""
    some, redis = lengths.rows // 4, world.REDIS
    redis_at_a_time = contestant(served, lengths.at_a_time_s, 0, store=world.REDIS)
    rates = {
        "nothing cached": drained(served, some, workers=1, seed=1000, arguments=NO_CACHE).rows_per_s,
        "records of one row": drained(served, some // 5, workers=1, seed=2, size=1).rows_per_s,
        "Redis: at a time": redis_at_a_time,
        "Redis": drained(served, some, workers=1, seed=2000, store=redis).rows_per_s,
        "Redis, nothing cached": drained(
            served, some, workers=1, seed=3000, arguments=NO_CACHE, store=redis
        ).rows_per_s,
    }
    rows.append({"part": "drain, one worker, rows/s"} | rates)
    return {
        "speedup_nothing_cached": rates["nothing cached"] / at_a_time,
        "speedup_records_of_one_row": rates["records of one row"] / at_a_time,
        "speedup_redis": rates["Redis"] / redis_at_a_time,
        "speedup_redis_nothing_cached": rates["Redis, nothing cached"] / redis_at_a_time,
    }


def contestant(served: world.World, seconds: float, turn: int, store: str = world.SQLITE) -> float:
    """Rows/s of the row-at-a-time pipeline, over a topic like the worker's."""
    topic = f"at-a-time-{store}-{turn}"
    make_topics(served, topic, "at-a-time")
    fill(served, topic, world.records(50 * BATCH, BATCH, turn, now_ms()))
    words = ["record-at-a-time", "--folder", served.folder, "--store", store]
    words += ["--kafka", served.kafka, "--triton", served.triton, "--topic", topic, "--seconds", seconds]
    return float(child(words, seconds + 90)["rows_per_s"])


@dataclass(frozen=True)
class Drained:
    """What workers did with a filled topic."""

    rows_per_s: float
    cpu_s_per_row: float


def drained(
    served: world.World,
    rows: int,
    *,
    workers: int,
    seed: int,
    size: int = BATCH,
    arguments: Sequence[str] = (),
    store: str = world.SQLITE,
) -> Drained:
    """Fills the topic while the workers, warm, are stopped; then lets them go and waits for the last commit.

    Raises:
        StackError: not every row was answered exactly once, and well.
    """
    with contextlib.ExitStack() as stack:
        services = [served.worker(*NO_DEADLINE, *arguments, store=store) for _ in range(workers)]
        processes = [Process(service, served.folder / "logs") for service in services]
        for process in processes:
            stack.callback(process.stop)
        for process in processes:
            process.wait_ready()
        balanced(served, workers)
        drain_once(served, 8 * BATCH, size, seed + 1_000_000, processes)  # the first of each stage is slow
        return drain_once(served, rows, size, seed, processes)


def drain_once(served: world.World, rows: int, size: int, seed: int, processes: Sequence[Process]) -> Drained:
    """One filling."""
    filled = world.records(rows, size, seed, now_ms())
    answers = ends(served, Predictions.TOPIC)
    watched = [psutil.Process(process.pid) for process in processes]
    for process in watched:
        process.suspend()
    try:
        fill(served, DeviceEmbeddings.TOPIC, filled)
        before = [process.cpu_times() for process in watched]
        begun = time.time()
    finally:
        for process in watched:
            process.resume()
    wait_until(lambda: behind(served) == 0, 300)
    after = [process.cpu_times() for process in watched]
    cpu = sum(b.user + b.system - a.user - a.system for a, b in zip(before, after, strict=True))
    last = check_answers(served, answers, rows)
    return Drained(rows / (last - begun), cpu / rows)


def check_answers(served: world.World, since: Mapping[Any, int], rows: int) -> float:
    """When the last answer was written, in Unix seconds.

    Raises:
        StackError: see `drained`.
    """
    upto, messages, last = ends(served, Predictions.TOPIC), [], 0.0
    consumer = kafka.KafkaConsumer(bootstrap_servers=served.kafka, enable_auto_commit=False)
    with contextlib.closing(consumer):
        consumer.assign(list(upto))
        for place, offset in since.items():
            consumer.seek(place, offset)
        while any(consumer.position(place) < upto[place] for place in upto):
            for records in consumer.poll(timeout_ms=1000).values():
                messages += [Predictions.from_bytes(record.value) for record in records]
                last = max(last, *(record.timestamp / 1000 for record in records))
    ids = np.concatenate([message.request_id for message in messages])
    status = np.concatenate([message.status for message in messages])
    if len(ids) != rows or len(np.unique(ids)) != rows or set(status) != {"ok"}:
        raise StackError(f"{rows} rows must be answered once and well, got {len(ids)} answers, {set(status)}")
    return last


def bare_triton(served: world.World, seconds: float) -> float:
    """Rows/s of tower and head at `BATCH` rows a call, with as many callers as do best."""
    return max(_bare_triton(served, seconds / 3, callers) for callers in (1, 2, 4))


def _bare_triton(served: world.World, seconds: float, callers: int) -> float:
    deployment, done = served.deployment, [0] * callers
    end = time.perf_counter() + seconds
    slots = np.zeros((BATCH, len(deployment.server) + len(deployment.request)), np.float32)
    device = np.zeros((BATCH, deployment.device_embedding), np.float32)

    def call(place: int) -> None:
        with Triton(TritonAddress(served.triton)) as models:
            while time.perf_counter() < end:
                server = models.infer(deployment.server_tower, deployment.version, {"slots": slots}, "embedding")
                models.infer(deployment.head, deployment.version, {"server": server, "device": device}, "prediction")
                done[place] += BATCH

    threads = [threading.Thread(target=call, args=(place,)) for place in range(callers)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - begun)


def fill(served: world.World, topic: str, records: Sequence[bytes]) -> None:
    """Writes records evenly over the topic's partitions."""
    producer = kafka.KafkaProducer(bootstrap_servers=served.kafka, linger_ms=5, batch_size=1 << 18)
    with contextlib.closing(producer):
        partitions = PARTITIONS.get(topic, 1)
        for number, value in enumerate(records):
            producer.send(topic, value, partition=number % partitions)
        producer.flush()


def make_topics(served: world.World, *names: str) -> None:
    """Topics of one partition each, unless they are there."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=served.kafka)
    with contextlib.closing(admin):
        absent = set(names) - set(admin.list_topics())
        if absent:
            admin.create_topics({name: {"num_partitions": 1} for name in absent}, wait_for_metadata=True)


def ends(served: world.World, topic: str) -> dict[Any, int]:
    """Where each partition of a topic ends."""
    consumer = kafka.KafkaConsumer(bootstrap_servers=served.kafka, enable_auto_commit=False)
    with contextlib.closing(consumer):
        places = [kafka.TopicPartition(topic, partition) for partition in range(PARTITIONS[topic])]
        return dict(consumer.end_offsets(places))


def behind(served: world.World) -> int:
    """Records of the workers' topic that the group has not committed."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=served.kafka)
    with contextlib.closing(admin):
        committed = admin.list_group_offsets([GROUP])[GROUP]
    return sum(
        end - (committed[place].offset if place in committed else 0)
        for place, end in ends(served, DeviceEmbeddings.TOPIC).items()
    )


def balanced(served: world.World, workers: int) -> None:
    """Waits until the group has given each worker its share."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=served.kafka)

    def shared() -> bool:
        group = admin.describe_groups([GROUP])[GROUP]
        members = group["members"]
        return group["group_state"] == "Stable" and len(members) == workers

    with contextlib.closing(admin):
        wait_until(shared, 60)


# Clients -----------------------------------------------------------------------------------------


def clients(served: world.World, lengths: Lengths, rows: list[dict[str, Any]], figures: dict[str, float]) -> None:
    """The whole path, closed loop."""
    (plain_port,) = free_ports(1)
    arguments = ["--folder", str(served.folder), "--triton", served.triton, "--port", str(plain_port)]
    ratios = []
    for turn in range(lengths.turns):
        with served.running(served.contestant("http-at-a-time", *arguments)):
            plain = closed(served, plain_port, lengths.clients_s)
        with product(served) as (port, _):
            ours = closed(served, port, lengths.clients_s)
        ratios.append(ours["requests_per_s"] / plain["requests_per_s"])
        row = {"part": f"{CLIENTS} HTTP clients, requests/s", "turn": turn + 1}
        rows.append(row | {"at a time": plain["requests_per_s"], "one worker": ours["requests_per_s"]})
        rows[-1] |= {"errors": plain["errors"] + ours["errors"], "end_to_end_speedup": ratios[-1]}
    figures["end_to_end_speedup"] = statistics.median(ratios)


@contextlib.contextmanager
def product(served: world.World) -> Iterator[tuple[int, dict[str, Process]]]:
    """A gateway's port, and the processes: one gateway, one worker."""
    service = served.gateway()
    with served.running(service) as gateway, served.running(served.worker()) as worker:
        yield service.ports["http"], {"gateway": gateway, "worker": worker}


def closed(served: world.World, port: int, seconds: float) -> dict[str, Any]:
    """`CLIENTS` over HTTP."""
    words = ["load", "--transport", "http", "--target", f"127.0.0.1:{port}", "--clients", CLIENTS]
    return child([*words, "--seconds", seconds], seconds + 60)


# Latency -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Front:
    """A way in, measured in the open loop.

    Attributes:
        transport: the load generator's, see `benchmarks.serving_process.TRANSPORTS`; of a port of the gateway's.
        model: declared to be served over Kafka, or directly.
    """

    transport: str
    model: str


FRONTS = {
    "HTTP and Kafka": Front("http", world.MODEL),
    "gRPC and Kafka": Front("grpc", world.MODEL),
    "HTTP, direct": Front("http", world.DIRECT),
    "gRPC, direct": Front("grpc", world.DIRECT),
}


def latency(served: world.World, lengths: Lengths, rows: list[dict[str, Any]], figures: dict[str, float]) -> None:
    """Open loop, over each front, and the floors."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    seconds = lengths.latency_s
    make_topics(served, "bare", "bare-reply")
    with contextlib.ExitStack() as stack:
        stack.enter_context(served.running(served.worker()))
        stack.enter_context(served.running(served.contestant("echo", "--kafka", served.kafka, "--topic", "bare")))
        gateway = served.gateway()
        stack.enter_context(served.running(gateway))
        targets = {
            name: [front.transport, "--model", front.model, "--target", f"127.0.0.1:{gateway.ports[front.transport]}"]
            for name, front in FRONTS.items()
        }
        targets["bare Kafka"] = ["kafka", "--kafka", served.kafka, "--topic", "bare"]
        targets["bare Triton"] = ["triton", "--target", served.triton, "--folder", str(served.folder)]
        for rate in RATES:
            for name, target in targets.items():
                words = ["load", "--transport", *target, "--rate", rate, "--seconds", seconds]
                found[name, rate] = child(words, seconds + 90)
                rows.append({"part": f"{name} at {rate}/s, ms"} | found[name, rate])
    figures["kafka_p50_ratio_50"] = found["HTTP and Kafka", 50]["p50_ms"] / found["bare Kafka", 50]["p50_ms"]
    figures["kafka_p99_ratio_500"] = found["HTTP and Kafka", 500]["p99_ms"] / found["bare Kafka", 500]["p99_ms"]
    figures["direct_p50_ratio"] = found["gRPC, direct", 50]["p50_ms"] / found["bare Triton", 50]["p50_ms"]
    figures["direct_p50_ratio_http"] = found["HTTP, direct", 50]["p50_ms"] / found["bare Triton", 50]["p50_ms"]
    figures["errors_at_500"] = sum(found[name, 500]["errors"] for name in FRONTS)


# Soak --------------------------------------------------------------------------------------------


def soak(served: world.World, lengths: Lengths, rows: list[dict[str, Any]], figures: dict[str, float]) -> None:
    """Memory under a steady load: at the end over after the first fifth, the worst process."""
    with product(served) as (port, processes):
        words = ["load", "--transport", "http", "--target", f"127.0.0.1:{port}", "--rate", 200]
        done: list[dict[str, Any]] = []
        seconds = lengths.soak_s
        load = threading.Thread(target=lambda: done.append(child([*words, "--seconds", seconds], seconds + 120)))
        load.start()
        load.join(seconds / 5)
        warm = {name: rss_mb(process) for name, process in processes.items()}
        load.join(seconds * 4 / 5)
        end = {name: rss_mb(process) for name, process in processes.items()}
        load.join()
    rows += [
        {"part": f"soak, {name}, MB", "after a fifth": warm[name], "at the end": end[name]} | done[0]
        for name in processes
    ]
    figures["rss_drift"] = max(end[name] / warm[name] - 1 for name in processes)


def rss_mb(process: Process) -> float:
    """Resident memory now."""
    return float(psutil.Process(process.pid).memory_info().rss / 1e6)


# Processes ---------------------------------------------------------------------------------------


def child(words: Sequence[Any], timeout_s: float) -> dict[str, Any]:
    """Runs `benchmarks.serving_process` and returns the object that it prints."""
    command = [sys.executable, "-m", "benchmarks.serving_process", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise SystemExit(f"benchmarks.serving_process {words[0]} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def wait_until(true: Callable[[], bool], timeout_s: float) -> None:
    """Asks until it is.

    Raises:
        StackError: it is not within `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            raise StackError(f"nothing came of waiting {timeout_s:g} s")
        time.sleep(0.1)


def now_ms() -> int:
    """Unix time."""
    return time.time_ns() // 1_000_000


PARTS: dict[str, Callable[[world.World, Lengths, list[dict[str, Any]], dict[str, float]], None]] = {
    "drain": drain,
    "clients": clients,
    "latency": latency,
    "soak": soak,
}

if __name__ == "__main__":
    main()
