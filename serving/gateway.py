"""The gateway: Open Inference Protocol v2 over HTTP in front of Kafka.

It decodes, batches, waits and encodes; Kafka's I/O runs in threads of its own.
gRPC, where it is wanted, runs beside it on the same event loop (`serving.grpc_gateway`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid.deployment import Deployment
from hybrid.errors import BadRequest, NoBundle, Overloaded, ServingError, Unavailable, UnknownTicket
from hybrid.http import read_body
from hybrid.messages import BadMessage, DeadLetter, DeviceEmbeddings, Predictions
from hybrid.protocol import HEADER_LENGTH
from hybrid.rollout import ROLLOUT, Rollout
from hybrid.tracing import TRACEPARENT
from serving import oip, openapi
from serving.access import Access, error_headers
from serving.bundles import Bundles
from serving.connection import Broker
from serving.deployments import Deployments
from serving.direct import Direct
from serving.exchange import Exchange, Limits
from serving.kafka import Record, Tail, ThreadedOutbox
from serving.results import PATH as RESULTS
from serving.results import Later, Take, prefers_async
from serving.telemetry import Request as Asking
from serving.telemetry import Telemetry

if TYPE_CHECKING:
    from hybrid.sealing import SealingKey

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
HELD_BYTES = 128 << 20  # of all bodies whose requests are not answered yet; more are refused
DRAIN_BYTES = 16 << 20  # of a refused body, read and dropped so that the client sees the answer
CLIENT = "hybrid.client"  # in a request's scope
REFRESH_S = 1.0
OPEN = frozenset({"/v2/health/live", "/v2/health/ready"})  # to everyone, for probes
SERVER = {"name": "hybrid-gateway", "version": installed("hybrid-towers"), "extensions": ["binary_tensor_data"]}
Ask = Callable[[Any, oip.Rows, float | None], Awaitable[oip.Answers]]
Endpoint = Callable[[Request], Awaitable[Response]]


async def _at_once() -> None:
    """A `Take` of a request that is answered where it was asked."""


@dataclass(frozen=True)
class Gateway:
    """The HTTP side, apart from Kafka.

    Attributes:
        deployments: what is served.
        ask: (deployment, rows, seconds that the caller waits or None) -> their predictions.
        ready: whether the broker's two ends are there.
        access: who may ask.
        max_body_bytes: larger bodies are refused while they are read.
        telemetry: counts and times requests.
        bundles: that devices fetch; None: they get them elsewhere.
        later: answers requests that prefer so later; None: all are answered at once.
    """

    deployments: Deployments
    ask: Ask
    ready: Callable[[], bool]
    access: Access = field(default_factory=Access)
    max_body_bytes: int = MAX_BODY_BYTES
    telemetry: Telemetry = field(default_factory=Telemetry)
    bundles: Bundles | None = None
    later: Later | None = None

    def routes(self) -> list[Route]:
        """The protocol's paths; they are tried in turn, so those that are asked most come first."""
        model, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        return [
            *(_route(f"{path}/infer", self.infer, "POST") for path in (model, versioned)),
            _route("/openapi.json", self.description),
            _route("/v2", self.server_metadata),
            _route("/v2/health/live", self.live),
            _route("/v2/health/ready", self.health),
            *(_route(path, self.model_metadata) for path in (model, versioned)),
            *(_route(f"{path}/ready", self.model_ready) for path in (model, versioned)),
            *(_route(f"{path}/bundle", self.bundle) for path in (model, versioned)),
            _route(ROLLOUT, self.rollout),
            _route(f"{RESULTS}/{{ticket}}", self.result, "GET", "DELETE"),
        ]

    async def server_metadata(self, _: Request) -> Response:
        """What this server is."""
        return JSONResponse(SERVER)

    async def description(self, _: Request) -> Response:
        """What can be asked now, as OpenAPI."""
        return JSONResponse(openapi.document(self.deployments.current, self.access.credentials is not None))

    async def live(self, _: Request) -> Response:
        """The event loop turns."""
        return JSONResponse({"live": True})

    async def health(self, _: Request) -> Response:
        """The producer is connected and the predictions partition assigned."""
        ready = self.ready()
        return JSONResponse({"ready": ready}, status_code=200 if ready else Unavailable.status)

    async def model_metadata(self, request: Request) -> Response:
        """Names, datatypes and shapes of a model's tensors."""
        served = self.deployments.served(**request.path_params)
        return JSONResponse(oip.model_metadata(served, self.deployments.versions(served.model)))

    async def model_ready(self, request: Request) -> Response:
        """The model is served, and the broker is there."""
        served = self.deployments.served(**request.path_params)
        if not self.ready():
            raise Unavailable("Kafka is not connected yet")
        return JSONResponse({"name": served.model, "ready": True})

    async def bundle(self, request: Request) -> Response:
        """The signed device bundle of a served version."""
        served = self.deployments.served(**request.path_params)
        if self.bundles is None:
            raise NoBundle("this gateway has no bundles: it was started without --bundles")
        return await self.bundles.answer(request, served, versioned="version" in request.path_params)

    async def rollout(self, request: Request) -> Response:
        """What devices are to fetch: the same for all, which decide for themselves whether a canary is for them."""
        told = Rollout.of(self.deployments.window(**request.path_params))
        said = told.model_dump_json(exclude={"shadow"} if told.shadow is None else None)
        return Response(said, media_type="application/json", headers={"Cache-Control": "no-cache"})

    async def infer(self, request: Request) -> Response:
        """Predictions for the rows of one request, or the error of the first row that has none; or a ticket for it."""
        if self.later is None or not prefers_async(request.headers.getlist("prefer")):
            return await self._infer(request, _at_once)

        async def work(take: Take) -> Response:
            return await _answered(request, lambda asked: self._infer(asked, take))

        return await self.later.answer(request.scope[CLIENT], work)

    async def result(self, request: Request) -> Response:
        """What a ticket stands for, or the end of it."""
        if self.later is None:
            raise UnknownTicket("this gateway keeps no results: it was started without --results")
        act = self.later.forget if request.method == "DELETE" else self.later.fetch
        return await act(request.scope[CLIENT], request.path_params["ticket"])

    async def _infer(self, request: Request, take: Take) -> Response:
        with self.telemetry.request(request.headers.get(TRACEPARENT)) as asking:
            return await self._predicted(request, asking, take)

    async def _predicted(self, request: Request, asking: Asking, take: Take) -> Response:
        deployment = self.deployments.served(**request.path_params)
        asking.about(deployment)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise BadRequest("the body must not be compressed (no Content-Encoding)")
        body = await read_body(request, self.max_body_bytes, dropped=DRAIN_BYTES)
        with asking.stage("decode"):
            asked = oip.decode(body, request.headers.get(HEADER_LENGTH), deployment)
        answers = await self.predict(deployment, asked, request.scope[CLIENT], asking, take)
        with asking.stage("encode"):
            content, json_length = oip.encode(asked, answers, deployment)
        if json_length is None:
            return Response(content, media_type="application/json")
        headers = {HEADER_LENGTH: str(json_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def predict(
        self, deployment: Deployment, asked: oip.Infer, client: str, asking: Asking, take: Take = _at_once
    ) -> oip.Answers:
        """What both fronts do with a request that is read; `asking` is told, and `take` awaited once it is to wait.

        Raises:
            RateLimited: these are too many rows for the client.
            ServingError: see `Exchange.ask`.
        """
        asking.rows = len(asked.rows)
        self.access.take_rows(client, len(asked.rows))
        if not self.ready():
            raise Unavailable("Kafka is not connected")
        await take()
        with asking.stage("wait"):
            return await self.ask(deployment, asked.rows, asked.timeout_s)


def application(gateway: Gateway, lifespan: Any = None, held_bytes: int = HELD_BYTES) -> ASGIApp:
    """The ASGI application; every error is the protocol's error object."""
    router = Router(gateway.routes(), lifespan=lifespan)
    return _Door(router, gateway.access, gateway.max_body_bytes, held_bytes)


class _Door:
    """Lets in who may ask, as long as there is room for the bodies.

    Every path but `OPEN` is behind it, also one that comes later, or is not there.
    """

    def __init__(self, app: ASGIApp, access: Access, max_body_bytes: int, held_bytes: int) -> None:
        self._app, self._access, self._max_body, self._room = app, access, max_body_bytes, held_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope["app"] = self._app  # without one the router answers by itself, in plain text
        try:
            if scope["path"] in OPEN:
                await self._app(scope, receive, send)
            else:
                await self._admitted(scope, receive, send)
        except HTTPException as error:  # there is no such route: nothing was sent yet
            await _no_route(error)(scope, receive, send)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        shown = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        try:
            scope[CLIENT] = await self._access.admit(shown)
        except Exception as error:
            return await refused(explained(error))(scope, receive, send)
        held = 0

        async def read() -> Message:
            nonlocal held
            message = await receive()
            # What is past the largest body is read and dropped.
            size = min(len(message.get("body", b"")), self._max_body - held)
            if size > self._room:
                raise Overloaded("too many bodies wait for an answer; try again in a second")
            held, self._room = held + size, self._room - size
            return message

        try:
            await self._app(scope, read, send)
        finally:
            self._room += held


def over_kafka(
    broker: Broker,
    reply_partition: int,
    deployments: Deployments,
    now_ms: Callable[[], int],
    limits: Limits,
    *,
    on_loss: Callable[[], None],
    telemetry: Telemetry,
    direct: Direct | None = None,
    key: SealingKey | None = None,
    access: Access | None = None,
    bundles: Bundles | None = None,
    later: Later | None = None,
    beside: Callable[[Gateway], AbstractAsyncContextManager[object]] = lambda _: nullcontext(),
    exactly_once: bool = False,
) -> ASGIApp:
    """A gateway whose questions and answers cross Kafka, or go its own way where a model is declared to.

    It connects while the application starts.

    Args:
        broker: where Kafka is, and what is shown to it.
        reply_partition: of the predictions topic; no other gateway may have it.
        deployments: what is served.
        now_ms: Unix time in milliseconds, UTC.
        limits: of what may wait.
        on_loss: called, at most once, when a thread that talks to Kafka has ended: nothing is answered any more.
        telemetry: counts, times and traces.
        direct: the transport of models that are declared so; None: they are unavailable here.
        key: seals the bytes of records that cannot be read; without one they are not kept.
        access: who may ask; everyone where it is None.
        bundles: see `Gateway`.
        later: see `Gateway`; what it has taken is answered before the connections to Kafka end.
        beside: another front of the same gateway, open as long as this one.
        exactly_once: whether answers are read once they are committed; as the workers'.
    """
    pa.array([""])  # looks for pandas, for a second that the first request would wait
    outbox = ThreadedOutbox(broker)

    def send(message: DeviceEmbeddings, traces: Sequence[str], on_failure: Callable[[], None]) -> None:
        outbox.send(message.TOPIC, message.to_bytes(), message.request_id[0].tobytes(), on_failure, traces)
        telemetry.sent(len(message))

    def receive(record: Record) -> None:
        _receive(record, outbox, exchange, key, telemetry)

    exchange = Exchange(send, reply_partition, now_ms, limits)
    tail = Tail(broker, Predictions.TOPIC, reply_partition, receive, committed=exactly_once)
    telemetry.watch("hybrid_gateway_rows_in_flight", lambda: exchange.in_flight)
    telemetry.watch("hybrid_gateway_queue_rows", lambda: exchange.queued)
    telemetry.watch("hybrid_gateway_outbox_records", lambda: outbox.waiting)

    async def ask(deployment: Deployment, rows: oip.Rows, timeout_s: float | None) -> oip.Answers:
        if deployment.serving.transport == "kafka":
            return await exchange.ask(deployment, rows, timeout_s)
        if direct is None:
            raise Unavailable("the model is declared transport='direct', which this gateway was not started for")
        return await direct.ask(deployment, rows, timeout_s)

    def ready() -> bool:
        return outbox.ready and tail.ready and (direct is None or direct.ready)

    telemetry.health.watch(lambda: None if ready() else "kafka")
    gateway = Gateway(deployments, ask, ready, access or Access(), telemetry=telemetry, bundles=bundles, later=later)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        exchange.start()
        with outbox, tail:
            tasks = [asyncio.create_task(_watch((outbox, tail), on_loss))]
            tasks.append(asyncio.create_task(_refresh(deployments, direct)))
            try:
                async with nullcontext() if later is None else later.running(), beside(gateway):
                    yield
            finally:
                for task in tasks:
                    task.cancel()
                if direct is not None:
                    direct.close()

    return application(gateway, lifespan)


def _receive(
    record: Record, outbox: ThreadedOutbox, exchange: Exchange, key: SealingKey | None, telemetry: Telemetry
) -> None:
    """Hands one record of the predictions topic to those who wait, or to the dead letters."""
    try:
        message = Predictions.from_bytes(record.value)
    except BadMessage as error:
        letter = record.dead_letter(error, key)
        place = letter.partition, letter.offset
        log.warning("dead letter: partition %d, offset %d: %s: %s", *place, letter.code, letter.reason)
        telemetry.dead_letter(letter.code)
        with suppress(Unavailable):
            outbox.send(DeadLetter.topic_for(record.topic), letter.model_dump_json().encode(), None, lambda: None)
    else:
        exchange.deliver(message)


async def _refresh(deployments: Deployments, direct: Direct | None) -> None:
    """Takes promotions into service, once what the direct transport needs for them is there."""
    if direct is not None:
        await direct.prepare(deployments.current)
    gc.freeze()  # what is there by now stays: no collection need look at it again, and stop all for it
    while True:
        await asyncio.sleep(REFRESH_S)
        if (windows := deployments.changed()) is not None:
            if direct is not None:
                await direct.prepare([version for window in windows.values() for version in window.versions])
            deployments.take(windows)


async def _watch(ends: Sequence[ThreadedOutbox | Tail], on_loss: Callable[[], None]) -> None:
    while all(end.alive for end in ends):
        await asyncio.sleep(REFRESH_S)
    on_loss()


def refused(error: ServingError) -> Response:
    """The protocol's error object, with the error's status and headers."""
    return Response(oip.encode_error(error), error.status, error_headers(error), media_type="application/json")


def explained(error: Exception) -> ServingError:
    """What the caller is told.

    Of an error that nobody foresaw, class and place are logged and no more: its text may hold a caller's values.
    """
    if isinstance(error, ServingError):
        return error
    at = traceback.extract_tb(error.__traceback__)[-1]
    log.error("internal error: %s in %s, line %s", type(error).__name__, at.name, at.lineno)
    return ServingError("internal error")


def _no_route(error: HTTPException) -> Response:
    content = orjson.dumps({"error": error.detail, "code": "no_such_path"})
    return Response(content, error.status_code, error.headers, media_type="application/json")


def _route(path: str, endpoint: Endpoint, *methods: str) -> Route:
    """An endpoint as an application of its own: Starlette's way to call a function takes a quarter of a request."""
    return Route(path, _Endpoint(endpoint), methods=methods or ("GET",))


@dataclass(frozen=True)
class _Endpoint:
    """Answers what its function does, or the error that it raises."""

    function: Endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await _answered(Request(scope, receive), self.function)
        await answer(scope, receive, send)


async def _answered(request: Request, function: Endpoint) -> Response:
    try:
        return await function(request)
    except Exception as error:
        return refused(explained(error))
