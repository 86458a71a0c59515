"""Starts one process of serving: `python -m serving gateway` or `python -m serving worker`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.deployment import Deployment
from hybrid.errors import ConfigError, HybridError
from hybrid.messages import DeviceEmbeddings, Predictions
from hybrid.sealing import SealingKey
from serving.cache import CACHE_BYTES, REREAD_S
from serving.deployments import Deployments
from serving.exchange import DEADLINE_S

if TYPE_CHECKING:
    from serving.direct import Direct
    from serving.exchange import Limits
    from serving.merge import Reader

log = logging.getLogger("serving")
DRAIN_S = 10
CONNECTIONS = 512  # at once; a process has 1,024 descriptors by default, and more connections get 503


def main() -> None:
    """Reads the command line and runs the process until SIGTERM or Ctrl-C."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("kafka").setLevel(logging.WARNING)
    try:
        arguments.run(arguments)
    except HybridError as error:
        sys.exit(f"{arguments.process}: {error}")


def gateway(arguments: argparse.Namespace) -> None:
    """Serves HTTP until a signal; then finishes what waits and exits with 0, or with 1 if Kafka was lost."""
    import uvicorn

    from serving.exchange import Limits
    from serving.gateway import over_kafka
    from serving.kafka import PARTITIONS, create_topics

    if not 0 <= arguments.reply_partition < PARTITIONS[Predictions.TOPIC]:
        highest = PARTITIONS[Predictions.TOPIC] - 1
        raise ConfigError(f"--reply-partition must be from 0 to {highest}, got {arguments.reply_partition}")
    create_topics(arguments.kafka)
    limits = Limits(deadline_s=arguments.deadline_s)
    deployments = Deployments(arguments.deployments)
    lost = threading.Event()

    def end() -> None:
        lost.set()
        signal.raise_signal(signal.SIGTERM)

    app = over_kafka(
        arguments.kafka,
        arguments.reply_partition,
        deployments,
        _now_ms,
        limits,
        on_loss=end,
        direct=_direct(arguments, limits),
        key=_key(arguments),
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn repeats the signal once it has shut down
        signal.signal(number, lambda *_: sys.exit("gateway: the connection to Kafka is lost" if lost.is_set() else 0))
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        http="h11",  # bounds the headers that it keeps; httptools does not
        ws="none",
        limit_concurrency=CONNECTIONS,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=DRAIN_S,
    )


def _direct(arguments: argparse.Namespace, limits: Limits) -> Direct | None:
    """The direct transport, where the gateway is told of a feature store and of Triton."""
    from serving.cache import CachedModels
    from serving.direct import Direct
    from serving.readers import Readers
    from serving.triton import Triton

    if (arguments.feast is None) != (arguments.triton is None):
        raise ConfigError("--feast and --triton must be given both or neither: the direct transport needs both")
    if arguments.feast is None:
        return None
    models = CachedModels(Triton(arguments.triton), arguments.cache_mb << 20)
    return Direct(Readers(_reader_in(arguments)), models, _now_ms, limits)


def worker(arguments: argparse.Namespace) -> None:
    """Merges until a signal; then finishes its batch, commits, leaves the group and exits with 0."""
    from serving.cache import CachedModels
    from serving.kafka import GroupInbox, ProducerOutbox, create_topics
    from serving.triton import Triton
    from serving.worker import IN_FLIGHT, Pace, Worker

    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    create_topics(arguments.kafka)
    with (
        Triton(arguments.triton) as triton,
        ProducerOutbox(arguments.kafka) as outbox,
        GroupInbox(arguments.kafka, DeviceEmbeddings.TOPIC) as inbox,
    ):
        merging = Worker(
            inbox=inbox,
            outbox=outbox,
            deployments=Deployments(arguments.deployments),
            open_reader=_reader_in(arguments),
            models=CachedModels(triton, arguments.cache_mb << 20),
            now_ms=_now_ms,
            deadline_s=arguments.deadline_s,
            in_flight=IN_FLIGHT,
            pace=Pace(arguments.batch_ms / 1000),
            key=_key(arguments),
        )
        merging.run(stopping, lambda: inbox.assigned and triton.ready, lambda: print("ready", flush=True))


def _reader_in(arguments: argparse.Namespace) -> Callable[[Deployment], Reader]:
    """Opens the feature store for a deployment, behind its cache."""

    def open_reader(deployment: Deployment) -> Reader:
        from feature_store.online import PackedReader
        from serving.cache import CachedReader

        width, max_age_s = len(deployment.server), deployment.max_feature_age_s
        packed = PackedReader(
            arguments.feast,
            packed_view=deployment.packed_view,
            join_key=deployment.join_key,
            join_key_type=deployment.join_key_type,
            schema_hash=deployment.server.schema_hash,
            max_age_s=max_age_s,
            width=width,
        )
        limits = {"reread_s": arguments.reread_s, "max_age_s": max_age_s}
        return CachedReader(packed, width=width, max_bytes=arguments.cache_mb << 20, **limits)

    return open_reader


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    processes = parser.add_subparsers(dest="process", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--deployments", type=Path, required=True, help="folder that `hybrid promote` writes")
    common.add_argument("--kafka", required=True, metavar="HOST:PORT")
    common.add_argument(
        "--deadline-s",
        type=float,
        default=DEADLINE_S,
        help="from a request to its answer; gateway's and worker's agree",
    )
    common.add_argument(
        "--reread-s",
        type=float,
        default=REREAD_S,
        help="how late a materialised change may be seen; 0 reads the store for every row",
    )
    common.add_argument(
        "--cache-mb", type=int, default=CACHE_BYTES >> 20, help="of features and of embeddings, each, per version"
    )
    common.add_argument(
        "--dead-letter-key",
        type=Path,
        default=os.environ.get("HYBRID_DEAD_LETTER_KEY"),
        metavar="FILE",
        help="public key (`hybrid dead-letters keygen`) that seals records which cannot be read; without it their "
        "bytes are not kept; by default $HYBRID_DEAD_LETTER_KEY",
    )
    http = processes.add_parser("gateway", parents=[common], help=gateway.__doc__)
    http.add_argument("--host", default="127.0.0.1")
    http.add_argument("--port", type=int, required=True)
    http.add_argument("--reply-partition", type=int, default=0, help="of the predictions topic; one gateway each")
    http.add_argument("--feast", type=Path, help="folder of the feature store; for models declared transport='direct'")
    http.add_argument("--triton", metavar="HOST:PORT", help="Triton's gRPC endpoint; for the same")
    http.set_defaults(run=gateway)
    merging = processes.add_parser("worker", parents=[common], help=worker.__doc__)
    merging.add_argument("--feast", type=Path, required=True, help="folder of the feature store")
    merging.add_argument("--triton", required=True, metavar="HOST:PORT", help="its gRPC endpoint")
    merging.add_argument("--batch-ms", type=float, default=20.0, help="that a batch may take; under load it fills that")
    merging.set_defaults(run=worker)
    return parser


def _key(arguments: argparse.Namespace) -> SealingKey | None:
    return SealingKey.read(Path(arguments.dead_letter_key)) if arguments.dead_letter_key else None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    main()
