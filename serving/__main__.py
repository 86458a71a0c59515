"""Starts serving: `python -m serving gateway` or `python -m serving worker`; `api-key` makes a key for a client."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, nullcontext
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.deployment import Deployment
from hybrid.errors import ConfigError, HybridError
from hybrid.messages import DeviceEmbeddings, Predictions
from hybrid.sealing import SealingKey
from hybrid.tracing import from_environment
from serving import processes
from serving.cache import CACHE_BYTES, REREAD_S
from serving.connection import Broker, TritonAddress, add_kafka, add_triton, kafka_of, triton_of
from serving.deployments import Deployments
from serving.exchange import DEADLINE_S

if TYPE_CHECKING:
    from serving.access import Access
    from serving.bundles import Bundles
    from serving.direct import Direct
    from serving.exchange import Limits
    from serving.merge import Reader
    from serving.results import Later
    from serving.telemetry import Telemetry

log = logging.getLogger("serving")
FROM_HOSTNAME = "from-hostname"
DRAIN_S = 10
CONNECTIONS = 512  # at once; a process has 1,024 descriptors by default, and more connections get 503
RESULTS_S, RESULTS_MB = 600.0, 256
WAITING_BYTES = 256 << 20  # of gRPC messages that were read; calls are bounded so that the largest fit


def main() -> None:
    """Reads the command line and runs the process until SIGTERM or Ctrl-C."""
    arguments = _parser().parse_args()
    _log()
    try:
        {"gateway": gateway, "worker": worker, "api-key": api_key}[arguments.process](arguments)
    except HybridError as error:
        sys.exit(f"{arguments.process}: {error}")


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("kafka").setLevel(logging.WARNING)


def gateway(arguments: argparse.Namespace) -> None:
    """Serves HTTP, and gRPC, until a signal; then finishes what waits and exits with 0, or with 1 if Kafka was lost."""
    from serving.reach import check_triton
    from serving.topics import create_topics

    if arguments.processes < 1:
        raise ConfigError(f"--processes must be at least 1, got {arguments.processes}")
    hostname = os.environ.get("HOSTNAME", "")
    first = arguments.reply_partition = _first_partition(arguments.reply_partition, arguments.processes, hostname)
    broker, triton = kafka_of(arguments), triton_of(arguments)
    _check_exposed(arguments)
    _access(arguments)  # is all as it must be? each process makes its own
    _certificate(arguments)
    _bundles(arguments)
    _later(arguments)
    _check_free(arguments.host, arguments.port, "--port")
    if arguments.grpc_port is not None:
        _check_free(arguments.host, arguments.grpc_port, "--grpc-port")
    if arguments.metrics_port is not None:
        for number in range(arguments.processes):
            _check_free(arguments.metrics_host, arguments.metrics_port + number, "--metrics-port")
    _warn_of_plaintext(broker, triton)
    partitions = create_topics(broker, arguments.kafka_partitions)
    _check_partitions(first, arguments.processes, partitions.get(Predictions.TOPIC))
    if triton is not None:
        check_triton(triton)
    if arguments.processes == 1:
        serve(arguments, first)
    else:
        processes.supervise(lambda number: _spawn(arguments, first + number), arguments.processes, drain_s=3 * DRAIN_S)


def serve(arguments: argparse.Namespace, reply_partition: int) -> None:
    """One process of the gateway."""
    import uvicorn

    from hybrid.http import BoundedHttp, allow
    from serving.exchange import Limits
    from serving.gateway import MAX_BODY_BYTES, Gateway, over_kafka

    limits = Limits(deadline_s=arguments.deadline_s)
    deployments = Deployments(arguments.deployments)
    lost = threading.Event()

    def end() -> None:
        lost.set()
        signal.raise_signal(signal.SIGTERM)

    def beside(served: Gateway) -> AbstractAsyncContextManager[object]:
        if arguments.grpc_port is None:
            return nullcontext()
        from serving.grpc_gateway import Listen, listening

        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        calls, certificate = min(CONNECTIONS, WAITING_BYTES // MAX_BODY_BYTES), _certificate(arguments)
        several = arguments.processes > 1
        return listening(served, Listen(f"{host}:{arguments.grpc_port}", calls, DRAIN_S, *certificate, several))

    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn repeats the signal once it has shut down
        signal.signal(number, lambda *_: sys.exit("gateway: the connection to Kafka is lost" if lost.is_set() else 0))
    with _telemetry(arguments, deployments, reply_partition - arguments.reply_partition) as telemetry:
        app = over_kafka(
            kafka_of(arguments),
            reply_partition,
            deployments,
            _now_ms,
            limits,
            on_loss=end,
            telemetry=telemetry,
            direct=_direct(arguments, limits, telemetry),
            key=_key(arguments),
            exactly_once=arguments.exactly_once,
            access=_access(arguments),
            bundles=_bundles(arguments),
            later=_later(arguments),
            beside=beside,
        )
        config = uvicorn.Config(
            app,
            host=arguments.host,
            port=arguments.port,
            http=BoundedHttp,
            proxy_headers=False,  # nothing here asks for a caller's address
            ws="none",
            server_header=False,
            limit_concurrency=CONNECTIONS,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=DRAIN_S,
            ssl_certfile=arguments.tls_cert,
            ssl_keyfile=arguments.tls_key,
            ssl_ca_certs=arguments.tls_client_ca,
            ssl_cert_reqs=ssl.CERT_NONE if arguments.tls_client_ca is None else ssl.CERT_REQUIRED,
        )
        allow(2 * CONNECTIONS)  # gRPC's, too
        server = uvicorn.Server(config)
        server.run([_listening(arguments.host, arguments.port, shared=arguments.processes > 1)])
        if not server.started:
            sys.exit("gateway: it did not start; the lines above say why")


def api_key(arguments: argparse.Namespace) -> None:
    """Makes an API key: its line goes to the end of the file, the key itself to the screen, and nowhere else."""
    from serving.access import ApiKey

    key, text = ApiKey.issue(arguments.client)
    try:
        descriptor = os.open(arguments.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "a") as lines:
            lines.write(f"{key}\n")
    except OSError as error:
        raise ConfigError(f"--file {arguments.file} must be a file that can be written: {error.strerror}") from None
    print(text)


def _direct(arguments: argparse.Namespace, limits: Limits, telemetry: Telemetry) -> Direct | None:
    """The direct transport, where the gateway is told of a feature store and of Triton."""
    from serving.cache import CachedModels
    from serving.direct import Direct
    from serving.readers import Readers
    from serving.triton import Triton

    address = triton_of(arguments)
    if (arguments.feast is None) != (address is None):
        raise ConfigError("--feast and --triton must be given both or neither: the direct transport needs both")
    if address is None:
        return None
    models = CachedModels(Triton(address), arguments.cache_mb << 20)
    telemetry.watch_cache("embeddings", models)
    return Direct(Readers(_reader_in(arguments, telemetry)), models, _now_ms, limits, telemetry)


def worker(arguments: argparse.Namespace) -> None:
    """Merges until a signal; then finishes its batch, commits, leaves the group and exits with 0."""
    from serving.cache import CachedModels
    from serving.exactly_once import ExactlyOnce
    from serving.kafka import GroupInbox, Outbox, ProducerOutbox
    from serving.reach import check_triton
    from serving.request_log import RequestLog
    from serving.shadow import Shadows
    from serving.topics import PARTITIONS, create_topics
    from serving.triton import Triton
    from serving.worker import IN_FLIGHT, Pace, Worker

    if arguments.log_sample and arguments.log is None:
        raise ConfigError("--log-sample needs --log FOLDER, where the rows are kept")
    kept = RequestLog(arguments.log or Path(), arguments.log_sample)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    broker, address = kafka_of(arguments), triton_of(arguments)
    assert address is not None  # argparse asks for it
    _warn_of_plaintext(broker, address)
    partitions = PARTITIONS | create_topics(broker, arguments.kafka_partitions)
    check_triton(address)
    deployments = Deployments(arguments.deployments)
    with ExitStack() as stack:
        telemetry = stack.enter_context(_telemetry(arguments, deployments))
        triton = stack.enter_context(Triton(address))
        inbox: GroupInbox | ExactlyOnce
        outbox: Outbox
        if arguments.exactly_once:
            instance = arguments.instance or uuid.uuid4().hex
            inbox = outbox = stack.enter_context(ExactlyOnce(broker, DeviceEmbeddings.TOPIC, instance))
        else:
            outbox = stack.enter_context(ProducerOutbox(broker))
            inbox = stack.enter_context(GroupInbox(broker, DeviceEmbeddings.TOPIC, instance=arguments.instance))
        models = CachedModels(triton, arguments.cache_mb << 20)
        merging = Worker(
            inbox=inbox,
            outbox=outbox,
            deployments=deployments,
            open_reader=_reader_in(arguments, telemetry),
            models=models,
            now_ms=_now_ms,
            deadline_s=arguments.deadline_s,
            in_flight=1 if arguments.exactly_once else IN_FLIGHT,  # one transaction at a time
            pace=Pace(arguments.batch_ms / 1000),
            key=_key(arguments),
            telemetry=telemetry,
            sample=kept.sample,
            shadows=stack.enter_context(Shadows(triton, telemetry)),
            reply_partitions=partitions[Predictions.TOPIC],
        )
        telemetry.watch("hybrid_worker_lag_records", lambda: inbox.lag)
        telemetry.watch_cache("embeddings", models)

        def lacking() -> str | None:
            return "no partitions" if not inbox.assigned else None if triton.ready else "triton"

        telemetry.health.watch(lacking)

        def announce() -> None:
            gc.freeze()  # what is there by now stays: no collection need look at it again, and stop all for it
            print("ready", flush=True)

        merging.run(stopping, lambda: lacking() is None, announce)


def _reader_in(arguments: argparse.Namespace, telemetry: Telemetry) -> Callable[[Deployment], Reader]:
    """Opens the feature store for a deployment, behind its cache, which is watched."""

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
        cached = CachedReader(packed, width=width, max_bytes=arguments.cache_mb << 20, **limits)
        telemetry.watch_cache("features", cached)
        return cached

    return open_reader


def _spawn(arguments: argparse.Namespace, reply_partition: int) -> SpawnProcess:
    # Under its own name: as a part of `__main__`, a new process would not find it.
    child = importlib.import_module("serving.__main__").child
    started = multiprocessing.get_context("spawn").Process(target=child, args=(arguments, reply_partition))
    started.start()
    return started


def child(arguments: argparse.Namespace, reply_partition: int) -> None:
    """What one of several processes of the gateway does."""
    processes.end_with_parent()
    _log()
    try:
        serve(arguments, reply_partition)
    except HybridError as error:
        sys.exit(f"gateway: {error}")


def _access(arguments: argparse.Namespace) -> Access:
    """Who may ask, as the command line has it."""
    from serving.access import Access, ApiKeys, Buckets, Credentials, Jwt, KeySet, Tokens, key_source
    from serving.oip import MAX_ROWS

    given = [name for name in ("jwt_issuer", "jwt_audience", "jwt_keys") if getattr(arguments, name) is not None]
    if arguments.api_keys is not None and given:
        raise ConfigError("--api-keys and --jwt-issuer exclude each other")
    if len(given) not in (0, 3):
        raise ConfigError("--jwt-issuer, --jwt-audience and --jwt-keys must be given together")
    credentials: Credentials | None = None
    if arguments.api_keys is not None:
        credentials = ApiKeys(arguments.api_keys)
    elif given:
        algorithms = tuple(arguments.jwt_algorithms.split(","))
        settings = Jwt(arguments.jwt_issuer, arguments.jwt_audience, algorithms, arguments.jwt_scope)
        credentials = Tokens(settings, KeySet(key_source(arguments.jwt_keys), algorithms))
    requests, rows = arguments.requests_per_s, arguments.rows_per_s
    return Access(
        credentials,
        None if requests is None else Buckets(requests, max(requests, 1.0)),
        None if rows is None else Buckets(rows, max(rows, MAX_ROWS)),
    )


def _bundles(arguments: argparse.Namespace) -> Bundles | None:
    """Those that devices may fetch here; for themselves alone where a client must show a key or a certificate."""
    from serving.bundles import Bundles

    if arguments.bundles is None:
        return None
    shown = (arguments.api_keys, arguments.jwt_issuer, arguments.tls_client_ca)
    return Bundles(arguments.bundles, private=any(setting is not None for setting in shown))


def _later(arguments: argparse.Namespace) -> Later | None:
    """Answers that are fetched later, where the gateway is told of a folder for them."""
    from serving.gateway import refused
    from serving.results import Later, ResultFiles

    if arguments.results is None:
        return None
    if arguments.results_mb < 1:
        raise ConfigError(f"--results-mb must be at least 1, got {arguments.results_mb}")
    limits = {"deadline_s": arguments.deadline_s, "keep_s": arguments.results_s}
    files = ResultFiles(arguments.results, _now_ms, max_bytes=arguments.results_mb << 20, **limits)
    return Later(files, refused)


def _check_exposed(arguments: argparse.Namespace) -> None:
    """Raises ConfigError where others than this machine could ask without being asked who they are."""
    from hybrid.protocol import is_loopback

    checked = (arguments.api_keys, arguments.jwt_issuer, arguments.tls_client_ca)
    if is_loopback(arguments.host):
        return
    if all(setting is None for setting in checked):
        raise ConfigError(
            f"--host {arguments.host} can be reached by other machines, so clients must be known: "
            "give --api-keys, --jwt-issuer or --tls-client-ca, or listen on 127.0.0.1"
        )
    if arguments.tls_cert is None:
        log.warning("what clients send, their keys too, is not encrypted: give --tls-cert, unless a proxy does it")


def _warn_of_plaintext(broker: Broker, triton: TritonAddress | None) -> None:
    for what, private in (("kafka", broker.private), ("triton", triton is None or triton.private)):
        if not private:
            log.warning(
                "what crosses the network to --%s is not encrypted: give --%s-tls, unless a mesh does it", what, what
            )


def _first_partition(text: str, processes: int, hostname: str) -> int:
    """Of the topic of answers, this gateway's first; raises ConfigError where --reply-partition names none."""
    if text == FROM_HOSTNAME:
        ordinal = re.search(r"-(0|[1-9][0-9]{0,8})$", hostname)
        if ordinal is None:
            raise ConfigError(
                f"--reply-partition {FROM_HOSTNAME} needs a $HOSTNAME that ends in -NUMBER, as a StatefulSet's pods "
                f"have, got {hostname!r}"
            )
        return int(ordinal[1]) * processes
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(f"--reply-partition must be a number from 0 on, or {FROM_HOSTNAME}, got {text!r}")
    return int(text)


def _check_partitions(first: int, processes: int, partitions: int | None) -> None:
    """Raises ConfigError where the topic of answers has not one for each process; None: nobody knows how many."""
    last = first + processes - 1
    if partitions is not None and last >= partitions:
        raise ConfigError(
            f"--reply-partition and --processes must lie in the {partitions} partitions of {Predictions.TOPIC}, one "
            f"each, got {first} to {last}: give the topic more partitions, then restart workers and gateways"
        )


def _certificate(arguments: argparse.Namespace) -> tuple[tuple[bytes, bytes] | None, bytes | None]:
    """Key and chain, and the clients' CA, as PEM.

    Raises:
        ConfigError: one is there without the other, or cannot be read, or they do not fit.
    """
    chain, key, ca = arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca
    if chain is None and key is None and ca is None:
        return None, None
    if chain is None or key is None:
        raise ConfigError("--tls-cert and --tls-key must be given together, and with --tls-client-ca")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, key, password="")  # none is asked for at a terminal
        if ca is not None:
            context.load_verify_locations(ca)
        return (key.read_bytes(), chain.read_bytes()), None if ca is None else ca.read_bytes()
    except (OSError, ValueError) as error:  # also what ssl raises
        raise ConfigError(f"--tls-cert, --tls-key and --tls-client-ca must be PEM files that fit: {error}") from None


def _listening(host: str, port: int, *, shared: bool) -> socket.socket:
    """A socket bound to that place, which processes that say `shared` may have together."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


def _check_free(host: str, port: int, option: str) -> None:
    """Raises ConfigError where the port cannot be had alone: a shared one would be had with strangers too."""
    try:
        _listening(host, port, shared=False).close()
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "ports end at 65535"
        raise ConfigError(f"{option} {port} of {host} cannot be listened on: {why}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    commands = parser.add_subparsers(dest="process", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--deployments", type=Path, required=True, help="folder that `hybrid promote` writes")
    add_kafka(common)
    common.add_argument(
        "--kafka-partitions",
        type=_partitions,
        metavar="N",
        help="of the topic of requests, if it is created now: at most so many workers share it. The topic of answers "
        "gets as many, and 8 at least",
    )
    common.add_argument(
        "--deadline-s",
        type=_deadline,
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
        "--exactly-once",
        action="store_true",
        help="answers and offsets become visible together, in Kafka transactions; for gateways and workers alike. "
        "By default at least once: a repeated answer has the same request id and is dropped",
    )
    common.add_argument(
        "--dead-letter-key",
        type=Path,
        default=os.environ.get("HYBRID_DEAD_LETTER_KEY"),
        metavar="FILE",
        help="public key (`hybrid dead-letters keygen`) that seals records which cannot be read; without it their "
        "bytes are not kept; by default $HYBRID_DEAD_LETTER_KEY",
    )
    common.add_argument(
        "--metrics-port",
        type=int,
        help="answer GET /metrics there, for Prometheus; of several processes each has the next port. Spans are "
        "exported where OTEL_EXPORTER_OTLP_ENDPOINT is set",
    )
    common.add_argument("--metrics-host", default="127.0.0.1", help="who may ask: plaintext, and no key")
    fronts = commands.add_parser("gateway", parents=[common], help=gateway.__doc__)
    fronts.add_argument("--host", default="127.0.0.1")
    fronts.add_argument("--port", type=int, required=True, help="of HTTP")
    fronts.add_argument("--grpc-port", type=int, help="of gRPC; without it there is none")
    fronts.add_argument(
        "--reply-partition",
        default="0",
        metavar="NUMBER",
        help=f"of the predictions topic; one process each. {FROM_HOSTNAME}: the number at the end of $HOSTNAME, as a "
        "StatefulSet's pods have it, times --processes",
    )
    fronts.add_argument("--processes", type=int, default=1, help="on the same ports, from --reply-partition on")
    fronts.add_argument(
        "--feast", type=Path, help="folder of the feature store; for models declared transport='direct'"
    )
    add_triton(fronts, required=False)
    fronts.add_argument(
        "--bundles",
        type=Path,
        metavar="FOLDER",
        help="of device bundles, that `hybrid promote` writes; devices fetch them",
    )
    fronts.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="for answers that a request with `Prefer: respond-async` fetches later; they hold predictions. All "
        "processes on a port have the same; without it such requests are answered at once",
    )
    fronts.add_argument("--results-s", type=float, default=RESULTS_S, help="that they lie there (default %(default)g)")
    fronts.add_argument(
        "--results-mb", type=int, default=RESULTS_MB, help="of all of them; past it 429 (default %(default)s)"
    )
    _add_access(fronts)
    merging = commands.add_parser("worker", parents=[common], help=worker.__doc__)
    merging.add_argument("--feast", type=Path, required=True, help="folder of the feature store")
    add_triton(merging)
    merging.add_argument("--batch-ms", type=float, default=20.0, help="that a batch may take; under load it fills that")
    merging.add_argument(
        "--instance",
        metavar="NAME",
        help="of this worker, no other's and the same after a restart, such as a StatefulSet's pod: restarted within "
        "6 s it keeps its partitions, and with --exactly-once it ends at once what a killed one left",
    )
    merging.add_argument(
        "--log-sample",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the rows whose entity and server features are kept, for `hybrid skew`; "
        "whose they are must have agreed (default 0)",
    )
    merging.add_argument("--log", type=Path, metavar="FOLDER", help="where they are kept, readable by this user alone")
    key = commands.add_parser("api-key", help=api_key.__doc__)
    key.add_argument("client", help="whose it is: letters, digits and any of . _ @ -")
    key.add_argument("--file", type=Path, required=True, help="that the gateway has as --api-keys")
    return parser


def _deadline(text: str) -> float:
    """Seconds; a record lies in Kafka for an hour."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 3_600:
        raise argparse.ArgumentTypeError(f"must be seconds above 0, at most 3600, got {text!r}")
    return seconds


def _partitions(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _key(arguments: argparse.Namespace) -> SealingKey | None:
    return SealingKey.read(Path(arguments.dead_letter_key)) if arguments.dead_letter_key else None


def _add_access(parser: argparse.ArgumentParser) -> None:
    who = parser.add_argument_group("access", "API keys, or JWT as bearer, or neither on loopback")
    who.add_argument("--api-keys", type=Path, metavar="FILE", help="of `api-key`; read again when it changes")
    who.add_argument("--jwt-issuer", metavar="TEXT", help="the claim `iss`")
    who.add_argument("--jwt-audience", metavar="TEXT", help="the claim `aud`")
    who.add_argument("--jwt-keys", metavar="FILE|URL", help="the issuer's JWK set, as a file or an https URL")
    who.add_argument("--jwt-algorithms", default="RS256,ES256,EdDSA", metavar="LIST", help="default: %(default)s")
    who.add_argument("--jwt-scope", metavar="TEXT", help="that a token must grant")
    rates = parser.add_argument_group("rates", "of one client, in each process; past them 429 with Retry-After")
    rates.add_argument("--requests-per-s", type=float, metavar="RATE", help="a second's worth may come at once")
    rates.add_argument("--rows-per-s", type=float, metavar="RATE", help="the same; one full request always may")
    tls = parser.add_argument_group("TLS", "of both ports")
    tls.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    tls.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    tls.add_argument("--tls-client-ca", type=Path, metavar="FILE", help="clients must show a certificate of these CAs")


@contextmanager
def _telemetry(arguments: argparse.Namespace, deployments: Deployments, number: int = 0) -> Iterator[Telemetry]:
    """Metrics of this process, the `number`th, where somebody may look at them; its spans, where the environment asks.

    Raises:
        ConfigError: see `Telemetry.exposed`.
    """
    from prometheus_client import disable_created_metrics

    from serving.telemetry import Telemetry

    port = None if arguments.metrics_port is None else arguments.metrics_port + number
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside each counter
    with ExitStack() as stack:
        tracer = from_environment(f"hybrid-{arguments.process}")
        if tracer is not None:
            stack.enter_context(tracer)
        telemetry = Telemetry(tracer, lambda: [(d.model, d.version) for d in deployments.current])
        stack.enter_context(telemetry.exposed(port, arguments.metrics_host))
        yield telemetry


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    main()
