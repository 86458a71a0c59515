"""The inference client: asks the gateway about each row, as the bundle's model declares where the embeddings meet.

On the server: it embeds the row, releases the embedding and is told a prediction. On the device: it is told the
server's embedding and predicts itself. What leaves the process is built in one place, `request_body`: the entity, the
request features and, where the server merges, the embedding as released. Nothing else of a row does. Beside it goes an
API key, where there is one: to the gateway, and to nobody that it may point at.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from device_runtime.access import authorization, refused
from device_runtime.answers import TIMEOUT, UNREACHABLE, Answer, read_answer, slots_of
from device_runtime.merge import DeviceMerge
from device_runtime.program import EmbedProgram, PredictProgram
from device_runtime.rows import Rows
from hybrid.bundle import Manifest
from hybrid.errors import ConfigError, HybridError, Overloaded, Unauthenticated, Unavailable
from hybrid.privacy.mechanisms import NoiseSource, SystemNoise, clip_and_noise
from hybrid.protocol import (
    DEVICE_EMBEDDING,
    ENTITY,
    EXPIRES_MS,
    FALLBACK,
    FEATURE_AGE_MS,
    HEADER_LENGTH,
    MERGED,
    PREDICTION,
    SERVER_EMBEDDING,
    SERVER_SLOTS,
    STATUS,
    VERSION,
)
from hybrid.spec import Noised
from hybrid.tracing import TRACEPARENT, Tracer, new_traceparent

ATTEMPTS = 3
TIMEOUT_S = 10.0  # beyond a gateway's deadline of 5 s, whose answer says why
BACKOFF_S = 0.05  # before the second attempt; doubles
# What a retry may find gone. Stale features and drift, 503 as well, stay so; a rate limit does for longer than we wait.
PASSING = frozenset({(Unavailable.status, Unavailable.code), (Overloaded.status, Overloaded.code)})
MAX_ANSWER = 4 << 20  # bytes of one: an embedding of 65,536 numbers takes less
ALWAYS = (VERSION, FEATURE_AGE_MS, MERGED, STATUS, FALLBACK)
_RANDOM = secrets.SystemRandom()


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
        program: of the same bundle: see `program_of`.
        gateway: base URL.
        timeout_s: for one attempt, > 0.
        noise: for release=Noised; the operating system's unless a test says otherwise.
        trace_share: share of the requests, in [0, 1], that carry a new random trace context,
            which joins what gateway and worker record of that one request, its retries included.
        tracer: exports a span for each traced request; None: none.
        contribution: whether to ask for what the server contributed; the model must declare `serving.contribution`.
            That is the server's embedding, which a device that merges has anyway, or its slots, where devices train
            the server tower too.
        now_ms: Unix time in milliseconds, UTC: what a server's embedding expires by.
        api_key: shown to the gateway as bearer, a token in its place too; over https, or on this machine. None: none.

    Raises:
        ConfigError: the program is not the one for the bundle's merge, or
            `gateway`, `timeout_s`, `trace_share`, `contribution` or `api_key` is wrong.
    """

    def __init__(
        self,
        manifest: Manifest,
        program: EmbedProgram | PredictProgram,
        gateway: str,
        *,
        timeout_s: float = TIMEOUT_S,
        noise: NoiseSource | None = None,
        trace_share: float = 0.0,
        tracer: Tracer | None = None,
        contribution: bool = False,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        api_key: str | None = None,
    ) -> None:
        if isinstance(program, PredictProgram) != (manifest.merge == "device"):
            needed = "PredictProgram" if manifest.merge == "device" else "EmbedProgram"
            raise ConfigError(f"program must be {needed} for merge={manifest.merge!r}, got {type(program).__name__}")
        if manifest.merge == "server" and manifest.release is None:
            raise ConfigError("the bundle's release must be 'clear' or 'noised' for merge='server', got none")
        if manifest.merge == "device" and contribution and not slots_of(manifest):
            raise ConfigError(
                "contribution must be left out for merge='device' with this bundle: every answer is the server's "
                "embedding, and devices train no server tower, which would need its slots"
            )
        if not gateway.startswith(("http://", "https://")):
            raise ConfigError(f"gateway must be an http:// or https:// URL, got {gateway!r}")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be > 0, got {timeout_s}")
        if not 0 <= trace_share <= 1:
            raise ConfigError(f"trace_share must be in [0, 1], got {trace_share}")
        self._manifest, self._program = manifest, program
        self._contribution = contribution
        self._merge = DeviceMerge(manifest, program, now_ms) if isinstance(program, PredictProgram) else None
        self._trace_share, self._tracer = trace_share, tracer
        self._noise = noise or SystemNoise()
        self._budget = RetryBudget()
        self._path = f"/v2/models/{manifest.model}/versions/{manifest.version}/infer"
        shown = authorization(api_key, gateway)
        self._shown = bool(shown)
        # No proxy from the environment, and no other host that an answer names: who sees an embedding, or the key, is
        # declared.
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            base_url=gateway,
            headers=shown | {"Accept-Encoding": "identity"},
            timeout=timeout_s,
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def run(
        self,
        batches: Iterator[Rows],
        take: Callable[[Answer], None],
        *,
        concurrency: int = 32,
        then: Callable[[Rows, Answer], None] | None = None,
    ) -> None:
        """Asks once for every row, at most `concurrency` at a time; every row gets one answer.

        Args:
            batches: of the store.
            take: called with each answer as it comes, in no order.
            concurrency: >= 1.
            then: called after it, with the row too; it must return at once, see `device_runtime.shadow`.

        Raises:
            ConfigError: the store or a setting is wrong.
            BadRequest: a stored value is of the wrong type for its feature.
            BundleError: the program does not give what its manifest says.
            Unauthenticated: the gateway does not take the API key, or wants one: no other row would be answered.
        """
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {concurrency}")
        requests = self._requests(batches)

        async def worker() -> None:
            for ask in requests:  # shared: each takes the next row when it is free
                answer = await self._answer(ask)
                take(answer)
                if then is not None:
                    then(ask.rows.one(ask.place), answer)

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
                yield _Ask(int(rows.device[i]), int(rows.row[i]), rows.entity[i], request, inputs[i : i + 1], rows, i)

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
        released = None
        if isinstance(self._program, EmbedProgram):
            # Released once: fresh noise on a retry would be a second release of the same row.
            released = self.release(self._program.embed(ask.inputs))
        outputs = outputs_with_contribution(self._manifest) if self._contribution else ()
        body, header_length = request_body(ask.entity, ask.request, self._manifest.request, released, outputs)
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(header_length)}
        if traceparent is not None:
            headers[TRACEPARENT] = traceparent
        self._budget.sent()
        for attempt in range(1, ATTEMPTS + 1):
            answer, again = await self._attempt(ask, body, headers)
            if not again or attempt == ATTEMPTS or not self._budget.spend():
                break
            await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
        answer = replace(answer, attempts=attempt)
        return answer if self._merge is None else self._merge(answer, ask.inputs)

    async def _attempt(self, ask: _Ask, body: bytes, headers: Mapping[str, str]) -> tuple[Answer, bool]:
        """One request: what became of it, and whether another may be sent."""
        try:
            status, content = await self._post(body, headers)
        except httpx.ConnectError:
            return Answer(ask.device, ask.row, UNREACHABLE, error="the gateway cannot be reached"), True
        except (httpx.TimeoutException, TimeoutError):
            return Answer(ask.device, ask.row, TIMEOUT, error="the gateway did not answer in time"), False
        except httpx.HTTPError as error:
            text = f"the connection to the gateway broke ({type(error).__name__})"
            return Answer(ask.device, ask.row, UNREACHABLE, error=text), False
        if status == Unauthenticated.status:
            raise refused(self._shown)
        fields = read_answer(status, content, self._manifest, contribution=self._contribution)
        again = (status, fields["status"]) in PASSING
        return Answer(ask.device, ask.row, http_status=status, **fields), again

    async def _post(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Status and body of an answer; of one that is too long, or packed though that was not asked for, no body."""
        async with (
            asyncio.timeout(self._timeout_s),  # from the connection to the last byte: httpx's is of each wait
            self._http.stream("POST", self._path, content=body, headers=headers) as response,
        ):
            data = bytearray()
            if response.headers.get("Content-Encoding", "identity") == "identity":
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > MAX_ANSWER:
                        return response.status_code, b""
            return response.status_code, bytes(data)


@dataclass(frozen=True)
class _Ask:
    device: int
    row: int
    entity: str
    request: Mapping[str, Any]
    inputs: NDArray[np.float32]
    rows: Rows  # that it is of,
    place: int  # and where


def outputs_with_contribution(manifest: Manifest) -> tuple[str, ...]:
    """What is asked for by name where an example is to be kept."""
    needed = (SERVER_EMBEDDING, EXPIRES_MS) if manifest.merge == "device" else (PREDICTION,)
    return (*needed, *ALWAYS, SERVER_SLOTS if slots_of(manifest) else SERVER_EMBEDDING)


def request_body(
    entity: str,
    request: Mapping[str, Any],
    kinds: Mapping[str, str],
    released: NDArray[np.float32] | None,
    outputs: Iterable[str] = (),
) -> tuple[bytes, int]:
    """An OIP v2 inference request of one row: all that leaves the device.

    Args:
        entity: the join key.
        request: request features; None where missing.
        kinds: request feature -> "text" or "number".
        released: (1, d); None where the device merges.
        outputs: asked for by name; none: what the model gives to everybody.

    Returns:
        JSON followed by the embedding's bytes, and the length of the JSON.
    """
    datatypes = {name: "BYTES" if kind == "text" else "FP32" for name, kind in kinds.items()}
    inputs: list[dict[str, Any]] = [{"name": ENTITY, "datatype": "BYTES", "shape": [1], "data": [entity]}]
    inputs += [
        {"name": name, "datatype": datatype, "shape": [1], "data": [request[name]]}
        for name, datatype in datatypes.items()
    ]
    raw = b""
    if released is not None:
        raw = np.ascontiguousarray(released, dtype="<f4").tobytes()
        embedding = {"name": DEVICE_EMBEDDING, "datatype": "FP32", "shape": list(released.shape)}
        inputs.append({**embedding, "parameters": {"binary_data_size": len(raw)}})
    document: dict[str, Any] = {"inputs": inputs}
    if names := list(outputs):
        document["outputs"] = [{"name": name} for name in names]
    header = json.dumps(document, allow_nan=False).encode()
    return header + raw, len(header)
