"""An aggregator's control side over HTTP: whoever holds its token opens a round, and is given one noised sum.

| request | answer |
|---|---|
| `PUT /rounds/RUN/NUMBER/ATTEMPT`, the weights as little-endian float32 | 202: it is open, whoever asked first |
| `GET /rounds/RUN/NUMBER/ATTEMPT?wait_s=S` | 200 the sum as little-endian float64; 202 not yet; 404 never opened here |
| `POST /halt`, a `hybrid.plan.Halt` as JSON | 204: it holds, and will after a restart; where there are devices |
| `GET /health` | 200, without a token |

What cannot be is a JSON object of `error` and `message`: 400 `bad_request`, 401 `unauthenticated`,
403 `budget_exceeded`, 409 `cohort_too_small` or `halted`, 410 `stale`, 413 `body_too_large`, 500 `failed`,
503 `stopped`: its process ends, and the next one is to be asked.

A round has one answer: asked again, also after a crash, the same bytes come, since a sum is on the disk before
it leaves. How many took part does not leave (docs/decisions/0009).
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from hybrid.bearer import check_token, shown
from hybrid.errors import (
    AggregatorError,
    BudgetExceeded,
    CohortTooSmall,
    ConfigError,
    Halted,
    RoundStopped,
    ServingError,
)
from hybrid.features import Float32
from hybrid.files import write_whole
from hybrid.plan import Halt
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
WEIGHTS_S = 300.0  # for a round's weights to come
CONNECTIONS = 128  # at once
MAX_HALT = 64 << 10  # bytes of its body

HALT = "/halt"

_WEIGHTS, _SUM = np.dtype("<f4"), np.dtype("<f8")
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


class StaleRound(AggregatorError):
    """A later round, or a later run, was opened since: this one is not run any more."""


class _Ends(AggregatorError):
    """Its process ends; another will take over."""


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
        if self._kept.exists():
            named, _, released = self._kept.read_bytes().partition(b"\n")
            about = json.loads(named)
            self._ended.update(about["ended"])
            kept: Future[bytes] = Future()
            kept.set_result(released)
            self._latest = Key(*about["key"]), kept

    @property
    def _kept(self) -> Path:
        return self._folder / "latest.sum"

    def open(self, key: Key, flat: Float32) -> None:
        """Begins the round, unless it was begun.

        Raises:
            StaleRound: it is older than the latest.
        """
        if self._latest is not None:
            latest = self._latest[0]
            if key == latest:
                return
            if key.run in self._ended or (key.run == latest.run and key[1:] < latest[1:]):
                raise StaleRound(f"round {key.number} is over: round {latest.number} was opened since")
            if key.run != latest.run:
                self._ended.add(latest.run)
        self._latest = key, self._thread.submit(self._run, key, flat)

    def answer(self, key: Key) -> Future[bytes] | None:
        """The round's sum, or its error, when it comes; None where it is not the latest."""
        return self._latest[1] if self._latest is not None and self._latest[0] == key else None

    def close(self) -> None:
        """Returns when the round that runs is over."""
        self._thread.shutdown(cancel_futures=True)

    def _run(self, key: Key, flat: Float32) -> bytes:
        released = self._aggregator.run_round(key.number, flat).sum.astype(_SUM).tobytes()
        about = {"key": key, "ended": sorted(self._ended)}
        write_whole(self._kept, json.dumps(about).encode() + b"\n" + released)
        return released


def control_app(
    aggregator: Aggregator, token: str, *, size: int, folder: Path, halt: Callable[[Halt], None] | None = None
) -> Starlette:
    """Builds the ASGI application in front of an aggregator.

    Args:
        aggregator: its rounds run in one thread of their own.
        token: that every request must show as `Authorization: Bearer TOKEN`.
        size: p, the length of the flat weights: no longer body is read.
        folder: see `Rounds`.
        halt: the kill switch of an aggregator that fronts devices; raises ConfigError for what it cannot halt.

    Raises:
        ConfigError: the token is none.
    """
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, Response
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

    async def kill(request: Request) -> Response:
        if halt is None:
            raise _Refused(404, "no_devices", "this aggregator simulates its people: end the training")
        halt(_halt(await read_body(request, MAX_HALT)))
        return Response(status_code=204)

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
            Route(HALT, _guarded(kill, token), methods=["POST"]),
        ],
        lifespan=lifespan,
    )


Handler = Callable[["Request"], Awaitable["Response"]]


class _Refused(ServingError):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def _guarded(handler: Handler, token: str) -> Handler:
    """Asks for the token, and turns errors into answers."""
    from starlette.responses import JSONResponse

    async def guarded(request: Request) -> Response:
        try:
            if not shown(request.headers.getlist("authorization"), token):
                raise _Refused(401, "unauthenticated", "show the aggregator's token as a bearer token")
            return await handler(request)
        except StaleRound as error:
            refused: ServingError = _Refused(410, "stale", str(error))
        except CohortTooSmall:  # not its text: it says how many did
            refused = _Refused(409, "cohort_too_small", "fewer answered than may be released together")
        except BudgetExceeded as error:
            refused = _Refused(403, "budget_exceeded", str(error))
        except Halted as error:
            refused = _Refused(409, "halted", str(error))
        except RoundStopped as error:
            refused = _Refused(503, "stopped", str(error))
        except ConfigError as error:
            refused = _Refused(400, "bad_request", str(error))
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


def _halt(body: bytes) -> Halt:
    try:
        return Halt.model_validate_json(body)
    except ValidationError as error:
        fields = sorted({".".join(map(str, fault["loc"])) for fault in error.errors()})
        raise _Refused(400, "bad_request", f"the body must be a Halt as JSON; wrong: {', '.join(fields)}") from None


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
            AggregatorError: it did not answer in time, or refused.
        """
        import httpx

        deadline = time.monotonic() + self.timeout_s
        path = f"/rounds/{self.run}/{number}/{self.attempt}"
        with self._client() as client:
            while time.monotonic() < deadline:
                try:
                    found = self._asked(client, path, flat, deadline)
                except (httpx.TransportError, _Ends):
                    time.sleep(RETRY_S)
                    continue
                if found is not None:
                    return Release(found, received=0, clip=float("nan"))
        raise AggregatorError(f"the aggregator at {self.url} did not answer round {number} in {self.timeout_s:g} s")

    def halt(self, halt: Halt) -> None:
        """Halts versions of its model, for good.

        Raises:
            AggregatorError: it cannot be reached, or refused.
        """
        import httpx

        try:
            with self._client() as client:
                _checked(client.post(HALT, content=halt.model_dump_json().encode()))
        except (httpx.TransportError, _Ends) as error:
            raise AggregatorError(
                f"the aggregator at {self.url} did not take the halt ({type(error).__name__}): ask again"
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
