"""The inference client: embeds each row on the device, releases the embedding, asks the gateway.

What leaves the process is built in one place, `request_body`: the entity, the
request features and the embedding as released. Nothing else of a row does.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from device_runtime.program import EmbedProgram
from device_runtime.store import Rows
from hybrid.bundle import Manifest
from hybrid.errors import ConfigError, HybridError, Overloaded, ServingError, Unavailable
from hybrid.privacy.mechanisms import NoiseSource, SystemNoise, clip_and_noise
from hybrid.protocol import (
    DEVICE_EMBEDDING,
    ENTITY,
    FEATURE_AGE_MS,
    HEADER_LENGTH,
    MERGED,
    PREDICTION,
    VERSION,
)
from hybrid.spec import Noised
from hybrid.tracing import TRACEPARENT, Tracer, new_traceparent

ATTEMPTS = 3
TIMEOUT_S = 10.0  # beyond a gateway's deadline of 5 s, whose answer says why
BACKOFF_S = 0.05  # before the second attempt; doubles
# What a retry may find gone. Stale features and drift, 503 as well, stay so; a rate limit does for longer than we wait.
PASSING = frozenset({(Unavailable.status, Unavailable.code), (Overloaded.status, Overloaded.code)})
_RANDOM = secrets.SystemRandom()


@dataclass(frozen=True)
class Answer:
    """What became of one row's request: a prediction, or why there is none.

    Attributes:
        device, row: whose.
        status: "ok", a `ServingError` code from the gateway, or, where it gave no
            answer that can be used, "unreachable", "timeout" or "bad_answer".
        http_status: of the last answer; 0 without one.
        prediction: probability; NaN unless ok.
        version: that predicted; -1 unless ok.
        feature_age_ms: of the server's features when merged; -1 unless ok.
        merged: where the embeddings met; "" unless ok.
        latency_ms: from the row's inputs to the answer, retries included.
        attempts: requests sent; 1 to 3.
        error: one sentence; "" where ok.
    """

    device: int
    row: int
    status: str
    http_status: int = 0
    prediction: float = math.nan
    version: int = -1
    feature_age_ms: int = -1
    merged: str = ""
    latency_ms: float = 0.0
    attempts: int = 0
    error: str = ""


class Results(AbstractContextManager["Results"]):
    """Answers on their way to a Parquet file, one column per field of `Answer`, and their summary.

    The file is complete once the context ends, however it ends.

    Args:
        file: replaced.
        batch: rows per row group.
    """

    def __init__(self, file: Path, *, batch: int = 4096) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
        self._schema = pa.schema([(name, kinds[str(kind)]) for name, kind in Answer.__annotations__.items()])
        self._writer = pq.ParquetWriter(file, self._schema)
        self._batch = batch
        self._waiting: list[Answer] = []
        self._statuses: Counter[str] = Counter()
        self._latencies: list[float] = []

    def add(self, answer: Answer) -> None:
        """Takes one answer."""
        self._waiting.append(answer)
        self._statuses[answer.status] += 1
        self._latencies.append(answer.latency_ms)
        if len(self._waiting) >= self._batch:
            self._flush()

    def summary(self) -> dict[str, Any]:
        """Counts by status and the latency's quantiles in milliseconds."""
        p50, p99 = np.quantile(self._latencies, [0.5, 0.99]).tolist() if self._latencies else (None, None)
        unanswered = sum(self._statuses[status] for status in ("unreachable", "timeout", "bad_answer"))
        return {
            "requests": self._statuses.total(),
            "answered": self._statuses.total() - unanswered,
            "predicted": self._statuses["ok"],
            "statuses": dict(self._statuses),
            "latency_ms": {"p50": p50, "p99": p99},
        }

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            batch = pa.RecordBatch.from_pylist([vars(answer) for answer in self._waiting], schema=self._schema)
            self._writer.write_batch(batch)
            self._waiting.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()


@dataclass
class RetryBudget:
    """Keeps retries from multiplying an outage: a tenth of the requests, and a few to start with."""

    tokens: float = 10.0
    share: float = 0.1

    def sent(self) -> None:
        """Counts a first attempt."""
        self.tokens += self.share

    def spend(self) -> bool:
        """Whether one more retry may be sent; if so, it is counted."""
        allowed = self.tokens >= 1
        self.tokens -= allowed
        return allowed


class InferenceClient:
    """Asks a gateway for predictions, as many devices from one process.

    Args:
        manifest: of the verified bundle; a request names its version.
        program: of the same bundle.
        gateway: base URL.
        timeout_s: for one attempt, > 0.
        noise: for release=Noised; the operating system's unless a test says otherwise.
        trace_share: share of the requests, in [0, 1], that carry a new random trace context,
            which joins what gateway and worker record of that one request, its retries included.
        tracer: exports a span for each traced request; None: none.

    Raises:
        ConfigError: the bundle merges on the device, which this client does not, or
            `gateway`, `timeout_s` or `trace_share` is wrong.
    """

    def __init__(
        self,
        manifest: Manifest,
        program: EmbedProgram,
        gateway: str,
        *,
        timeout_s: float = TIMEOUT_S,
        noise: NoiseSource | None = None,
        trace_share: float = 0.0,
        tracer: Tracer | None = None,
    ) -> None:
        if manifest.merge != "server" or manifest.release is None:
            raise ConfigError(f"merge must be 'server' to infer at a gateway, got {manifest.merge!r}")
        if not gateway.startswith(("http://", "https://")):
            raise ConfigError(f"gateway must be an http:// or https:// URL, got {gateway!r}")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be > 0, got {timeout_s}")
        if not 0 <= trace_share <= 1:
            raise ConfigError(f"trace_share must be in [0, 1], got {trace_share}")
        self._manifest, self._program = manifest, program
        self._trace_share, self._tracer = trace_share, tracer
        self._noise = noise or SystemNoise()
        self._budget = RetryBudget()
        self._path = f"/v2/models/{manifest.model}/versions/{manifest.version}/infer"
        # No proxy from the environment: who sees an embedding is declared, not inherited.
        self._http = httpx.AsyncClient(
            base_url=gateway, timeout=timeout_s, trust_env=False, limits=httpx.Limits(max_connections=None)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def run(self, batches: Iterator[Rows], take: Callable[[Answer], None], *, concurrency: int = 32) -> None:
        """Asks once for every row, at most `concurrency` at a time; every row gets one answer.

        Args:
            batches: of the store.
            take: called with each answer as it comes, in no order.
            concurrency: >= 1.

        Raises:
            ConfigError: the store or a setting is wrong.
            BadRequest: a stored value is of the wrong type for its feature.
            BundleError: the program does not give what its manifest says.
        """
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {concurrency}")
        requests = self._requests(batches)

        async def worker() -> None:
            for ask in requests:  # shared: each takes the next row when it is free
                take(await self._answer(ask))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())
        except* HybridError as errors:
            raise errors.exceptions[0] from None

    def release(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, d) embeddings -> (n, d) as the model declares that they leave the device."""
        release = self._manifest.release
        if isinstance(release, Noised):
            return clip_and_noise(embedding, clip=release.clip, sigma=release.sigma, noise=self._noise)
        return embedding

    def _requests(self, batches: Iterator[Rows]) -> Iterator[_Ask]:
        for rows in batches:
            inputs = self._program.inputs(rows.features)
            for i in range(len(rows)):
                request = {name: values[i] for name, values in rows.request.items()}
                yield _Ask(int(rows.device[i]), int(rows.row[i]), rows.entity[i], request, inputs[i : i + 1])

    async def _answer(self, ask: _Ask) -> Answer:
        started = time.perf_counter()
        traced = _RANDOM.random() < self._trace_share
        span = self._tracer.begin("ask", "CLIENT") if traced and self._tracer else None
        traceparent = span.traceparent if span else new_traceparent() if traced else None
        answer = await self._ask(ask, traceparent)
        if span:
            about = {"hybrid.model": self._manifest.model, "hybrid.version": str(self._manifest.version)}
            span.end(about | {"hybrid.code": answer.status}, None if answer.status == "ok" else answer.status)
        return replace(answer, latency_ms=(time.perf_counter() - started) * 1e3)

    async def _ask(self, ask: _Ask, traceparent: str | None) -> Answer:
        # Released once: fresh noise on a retry would be a second release of the same row.
        released = self.release(self._program.embed(ask.inputs))
        body, header_length = request_body(ask.entity, ask.request, self._manifest.request, released)
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(header_length)}
        if traceparent is not None:
            headers[TRACEPARENT] = traceparent
        self._budget.sent()
        for attempt in range(1, ATTEMPTS + 1):
            answer, again = await self._attempt(ask, body, headers)
            if not again or attempt == ATTEMPTS or not self._budget.spend():
                break
            await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
        return replace(answer, attempts=attempt)

    async def _attempt(self, ask: _Ask, body: bytes, headers: Mapping[str, str]) -> tuple[Answer, bool]:
        """One request: what became of it, and whether another may be sent."""
        try:
            response = await self._http.post(self._path, content=body, headers=headers)
        except httpx.ConnectError:
            return Answer(ask.device, ask.row, "unreachable", error="the gateway cannot be reached"), True
        except httpx.TimeoutException:
            return Answer(ask.device, ask.row, "timeout", error="the gateway did not answer in time"), False
        except httpx.HTTPError as error:
            text = f"the connection to the gateway broke ({type(error).__name__})"
            return Answer(ask.device, ask.row, "unreachable", error=text), False
        fields = read_answer(response.status_code, response.content, self._manifest)
        again = (response.status_code, fields["status"]) in PASSING
        return Answer(ask.device, ask.row, http_status=response.status_code, **fields), again


@dataclass(frozen=True)
class _Ask:
    device: int
    row: int
    entity: str
    request: Mapping[str, Any]
    inputs: NDArray[np.float32]


def request_body(
    entity: str, request: Mapping[str, Any], kinds: Mapping[str, str], released: NDArray[np.float32]
) -> tuple[bytes, int]:
    """An OIP v2 inference request of one row: all that leaves the device.

    Args:
        entity: the join key.
        request: request features; None where missing.
        kinds: request feature -> "text" or "number".
        released: (1, d).

    Returns:
        JSON followed by the embedding's bytes, and the length of the JSON.
    """
    raw = np.ascontiguousarray(released, dtype="<f4").tobytes()
    datatypes = {name: "BYTES" if kind == "text" else "FP32" for name, kind in kinds.items()}
    inputs: list[dict[str, Any]] = [{"name": ENTITY, "datatype": "BYTES", "shape": [1], "data": [entity]}]
    inputs += [
        {"name": name, "datatype": datatype, "shape": [1], "data": [request[name]]}
        for name, datatype in datatypes.items()
    ]
    embedding = {"name": DEVICE_EMBEDDING, "datatype": "FP32", "shape": list(released.shape)}
    inputs.append({**embedding, "parameters": {"binary_data_size": len(raw)}})
    header = json.dumps({"inputs": inputs}, allow_nan=False).encode()
    return header + raw, len(header)


def read_answer(status: int, content: bytes, manifest: Manifest) -> dict[str, Any]:
    """The fields of `Answer` that a gateway's answer holds; one that cannot be used is "bad_answer"."""
    try:
        document = json.loads(content)
        if status != 200:
            return {"status": _plain(document.get("code", ServingError.code)), "error": _plain(document["error"])}
        outputs = {output["name"]: output["data"][0] for output in document["outputs"]}
        return _prediction(outputs, manifest)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # The class alone: the text of the error could quote what was answered.
        return {"status": "bad_answer", "error": f"the gateway's answer cannot be read ({type(error).__name__})"}


def _prediction(outputs: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    prediction, version, age_ms = float(outputs[PREDICTION]), int(outputs[VERSION]), int(outputs[FEATURE_AGE_MS])
    if not 0 <= prediction <= 1:
        raise ValueError("not a probability")
    if version != manifest.version:
        raise ValueError("another version than was asked")
    if not -1 <= age_ms < 1 << 63:
        raise ValueError("no age")
    return {
        "status": "ok",
        "prediction": prediction,
        "version": version,
        "feature_age_ms": age_ms,
        "merged": _plain(outputs[MERGED]),
    }


def _plain(text: object) -> str:
    """What a gateway wrote, short and storable, whatever it wrote."""
    return str(text)[:500].encode(errors="replace").decode()
