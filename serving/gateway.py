"""The gateway: Open Inference Protocol v2 over HTTP in front of Kafka.

It decodes, batches, waits and encodes; Kafka's I/O runs in threads of its own.
Plaintext and without authentication: for loopback, or behind something that adds both.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from typing import Any

import orjson
import pyarrow as pa
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hybrid.errors import BadRequest, BodyTooLarge, ServingError, Unavailable
from hybrid.messages import BadMessage, DeadLetter, DeviceEmbeddings, Predictions
from hybrid.protocol import HEADER_LENGTH
from hybrid.tracing import TRACEPARENT
from serving import oip
from serving.deployments import Deployments
from serving.exchange import Exchange, Limits
from serving.kafka import Record, Tail, ThreadedOutbox
from serving.telemetry import UNREADABLE, Telemetry
from serving.telemetry import Request as Asking

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
DRAIN_BYTES = 16 << 20  # of a refused body, read and dropped so that the client sees the answer
REFRESH_S = 1.0
BODY_S = 30.0  # for a body to arrive
Ask = Callable[[Any, oip.Rows], Awaitable[oip.Answers]]
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Gateway:
    """The HTTP side, apart from Kafka.

    Attributes:
        deployments: what is served.
        ask: (deployment, rows) -> their predictions.
        ready: whether the broker's two ends are there.
        max_body_bytes: larger bodies are refused while they are read.
        telemetry: counts and times requests.
    """

    deployments: Deployments
    ask: Ask
    ready: Callable[[], bool]
    max_body_bytes: int = MAX_BODY_BYTES
    telemetry: Telemetry = field(default_factory=Telemetry)

    def routes(self) -> list[Route]:
        """The protocol's paths."""
        model, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        return [
            Route("/v2", _guarded(self.server_metadata)),
            Route("/v2/health/live", _guarded(self.live)),
            Route("/v2/health/ready", _guarded(self.health)),
            *(Route(path, _guarded(self.model_metadata)) for path in (model, versioned)),
            *(Route(f"{path}/ready", _guarded(self.model_ready)) for path in (model, versioned)),
            *(Route(f"{path}/infer", _guarded(self.infer), methods=["POST"]) for path in (model, versioned)),
        ]

    async def server_metadata(self, _: Request) -> Response:
        """What this server is."""
        release = installed("hybrid-towers")
        return JSONResponse({"name": "hybrid-gateway", "version": release, "extensions": ["binary_tensor_data"]})

    async def live(self, _: Request) -> Response:
        """The event loop turns."""
        return JSONResponse({"live": True})

    async def health(self, _: Request) -> Response:
        """The producer is connected and the predictions partition assigned."""
        ready = self.ready()
        return JSONResponse({"ready": ready}, status_code=200 if ready else Unavailable.status)

    async def model_metadata(self, request: Request) -> Response:
        """Names, datatypes and shapes of a model's tensors."""
        return JSONResponse(oip.model_metadata(self.deployments.served(**request.path_params)))

    async def model_ready(self, request: Request) -> Response:
        """The model is served, and the broker is there."""
        served = self.deployments.served(**request.path_params)
        if not self.ready():
            raise Unavailable("Kafka is not connected yet")
        return JSONResponse({"name": served.model, "ready": True})

    async def infer(self, request: Request) -> Response:
        """Predictions for the rows of one request, or the error of the first row that has none."""
        with self.telemetry.request(request.headers.get(TRACEPARENT)) as asking:
            return await self._infer(request, asking)

    async def _infer(self, request: Request, asking: Asking) -> Response:
        deployment = self.deployments.served(**request.path_params)
        asking.about(deployment)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise BadRequest("the body must not be compressed (no Content-Encoding)")
        body = await _body(request, self.max_body_bytes)
        with asking.stage("decode"):
            asked = oip.decode(body, request.headers.get(HEADER_LENGTH), deployment)
        asking.rows = len(asked.rows)
        if not self.ready():
            raise Unavailable("Kafka is not connected")
        with asking.stage("wait"):
            answers = await self.ask(deployment, asked.rows)
        with asking.stage("encode"):
            content, json_length = oip.encode(asked, answers, deployment)
        if json_length is None:
            return Response(content, media_type="application/json")
        headers = {HEADER_LENGTH: str(json_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)


def application(gateway: Gateway, lifespan: Any = None) -> Starlette:
    """The ASGI application; every error is the protocol's error object."""
    handlers: dict[Any, Any] = {ServingError: _refused, HTTPException: _no_route}
    return Starlette(routes=gateway.routes(), exception_handlers=handlers, lifespan=lifespan)


def over_kafka(
    bootstrap: str,
    reply_partition: int,
    deployments: Deployments,
    now_ms: Callable[[], int],
    limits: Limits,
    *,
    on_loss: Callable[[], None],
    telemetry: Telemetry,
) -> Starlette:
    """A gateway whose questions and answers cross Kafka; connects while the application starts.

    Args:
        bootstrap: the broker, HOST:PORT.
        reply_partition: of the predictions topic; no other gateway may have it.
        deployments: what is served.
        now_ms: Unix time in milliseconds, UTC.
        limits: of what may wait.
        on_loss: called, at most once, when a thread that talks to Kafka has ended: nothing is answered any more.
        telemetry: counts, times and traces.
    """
    pa.array([""])  # looks for pandas, for a second that the first request would wait
    outbox = ThreadedOutbox(bootstrap)

    def send(message: DeviceEmbeddings, traces: Sequence[str], on_failure: Callable[[], None]) -> None:
        outbox.send(message.TOPIC, message.to_bytes(), message.request_id[0].tobytes(), on_failure, traces)
        telemetry.sent(len(message))

    def receive(record: Record) -> None:
        _receive(record, outbox, exchange, telemetry)

    exchange = Exchange(send, reply_partition, now_ms, limits)
    tail = Tail(bootstrap, Predictions.TOPIC, reply_partition, receive)
    telemetry.watch("hybrid_gateway_rows_in_flight", lambda: exchange.in_flight)
    telemetry.watch("hybrid_gateway_queue_rows", lambda: exchange.queued)
    telemetry.watch("hybrid_gateway_outbox_records", lambda: outbox.waiting)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        exchange.start()
        with outbox, tail:
            tasks = [asyncio.create_task(_refresh(deployments)), asyncio.create_task(_watch((outbox, tail), on_loss))]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    gateway = Gateway(deployments, exchange.ask, lambda: outbox.ready and tail.ready, telemetry=telemetry)
    return application(gateway, lifespan)


def _receive(record: Record, outbox: ThreadedOutbox, exchange: Exchange, telemetry: Telemetry) -> None:
    """Hands one record of the predictions topic to those who wait, or to the dead letters."""
    try:
        message = Predictions.from_bytes(record.value)
    except BadMessage as error:
        letter = record.dead_letter(str(error))
        log.warning("dead letter: partition %d, offset %d: %s", letter.partition, letter.offset, letter.reason)
        telemetry.dead_letter(UNREADABLE)
        with suppress(Unavailable):
            outbox.send(DeadLetter.topic_for(record.topic), letter.model_dump_json().encode(), None, lambda: None)
    else:
        exchange.deliver(message)


async def _refresh(deployments: Deployments) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        deployments.refresh()


async def _watch(ends: Sequence[ThreadedOutbox | Tail], on_loss: Callable[[], None]) -> None:
    while all(end.alive for end in ends):
        await asyncio.sleep(REFRESH_S)
    on_loss()


async def _body(request: Request, limit: int) -> bytes:
    """The request's body, never more than `limit` of it in memory."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    body += chunk
                elif size > DRAIN_BYTES:
                    break
    except TimeoutError:
        raise BadRequest(f"the body must arrive within {BODY_S:g} s") from None
    except ClientDisconnect:
        raise BadRequest("the connection ended before the body did") from None
    if size > limit:
        raise BodyTooLarge(f"the body must have at most {limit} bytes")
    return bytes(body)


def _refused(_: Request, error: ServingError) -> Response:
    headers = {"Retry-After": "1"} if error.status == Unavailable.status else {}
    return Response(oip.encode_error(error), error.status, headers, media_type="application/json")


def _no_route(_: Request, error: HTTPException) -> Response:
    content = orjson.dumps({"error": error.detail, "code": "no_such_path"})
    return Response(content, error.status_code, error.headers, media_type="application/json")


def _guarded(endpoint: Endpoint) -> Endpoint:
    """The endpoint, whose unexpected errors tell their class and place; their text may hold a caller's values.

    A handler for `Exception` would not do: Starlette raises it again, for uvicorn to log with its text.
    """

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (ServingError, HTTPException):
            raise
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            log.error("internal error: %s in %s, line %s", type(error).__name__, at.name, at.lineno)
            raise ServingError("internal error") from None

    return answer
