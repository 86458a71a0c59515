"""What serving tells about itself: Prometheus metrics always, OpenTelemetry spans where they are asked for.

Labels are model, version and code (or stage, kind): never an entity, a client or a
device. What no deployment of ours answers has an empty model, so that nobody can make up
a label. A record of many rows costs what a record of one does, but for a count of its columns.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version as installed
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, make_asgi_app, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from hybrid.deployment import Deployment
from hybrid.errors import ConfigError, ServingError, UnknownModel
from hybrid.http import TimedHttp, listening
from hybrid.messages import DeviceEmbeddings, Predictions
from hybrid.protocol import NONE, OK
from hybrid.tracing import Span, Tracer
from serving.health import Health, with_health

# Where Feast was imported first, it has asked for values that processes share in files; ours are one process's.
values.ValueClass = values.MutexValue

PAIR = ("model", "version")
FORWARD = "forward"  # the stage in which a batch's networks run
SCRAPERS = 16  # connections to the metrics at once
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
RECORDS = (1, 2, 4, 8, 16, 32, 64)
AGE_S = (1, 10, 60, 600, 3_600, 6 * 3_600, 86_400, 7 * 86_400, 30 * 86_400)
PREDICTIONS = tuple(round(0.05 * n, 2) for n in range(1, 20))
# Read when somebody looks, from what counts them anyway.
LIVE = {
    "hybrid_gateway_rows_in_flight": "Rows that wait for their answer.",
    "hybrid_gateway_queue_rows": "Rows that wait for company before they leave as one record.",
    "hybrid_gateway_outbox_records": "Records that wait for Kafka.",
    "hybrid_worker_lag_records": "Records of this worker's partitions that it has not polled yet.",
}
_PROCESS = f"process {DeviceEmbeddings.TOPIC}"
_KAFKA: dict[str, str | int] = {
    "messaging.system": "kafka",
    "messaging.operation.type": "process",
    "messaging.destination.name": DeviceEmbeddings.TOPIC,
}
_context: ContextVar[str | None] = ContextVar("traceparent", default=None)


@dataclass(frozen=True)
class Lap:
    """One stage of one piece of work: its name, and its start and end in Unix nanoseconds."""

    stage: str
    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end_ns - self.start_ns) / 1e9


class Cache(Protocol):
    """What a cache tells of itself: rows found and not found since the process started, and its size now."""

    @property
    def hits(self) -> int:
        """Rows that were in it."""

    @property
    def misses(self) -> int:
        """Rows that were not."""

    @property
    def bytes(self) -> int:
        """Its size."""


class Watch:
    """Times the stages of one piece of work; metrics and spans are made of it once it is done."""

    def __init__(self) -> None:
        self.laps: list[Lap] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what is done within, also where it fails."""
        start_ns, begun = time.time_ns(), time.perf_counter_ns()  # the wall clock may be set meanwhile
        try:
            yield
        finally:
            self.laps.append(Lap(name, start_ns, start_ns + time.perf_counter_ns() - begun))


class Request(Watch):
    """One request at the gateway. `Telemetry.request` makes it.

    Attributes:
        model, version: that answers; empty until `about` was told.
        rows: asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model, self.version, self.rows = "", "", 0

    def about(self, deployment: Deployment) -> None:
        """Says which pair answers it."""
        self.model, self.version = deployment.model, str(deployment.version)


class Part(Watch):
    """One batch of a worker's step.

    Attributes:
        pair: model and version that answer it.
        rows: in it.
        traces: traceparents of the traced requests with rows in it.
        attributes: of its spans.
    """

    def __init__(self, deployment: Deployment, rows: int, traces: Sequence[str]) -> None:
        super().__init__()
        self.pair, self.rows, self.traces = (deployment.model, str(deployment.version)), rows, traces
        self.attributes: dict[str, str | int] = {
            "hybrid.model": deployment.model,
            "hybrid.version": str(deployment.version),
            "hybrid.rows": rows,
        }


class Step(Watch):
    """One step of a worker: what some records have in common, and a part for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Part] = []

    def part(self, deployment: Deployment, rows: int, traces: Sequence[str]) -> Part:
        """A batch, whose own stages are timed apart."""
        self.parts.append(Part(deployment, rows, traces))
        return self.parts[-1]


def current_traceparent() -> str | None:
    """The context of the traced request that is being answered in this task; None where there is none."""
    return _context.get()


class Telemetry:
    """The metrics of one process, and its spans.

    Args:
        tracer: None: no spans.
        served: -> the (model, version) pairs that are served now.

    Attributes:
        health: of the process, told where its metrics are.
    """

    def __init__(
        self, tracer: Tracer | None = None, served: Callable[[], Iterable[tuple[str, int]]] = lambda: ()
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self.health = Health()
        self._tracer = tracer
        self._live = _Live(served)
        registry.register(self._live)
        ProcessCollector(registry=registry)
        Info("hybrid_build", "What runs.", registry=registry).info({"release": installed("hybrid-towers")})

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, edges: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=edges, registry=registry)

        self._requests = counter("hybrid_gateway_requests", 'Requests, by "ok" or why not.', *PAIR, "code")
        self._request_s = histogram("hybrid_gateway_request_seconds", "From request to answer.", SECONDS, *PAIR)
        self._gateway_s = histogram("hybrid_gateway_stage_seconds", "Of a request.", SECONDS, "stage")
        self._request_rows = histogram("hybrid_gateway_request_rows", "Rows of a request.", ROWS)
        self._record_rows = histogram("hybrid_gateway_record_rows", "Rows of a record sent.", ROWS)
        self._merge_s = histogram("hybrid_merge_stage_seconds", "Of a step or batch.", SECONDS, "stage")
        self._forward_s = histogram("hybrid_merge_forward_seconds", "Of a batch's networks.", SECONDS, *PAIR)
        self._poll_records = histogram("hybrid_merge_poll_records", "Records taken at once.", RECORDS)
        self._batch_rows = histogram("hybrid_merge_batch_rows", "Rows of a forward pass.", ROWS)
        self._rows = counter("hybrid_merge_rows", 'Rows answered, by "ok" or why not.', *PAIR, "code")
        self._age_s = ArrayHistogram("hybrid_merge_feature_age_seconds", "Of the server's features.", AGE_S, PAIR)
        self._predictions = ArrayHistogram("hybrid_merge_prediction", "Of rows that are ok.", PREDICTIONS, PAIR)
        registry.register(self._age_s)
        registry.register(self._predictions)
        self._shadow_batches = counter("hybrid_shadow_batches", 'Batches, by "ok" or why not.', *PAIR, "code")
        self._shadow_rows = counter("hybrid_shadow_rows", "Rows of them, likewise.", *PAIR, "code")
        self._shadow_s = histogram("hybrid_shadow_seconds", "Of a batch, of either.", SECONDS, *PAIR)
        self._shadow_predictions = ArrayHistogram(
            "hybrid_shadow_prediction", "Without a device, of either.", PREDICTIONS, PAIR
        )
        registry.register(self._shadow_predictions)
        self._fallbacks = counter("hybrid_fallbacks", "Rows answered by a fallback.", *PAIR, "kind")
        self._dead = counter("hybrid_dead_letters", "Records that could not be processed.", "code")

    def watch(self, name: str, read: Callable[[], float | None]) -> None:
        """Shows a number of `LIVE`, read at each look, in another thread; None shows nothing."""
        assert name in LIVE
        self._live.sources[name] = read

    def watch_cache(self, name: str, cache: Cache) -> None:
        """Shows a cache, read at each look; `name` says of what, and those of one name are shown as their sum."""
        self._live.caches.append((name, cache))

    @contextmanager
    def request(self, traceparent: str | None) -> Iterator[Request]:
        """Counts and times one request, whatever comes of it; `traceparent` as the caller sent it."""
        asking, code, started = Request(), OK, time.perf_counter()
        span = self._tracer and self._tracer.begin("infer", "SERVER", parent=traceparent)
        token = _context.set(span.traceparent if span else None)
        try:
            yield asking
        except ServingError as error:
            code = error.code
            raise
        except Exception:
            code = ServingError.code
            raise
        except BaseException:  # the caller has gone, or the gateway stops
            code = "cancelled"
            raise
        finally:
            _context.reset(token)
            self._asked(asking, code, time.perf_counter() - started)
            if self._tracer and span:
                self._end(self._tracer, span, asking, code)

    def sent(self, rows: int) -> None:
        """Counts a record that left the gateway."""
        self._record_rows.observe(rows)

    def answered(self, message: Predictions) -> None:
        """Counts an answer's rows by status and by what fell back, how old their features were, and predictions."""
        pair = message.model, str(message.version)
        for code, rows in Tally(message.status.tolist()).items():
            known = pair if code != UnknownModel.code else ("", "")  # else whoever writes to the topic makes labels
            self._rows.labels(*known, code).inc(rows)
        for kind, rows in Tally(message.fallback.tolist()).items():
            if kind != NONE:  # nothing falls back for a model that is not known
                self._fallbacks.labels(*pair, kind).inc(rows)
        aged = message.feature_age_ms[message.feature_age_ms >= 0]
        if len(aged):
            self._age_s.observe(aged / 1000, pair)
        predicted = message.prediction[(message.status == OK) & np.isfinite(message.prediction)]
        if len(predicted):
            self._predictions.observe(predicted, pair)

    def shadowed(
        self,
        deployment: Deployment,
        rows: int,
        code: str,
        seconds: float | None = None,
        prediction: NDArray[np.float32] | None = None,
    ) -> None:
        """Counts what a shadow, or the default beside it, made of one batch.

        Args:
            deployment: which of them.
            rows: of the batch.
            code: "ok" or why not.
            seconds: that it took; None: it did not run.
            prediction: (rows,) without a device; None: there are none to compare.
        """
        pair = deployment.model, str(deployment.version)
        self._shadow_batches.labels(*pair, code).inc()
        self._shadow_rows.labels(*pair, code).inc(rows)
        if seconds is not None:
            self._shadow_s.labels(*pair).observe(seconds)
        if prediction is not None:
            self._shadow_predictions.observe(prediction, pair)

    def dead_letter(self, code: str) -> None:
        """Counts a record that could not be processed."""
        self._dead.labels(code).inc()

    def stepped(self, step: Step, records: int) -> None:
        """Counts and times one step of a worker: see `merged`."""
        self._poll_records.observe(records)
        self.merged(step)

    def merged(self, step: Step) -> None:
        """Counts and times batches; where they are traced, their spans go into each trace."""
        for part in step.parts:
            self._batch_rows.observe(part.rows)
            for lap in part.laps:
                if lap.stage == FORWARD:  # of each version apart, since batches of all wait for one another
                    self._forward_s.labels(*part.pair).observe(lap.seconds)
        for lap in (*step.laps, *(lap for part in step.parts for lap in part.laps)):
            self._merge_s.labels(lap.stage).observe(lap.seconds)
        if self._tracer:
            for part in step.parts:
                self._trace(self._tracer, part, step.laps)

    @contextmanager
    def exposed(self, port: int | None, host: str = "127.0.0.1") -> Iterator[int | None]:
        """Answers `GET /metrics` there, and probes, from a thread of its own; does nothing where `port` is None.

        Yields:
            The port; another than 0.

        Raises:
            ConfigError: the port cannot be used.
        """
        if port is None:
            yield None
            return
        # prometheus_client's own server has a thread for each connection, and waits for what it says for ever.
        options: dict[str, Any] = {"http": TimedHttp, "lifespan": "off", "limit_concurrency": SCRAPERS}
        with ExitStack() as stack:
            try:
                app = with_health(make_asgi_app(self.registry), self.health)
                bound = stack.enter_context(listening(app, host, port, name="metrics", **options))
            except ConfigError as error:
                raise ConfigError(f"--metrics-port must be a free port, got {port}: {error}") from None
            yield bound

    def _asked(self, asking: Request, code: str, seconds: float) -> None:
        pair = asking.model, asking.version
        self._requests.labels(*pair, code).inc()
        self._request_s.labels(*pair).observe(seconds)
        if asking.rows:
            self._request_rows.observe(asking.rows)
        for lap in asking.laps:
            self._gateway_s.labels(lap.stage).observe(lap.seconds)

    def _end(self, tracer: Tracer, span: Span, asking: Request, code: str) -> None:
        if span.traceparent:
            _children(tracer, span.traceparent, asking.laps)
        about: dict[str, str | int] = {"hybrid.code": code, "hybrid.rows": asking.rows}
        if asking.model:
            about |= {"hybrid.model": asking.model, "hybrid.version": asking.version}
        span.end(about, None if code == OK else code)

    def _trace(self, tracer: Tracer, part: Part, shared: Sequence[Lap]) -> None:
        """A batch's spans in the trace of each of its requests.

        A span has one parent, a batch has many. As the conventions say, its span has a link for
        each of them: that of the first request; and each other has a copy with a link to that one.
        """
        if not part.traces:
            return
        first, *others = part.traces
        laps = sorted((*(lap for lap in shared if lap.stage != "poll"), *part.laps), key=lambda lap: lap.start_ns)
        links = others
        for parent in (first, *others):
            span = tracer.begin(_PROCESS, "CONSUMER", parent=parent, links=links, start_ns=laps[0].start_ns)
            if span.traceparent:
                _children(tracer, span.traceparent, laps)
                links = [span.traceparent] if parent is first else links
            span.end(_KAFKA | part.attributes, end_ns=max(lap.end_ns for lap in laps))


class ArrayHistogram:
    """A Prometheus histogram that takes arrays: counting n values is one pass in NumPy.

    Args:
        name, text: of the metric.
        edges: of the buckets, ascending.
        labels: their names.
    """

    def __init__(self, name: str, text: str, edges: Sequence[float], labels: Sequence[str]) -> None:
        self._name, self._text, self._edges, self._labels = name, text, np.asarray(edges, np.float64), labels
        self._counts: dict[tuple[str, ...], NDArray[np.int64]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        self._lock = Lock()

    def observe(self, values: NDArray[Any], labels: tuple[str, ...]) -> None:
        """Counts (n,) values under `labels`."""
        places = np.searchsorted(self._edges, values, side="left")  # a bucket holds its upper edge
        counted, total = np.bincount(places, minlength=len(self._edges) + 1), float(values.sum())
        with self._lock:
            self._counts[labels] = self._counts.get(labels, 0) + counted
            self._sums[labels] = self._sums.get(labels, 0.0) + total

    def collect(self) -> Iterator[Metric]:
        """What `CollectorRegistry` asks for."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        bounds = [*map(str, self._edges.tolist()), "+Inf"]
        with self._lock:
            for labels, counts in self._counts.items():
                buckets = list(zip(bounds, np.cumsum(counts).tolist(), strict=True))
                family.add_metric(labels, buckets, self._sums[labels])
        yield family


class _Live:
    """Numbers that are read when somebody looks."""

    def __init__(self, served: Callable[[], Iterable[tuple[str, int]]]) -> None:
        self._served = served
        self.sources: dict[str, Callable[[], float | None]] = {}
        self.caches: list[tuple[str, Cache]] = []

    def collect(self) -> Iterator[Metric]:
        versions = GaugeMetricFamily("hybrid_served_version", "1 for each version served.", labels=PAIR)
        for model, version in self._served():
            versions.add_metric((model, str(version)), 1)
        yield versions
        for name, read in self.sources.items():
            value = read()
            if value is not None:
                yield GaugeMetricFamily(name, LIVE[name], value=value)
        yield from self._of_caches()

    def _of_caches(self) -> Iterator[Metric]:
        hits = CounterMetricFamily("hybrid_cache_hits", "Rows found in a cache.", labels=["cache"])
        misses = CounterMetricFamily("hybrid_cache_misses", "Rows that were not in a cache.", labels=["cache"])
        size = GaugeMetricFamily("hybrid_cache_bytes", "Size of a cache.", labels=["cache"])
        for name in dict.fromkeys(name for name, _ in self.caches):
            caches = [cache for each, cache in self.caches if each == name]
            hits.add_metric([name], sum(cache.hits for cache in caches))
            misses.add_metric([name], sum(cache.misses for cache in caches))
            size.add_metric([name], sum(cache.bytes for cache in caches))
        yield from (hits, misses, size)


def _children(tracer: Tracer, parent: str, laps: Iterable[Lap]) -> None:
    for lap in laps:
        tracer.begin(lap.stage, parent=parent, start_ns=lap.start_ns).end({}, end_ns=lap.end_ns)
