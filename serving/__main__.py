"""Starts one process of serving: `python -m serving gateway` or `python -m serving worker`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.deployment import Deployment
from hybrid.errors import ConfigError, HybridError
from hybrid.messages import DeviceEmbeddings, Predictions
from hybrid.tracing import from_environment
from serving.deployments import Deployments
from serving.exchange import DEADLINE_S

if TYPE_CHECKING:
    from serving.telemetry import Telemetry

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

    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn repeats the signal once it has shut down
        signal.signal(number, lambda *_: sys.exit("gateway: the connection to Kafka is lost" if lost.is_set() else 0))
    with _telemetry(arguments, deployments) as telemetry:
        app = over_kafka(
            arguments.kafka, arguments.reply_partition, deployments, _now_ms, limits, on_loss=end, telemetry=telemetry
        )
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


def worker(arguments: argparse.Namespace) -> None:
    """Merges until a signal; then finishes its batch, commits, leaves the group and exits with 0."""
    from feature_store.online import PackedReader
    from serving.kafka import GroupInbox, ProducerOutbox, create_topics
    from serving.request_log import RequestLog
    from serving.triton import Triton
    from serving.worker import Worker

    def open_reader(deployment: Deployment) -> PackedReader:
        return PackedReader(
            arguments.feast,
            packed_view=deployment.packed_view,
            join_key=deployment.join_key,
            join_key_type=deployment.join_key_type,
            schema_hash=deployment.server.schema_hash,
            max_age_s=deployment.max_feature_age_s,
            width=len(deployment.server),
        )

    if arguments.log_sample and arguments.log is None:
        raise ConfigError("--log-sample needs --log FOLDER, where the rows are kept")
    kept = RequestLog(arguments.log or Path(), arguments.log_sample)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    create_topics(arguments.kafka)
    deployments = Deployments(arguments.deployments)
    with (
        _telemetry(arguments, deployments) as telemetry,
        Triton(arguments.triton) as triton,
        ProducerOutbox(arguments.kafka) as outbox,
        GroupInbox(arguments.kafka, DeviceEmbeddings.TOPIC) as inbox,
    ):
        merging = Worker(
            inbox=inbox,
            outbox=outbox,
            deployments=deployments,
            open_reader=open_reader,
            models=triton,
            now_ms=_now_ms,
            deadline_s=arguments.deadline_s,
            telemetry=telemetry,
            sample=kept.sample,
        )
        telemetry.watch("hybrid_worker_lag_records", lambda: inbox.lag)
        merging.run(stopping, lambda: inbox.assigned and triton.ready, lambda: print("ready", flush=True))


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
        "--metrics-port",
        type=int,
        help="answer GET /metrics there, for Prometheus; each process has its own. Spans are exported where "
        "OTEL_EXPORTER_OTLP_ENDPOINT is set",
    )
    common.add_argument("--metrics-host", default="127.0.0.1", help="who may ask: plaintext, and no key")
    http = processes.add_parser("gateway", parents=[common], help=gateway.__doc__)
    http.add_argument("--host", default="127.0.0.1")
    http.add_argument("--port", type=int, required=True)
    http.add_argument("--reply-partition", type=int, default=0, help="of the predictions topic; one gateway each")
    http.set_defaults(run=gateway)
    merging = processes.add_parser("worker", parents=[common], help=worker.__doc__)
    merging.add_argument("--feast", type=Path, required=True, help="folder of the feature store")
    merging.add_argument("--triton", required=True, metavar="HOST:PORT", help="its gRPC endpoint")
    merging.add_argument(
        "--log-sample",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the rows whose entity and server features are kept, for `hybrid skew`; "
        "whose they are must have agreed (default 0)",
    )
    merging.add_argument("--log", type=Path, metavar="FOLDER", help="where they are kept, readable by this user alone")
    merging.set_defaults(run=worker)
    return parser


@contextmanager
def _telemetry(arguments: argparse.Namespace, deployments: Deployments) -> Iterator[Telemetry]:
    """Metrics of this process, where somebody may look at them, and its spans, where the environment asks for them."""
    from prometheus_client import disable_created_metrics

    from serving.telemetry import Telemetry

    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside each counter
    with ExitStack() as stack:
        tracer = from_environment(f"hybrid-{arguments.process}")
        if tracer is not None:
            stack.enter_context(tracer)
        telemetry = Telemetry(tracer, lambda: [(d.model, d.version) for d in deployments.current.values()])
        stack.enter_context(telemetry.exposed(arguments.metrics_port, arguments.metrics_host))
        yield telemetry


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    main()
