"""An aggregator's control side over HTTP: whoever holds its token opens a round, and is given one noised sum.

| request | answer |
|---|---|
| `PUT /rounds/RUN/NUMBER/ATTEMPT`, the weights as little-endian float32 | 202: it is open, whoever asked first |
| `GET /rounds/RUN/NUMBER/ATTEMPT?wait_s=S` | 200 the sum as little-endian float64; 202 not yet; 404 never opened here |
| `POST /halt`, a `hybrid.plan.Halt` as JSON | 204: it holds, and will after a restart; where there are devices |
| `GET /training` | 200 a `Training` as JSON: which plan devices are given; where there are devices, as the next three |
| `POST /plans/PLAN/end`, an `Order` as JSON | 204: the round of that plan, which is open, ends unreleased, for good |
| `POST /training/halt`, an `Order` as JSON | 204: devices are given no plan, also after a restart |
| `POST /training/resume`, an `Order` as JSON | 204: they are again |
| `GET /health` | 200, without a token |

What cannot be is a JSON object of `error` and `message`: 400 `bad_request`, 401 `unauthenticated`,
403 `budget_exceeded`, 404 `not_open`, 409 `cohort_too_small`, `halted` or `ended`, 410 `stale`, 413 `body_too_large`,
500 `failed`, 503 `stopped`: its process ends, or training is halted there; it is to be asked again.

A round has one answer: asked again, also after a crash, the same bytes come, since a sum is on the disk before
it leaves. How many took part does not leave (docs/decisions/0009).
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybrid.bearer import check_token, shown
from hybrid.errors import (
    AggregatorError,
    BudgetExceeded,
    CohortTooSmall,
    ConfigError,
    Halted,
    NotFound,
    RoundEnded,
    RoundStopped,
    ServingError,
)
from hybrid.features import Float32
from hybrid.files import write_whole
from hybrid.plan import Halt, Name
from hybrid.privacy.mechanisms import Release
from hybrid.protocol import is_loopback

if TYPE_CHECKING:
    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from hybrid.federation.client_app import Aggregator
    from hybrid.http import Certificate

LONGEST_WAIT_S = 30.0  # of one request
RETRY_S = 0.5  # from a connection that failed to the next
LONGEST_RETRY_S = 4.0  # where it answers that it runs no round: each time twice as long, up to this
WEIGHTS_S = 300.0  # for a round's weights to come
CONNECTIONS = 128  # at once
MAX_HALT = 64 << 10  # bytes of its body

HALT, TRAINING = "/halt", "/training"

_WEIGHTS, _SUM = np.dtype("<f4"), np.dtype("<f8")
_Message = TypeVar("_Message", bound=BaseModel)
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class Key(NamedTuple):
    """Names a round.

    Attributes:
        run: the training's, the same in each life of its ServerApp.
        number: of the round, from 1.
        attempt: at it, from 1.
    """

    run: str
    number: int
    attempt: int


class Order(BaseModel):
    """What whoever holds the token wants of an aggregator's training, but for a version.

    Attributes:
        model: that it must train.
        reason: for people and logs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Name
    reason: Annotated[str, Field(min_length=1, max_length=500)]


class Training(BaseModel):
    """How an aggregator's training stands.

    Attributes:
        model: that it trains.
        plan: that devices are given now.
        halted: why they are given none, until it is resumed.
    """

    model_config = ConfigDict(frozen=True)

    model: Name
    plan: str | None
    halted: str | None


class Switch(Protocol):
    """What stops devices, wholly or in part: see `hybrid.federation.halts.KillSwitch`."""

    def halt(self, halt: Halt) -> None:
        """Halts some versions."""
        ...

    def training(self) -> Training:
        """How training stands."""
        ...

    def suspend(self, order: Order) -> None:
        """Halts all training."""
        ...

    def resume(self, order: Order) -> None:
        """Training goes on."""
        ...

    def end(self, plan: str, order: Order) -> None:
        """Ends the round that a plan is of."""
        ...


class StaleRound(AggregatorError):
    """A later round, or a later run, was opened since: this one is not run any more."""


class _Ends(AggregatorError):
    """Its process ends and another will take over, or training is halted there, until it is resumed."""


class Rounds:
    """Runs the rounds that are asked for, one at a time, and keeps the latest one's answer.

    Of one run only a later round, or a later attempt, can be opened; of several,
    only the newest one's. So an old message that comes late spends nothing.

    Args:
        aggregator: whose rounds.
        folder: keeps the latest sum, which is noised, for a process that takes over; made where it is missing.
            One process at a time.
    """

    def __init__(self, aggregator: Aggregator, folder: Path) -> None:
        self._aggregator, self._folder = aggregator, folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="round")
        self._ended: set[str] = set()
        self._latest: tuple[Key, Future[bytes]] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._ended_plan: str | None = None
        if self._kept.exists():
            named, _, released = self._kept.read_bytes().partition(b"\n")
            about = json.loads(named)
            self._ended.update(about["ended"])
            kept: Future[bytes] = Future()
            self._ended_plan = about.get("plan")
            if self._ended_plan is None:
                kept.set_result(released)
            else:
                kept.set_exception(RoundEnded(about["why"]))
            self._latest = Key(*about["key"]), kept

    @property
    def _kept(self) -> Path:
        return self._folder / "latest.sum"

    def open(self, key: Key, flat: Float32) -> None:
        """Begins the round, unless it was begun; one that was stopped, and not for good, is begun again.

        Raises:
            StaleRound: it is older than the latest.
        """
        if self._latest is not None:
            latest, coming = self._latest
            if key == latest and not _may_go_on(coming):
                return
            if key.run in self._ended or (key.run == latest.run and key[1:] < latest[1:]):
                raise StaleRound(f"round {key.number} is over: round {latest.number} was opened since")
            if key.run != latest.run:
                self._ended.add(latest.run)
        self._latest = key, self._thread.submit(self._run, key, flat)

    def end(self, plan: str, order: Order, switch: Switch) -> None:
        """Ends the latest round, whose plan it is, and answers so from now on, also after a restart; again, nothing.

        Raises:
            ConfigError, NotFound: see `Switch.end`.
        """
        if plan != self._ended_plan:
            switch.end(plan, order)
            self._ended_plan = plan
            key, coming = self._latest or (None, None)
            released = coming is not None and coming.done() and coming.exception() is None
            if key is not None and not released:  # with a buffer a plan goes on after its round was released
                self._keep(key, b"", plan=plan, why=order.reason)

    def answer(self, key: Key) -> Future[bytes] | None:
        """The round's sum, or its error, when it comes; None where it is not the latest."""
        return self._latest[1] if self._latest is not None and self._latest[0] == key else None

    def close(self) -> None:
        """Returns when the round that runs is over."""
        self._thread.shutdown(cancel_futures=True)

    def _run(self, key: Key, flat: Float32) -> bytes:
        released = self._aggregator.run_round(key.number, flat).sum.astype(_SUM).tobytes()
        self._keep(key, released)
        return released

    def _keep(self, key: Key, released: bytes, **about: str) -> None:
        named = json.dumps({"key": key, "ended": sorted(self._ended), **about}).encode()
        write_whole(self._kept, named + b"\n" + released)


def _may_go_on(coming: Future[bytes]) -> bool:
    """Whether a round was stopped with its aggregator, or with all training, and by nothing that lasts."""
    error = coming.exception() if coming.done() and not coming.cancelled() else None
    return isinstance(error, RoundStopped) and not isinstance(error, Halted | RoundEnded)


def control_app(
    aggregator: Aggregator, token: str, *, size: int, folder: Path, switch: Switch | None = None
) -> Starlette:
    """Builds the ASGI application in front of an aggregator.

    Args:
        aggregator: its rounds run in one thread of their own.
        token: that every request must show as `Authorization: Bearer TOKEN`.
        size: p, the length of the flat weights: no longer body is read.
        folder: see `Rounds`.
        switch: of an aggregator that fronts devices.

    Raises:
        ConfigError: the token is none.
    """
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from hybrid.http import read_body

    check_token(token)
    rounds = Rounds(aggregator, folder)
    path = "/rounds/{run}/{number}/{attempt}"

    async def put(request: Request) -> Response:
        key = _asked(request)
        rounds.open(key, _flat(await read_body(request, size * _WEIGHTS.itemsize, within_s=WEIGHTS_S), size))
        return PlainTextResponse("open\n", status_code=202)

    async def get(request: Request) -> Response:
        return await _answer(rounds.answer(_asked(request)), _wait_s(request))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        rounds.close()

    async def health(_request: Request) -> Response:
        return PlainTextResponse("ready\n")

    return Starlette(
        routes=[
            Route("/health", health),
            Route(path, _guarded(put, token), methods=["PUT"]),
            Route(path, _guarded(get, token), methods=["GET"]),
            *(
                Route(path, _guarded(handler, token), methods=[method])
                for path, method, handler in _stopping(rounds, switch)
            ),
        ],
        lifespan=lifespan,
    )


def _stopping(rounds: Rounds, found: Switch | None) -> list[tuple[str, str, Handler]]:
    """Path, method and handler of what stops devices, or says how they stand."""
    from starlette.responses import Response

    from hybrid.http import read_body

    def switch() -> Switch:
        if found is None:
            raise _Refused(404, "no_devices", "this aggregator simulates its people: end the training")
        return found

    async def order(request: Request) -> Order:
        return _read(Order, await read_body(request, MAX_HALT))

    async def halt(request: Request) -> Response:
        switch().halt(_read(Halt, await read_body(request, MAX_HALT)))
        return Response(status_code=204)

    async def training(_request: Request) -> Response:
        return Response(switch().training().model_dump_json(), media_type="application/json")

    async def suspend(request: Request) -> Response:
        switch().suspend(await order(request))
        return Response(status_code=204)

    async def resume(request: Request) -> Response:
        switch().resume(await order(request))
        return Response(status_code=204)

    async def end(request: Request) -> Response:
        rounds.end(request.path_params["plan"], await order(request), switch())
        return Response(status_code=204)

    return [
        (HALT, "POST", halt),
        (TRAINING, "GET", training),
        (f"{TRAINING}/halt", "POST", suspend),
        (f"{TRAINING}/resume", "POST", resume),
        ("/plans/{plan}/end", "POST", end),
    ]


Handler = Callable[["Request"], Awaitable["Response"]]


class _Refused(ServingError):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


_REFUSALS: Mapping[type[Exception], tuple[int, str]] = {  # the first that it is
    StaleRound: (410, "stale"),
    CohortTooSmall: (409, "cohort_too_small"),
    BudgetExceeded: (403, "budget_exceeded"),
    Halted: (409, "halted"),
    RoundEnded: (409, "ended"),
    RoundStopped: (503, "stopped"),
    NotFound: (404, "not_open"),
    ConfigError: (400, "bad_request"),
}


def _refused(error: Exception) -> _Refused:
    status, code = next(found for kind, found in _REFUSALS.items() if isinstance(error, kind))
    # Of a cohort not its text: it says how many answered.
    said = "fewer answered than may be released together" if isinstance(error, CohortTooSmall) else str(error)
    return _Refused(status, code, said)


def _guarded(handler: Handler, token: str) -> Handler:
    """Asks for the token, and turns errors into answers."""
    from starlette.responses import JSONResponse

    async def guarded(request: Request) -> Response:
        try:
            if not shown(request.headers.getlist("authorization"), token):
                raise _Refused(401, "unauthenticated", "show the aggregator's token as a bearer token")
            return await handler(request)
        except tuple(_REFUSALS) as error:
            refused: ServingError = _refused(error)
        except ServingError as error:
            refused = error
        return JSONResponse({"error": refused.code, "message": str(refused)}, status_code=refused.status)

    return guarded


def _asked(request: Request) -> Key:
    run, number, attempt = (request.path_params[name] for name in ("run", "number", "attempt"))
    if not _RUN.fullmatch(run) or not all(re.fullmatch(r"[1-9][0-9]{0,8}", text) for text in (number, attempt)):
        raise _Refused(400, "bad_request", "a round is named RUN/NUMBER/ATTEMPT, with numbers from 1")
    return Key(run, int(number), int(attempt))


def _flat(body: bytes, size: int) -> Float32:
    """(size,) weights."""
    if len(body) != size * _WEIGHTS.itemsize:
        raise _Refused(400, "bad_request", f"the weights must be {size} float32, got {len(body)} bytes")
    flat = np.frombuffer(body, dtype=_WEIGHTS).astype(np.float32)
    if not np.isfinite(flat).all():
        raise _Refused(400, "bad_request", "the weights must be finite")
    return flat


def _read(form: type[_Message], body: bytes) -> _Message:
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        fields = sorted({".".join(map(str, fault["loc"])) for fault in error.errors()})
        named = f"{'an' if form is Order else 'a'} {form.__name__}"
        raise _Refused(400, "bad_request", f"the body must be {named} as JSON; wrong: {', '.join(fields)}") from None


def _wait_s(request: Request) -> float:
    try:
        wait_s = float(request.query_params.get("wait_s", "0"))
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= LONGEST_WAIT_S:
        raise _Refused(400, "bad_request", f"wait_s must be in [0, {LONGEST_WAIT_S:g}]")
    return wait_s


async def _answer(coming: Future[bytes] | None, wait_s: float) -> Response:
    from starlette.responses import PlainTextResponse, Response

    if coming is None:
        raise _Refused(404, "unknown_round", "the round was not opened here, or a later one was")
    waiting = asyncio.wrap_future(coming)
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # else the loop would log its text
    await asyncio.wait([waiting], timeout=wait_s)
    if not coming.done():
        return PlainTextResponse("not yet\n", status_code=202)
    error = coming.exception()
    if error is None:
        return Response(coming.result(), media_type="application/octet-stream")
    if isinstance(error, CohortTooSmall | BudgetExceeded | RoundStopped):
        raise error
    # Not its text: that of a library may hold values.
    raise _Refused(500, "failed", f"the round failed with {type(error).__name__}")


@contextmanager
def controlled(app: Starlette, *, host: str, port: int, certificate: Certificate | None = None) -> Iterator[int]:
    """Serves the control side from a thread of its own until the block ends.

    Args:
        app: of `control_app`.
        host: address to listen on.
        port: TCP; 0: a free one.
        certificate: see `hybrid.http.listening`.

    Yields:
        The port.

    Raises:
        ConfigError: others than this machine could connect, and there is no certificate; or it cannot be listened on.
    """
    from hybrid.http import listening

    if certificate is None and not is_loopback(host):
        raise ConfigError(f"certificate must be given where host is not a loopback address, got {host!r}")
    options = {"timeout_keep_alive": 60, "limit_concurrency": CONNECTIONS}
    with listening(app, host, port, name="control", certificate=certificate, **options) as bound:
        yield bound


@dataclass(frozen=True)
class RemoteAggregator:
    """An aggregator behind `control_app`, as a ClientApp uses it.

    Attributes:
        url: https://HOST:PORT, or http:// on this machine.
        token: that the aggregator asks for.
        run: names the training.
        attempt: at the round.
        authority: a PEM file of the certificate authority that signed the aggregator's; by default the system's.
        timeout_s: after which a round is given up, connections that failed included; > 0.

    Raises:
        ConfigError: the URL is no such, the token too short, or the authority no such file.
    """

    url: str
    token: str = field(repr=False)
    run: str
    attempt: int = 1
    authority: Path | None = None
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(f"url must be https://HOST:PORT, got {self.url!r}")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ConfigError(f"url must begin with https:// where the aggregator is elsewhere, got {self.url!r}")
        check_token(self.token)
        if self.authority is not None and not self.authority.is_file():
            raise ConfigError(f"authority must be a PEM file, got {str(self.authority)!r}")

    def run_round(self, number: int, flat: Float32) -> Release:
        """See `hybrid.federation.client_app.Aggregator`; the release says neither how many took part nor the clip.

        A connection that fails is tried again, and so is an aggregator that ends or was started anew: the next
        one gives the release that it kept, or runs the round.

        Raises:
            CohortTooSmall, BudgetExceeded: as there.
            Halted: the version that it trains was.
            RoundEnded: the round was, by who may.
            AggregatorError: it did not answer in time, or refused.
        """
        import httpx

        deadline, pause_s = time.monotonic() + self.timeout_s, RETRY_S
        path = f"/rounds/{self.run}/{number}/{self.attempt}"
        with self._client() as client:
            while time.monotonic() < deadline:
                try:
                    found = self._asked(client, path, flat, deadline)
                except httpx.TransportError:
                    time.sleep(RETRY_S)
                    continue
                except _Ends:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_RETRY_S)
                    continue
                if found is not None:
                    return Release(found, received=0, clip=float("nan"))
        raise AggregatorError(f"the aggregator at {self.url} did not answer round {number} in {self.timeout_s:g} s")

    def halt(self, halt: Halt) -> None:
        """Halts versions of its model, for good.

        Raises:
            AggregatorError: it cannot be reached, or refused.
        """
        self._told("POST", HALT, halt)

    def training(self) -> Training:
        """How its training stands.

        Raises:
            AggregatorError: as in `halt`.
        """
        try:
            return Training.model_validate_json(self._told("GET", TRAINING).content)
        except ValidationError:
            raise AggregatorError(f"the aggregator at {self.url} does not say how its training stands") from None

    def suspend(self, order: Order) -> None:
        """Halts all training there, until it is resumed; raises as `halt`."""
        self._told("POST", f"{TRAINING}/halt", order)

    def resume(self, order: Order) -> None:
        """Training goes on there; raises as `halt`."""
        self._told("POST", f"{TRAINING}/resume", order)

    def end(self, plan: str, order: Order) -> None:
        """Ends the round that a plan is of, unreleased.

        Raises:
            NotFound: the plan is not open.
            AggregatorError: as in `halt`.
        """
        self._told("POST", f"/plans/{plan}/end", order)

    def _told(self, method: str, path: str, said: BaseModel | None = None) -> httpx.Response:
        import httpx

        try:
            with self._client() as client:
                content = None if said is None else said.model_dump_json().encode()
                return _checked(client.request(method, path, content=content))
        except (httpx.TransportError, _Ends) as error:
            raise AggregatorError(
                f"the aggregator at {self.url} did not take it ({type(error).__name__}): ask again"
            ) from None

    def _asked(self, client: httpx.Client, path: str, flat: Float32, deadline: float) -> NDArray[np.float64] | None:
        """Opens the round and waits; None where it must be opened again."""
        _checked(client.put(path, content=flat.astype(_WEIGHTS).tobytes()))
        while (left_s := deadline - time.monotonic()) > 0:
            answer = client.get(path, params={"wait_s": f"{min(left_s, LONGEST_WAIT_S):.3f}"})
            if answer.status_code == 404:
                return None
            if _checked(answer).status_code == 200:
                return _read_sum(answer.content, len(flat))
        return None

    def _client(self) -> httpx.Client:
        import httpx

        verify: Any = ssl.create_default_context(cafile=self.authority) if self.authority else True
        return httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {self.token}"},
            timeout=httpx.Timeout(10.0, read=LONGEST_WAIT_S + 10.0),
            verify=verify,
            trust_env=False,  # through no proxy
        )


def _checked(answer: httpx.Response) -> httpx.Response:
    """The answer, where it is not an error."""
    if answer.status_code < 400:
        return answer
    try:
        told = answer.json()
        code, message = str(told["error"]), str(told["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "", f"it answered with status {answer.status_code}"
    match code:
        case "cohort_too_small":
            raise CohortTooSmall(message)
        case "budget_exceeded":
            raise BudgetExceeded(message)
        case "stale":
            raise StaleRound(message)
        case "halted":
            raise Halted(message)
        case "ended":
            raise RoundEnded(message)
        case "not_open":
            raise NotFound(message)
        case "stopped":
            raise _Ends(message)
    raise AggregatorError(f"the aggregator refused: {message}")


def _read_sum(body: bytes, size: int) -> NDArray[np.float64]:
    if len(body) != size * _SUM.itemsize:
        raise AggregatorError(f"the aggregator's sum must be {size} float64, got {len(body)} bytes")
    total = np.frombuffer(body, dtype=_SUM).astype(np.float64)
    if not np.isfinite(total).all():
        raise AggregatorError("the aggregator's sum is not finite")
    return total
