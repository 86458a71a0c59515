"""How devices reach the aggregator: check-in and upload over HTTP, as `hybrid.plan` says.

Nothing that tells devices apart is read, kept or logged: no header, no address, no id of an upload.
`python -m hybrid.federation.checkin` is the process of an aggregator, until SIGTERM: this side, and beside it the
control side of `hybrid.federation.remote`, over which Flower's ClientApp opens rounds and versions are halted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from hybrid import http
from hybrid.bearer import read_token
from hybrid.bundle import signing_key
from hybrid.errors import ConfigError, HybridError
from hybrid.federation.aggregator import PURPOSE, Round
from hybrid.federation.buffer import Buffer
from hybrid.federation.fleet_aggregator import FleetAggregator, Reply, Task
from hybrid.federation.halts import KillSwitch
from hybrid.federation.issuer import RemoteIssuer
from hybrid.federation.pace import LONGEST_S
from hybrid.federation.remote import control_app, controlled
from hybrid.http import Certificate, TimedHttp
from hybrid.plan import CHECK_IN, CheckIn, Count, Positive
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.matrix import Banded, Buffered, Matrix, Participation, sensitivity
from hybrid.spec import Declared
from hybrid.tokens import Host, ScopeName

log = logging.getLogger(__name__)

HEALTH = "/health"  # for probes: it answers, whether a round is open or not
MAX_CHECK_IN = 1024  # bytes of its body
MAX_DRAINED = 1 << 20  # bytes of a body that are read although it is refused, so that its sender sees the answer
CONNECTIONS = 2048  # at once; those beyond are answered 503 by uvicorn
IN_FLIGHT = 1024  # uploads, and check-ins, at once
IN_FLIGHT_BYTES = 256 << 20  # of uploads that are on their way
BUSY_S = 10.0  # who finds it busy comes again within these
NOISE_STATE = "noise.state"
LARGE = 1 << 20  # bytes of an update that is summed beside the loop, which others wait for
_RANDOM = secrets.SystemRandom()

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_UPDATE_PARTS = 6  # of "/v1/plans/{plan}/updates/{upload}", cut at its slashes
_ID = frozenset("0123456789abcdef")


def application(aggregator: FleetAggregator) -> Application:
    """The ASGI application that devices speak to."""
    check_ins, uploads = _Gate(IN_FLIGHT, IN_FLIGHT_BYTES), _Gate(IN_FLIGHT, IN_FLIGHT_BYTES)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["method"], scope["path"]
        upload = _upload_of(scope["path"])
        with suppress(ConnectionError):  # its sender went away
            if route == ("POST", CHECK_IN):
                with check_ins.room(MAX_CHECK_IN) as room:
                    await _send(send, await _check_in(aggregator, receive) if room else await _busy(receive))
            elif upload is not None and scope["method"] == "PUT":
                expected = aggregator.body_bytes(upload[0])
                with uploads.room(expected or 0) as room:
                    taken = _upload(aggregator, *upload, expected, receive) if room else _busy(receive)
                    await _send(send, await taken)
            elif route == ("GET", HEALTH):
                await _send(send, Reply(200))
            else:
                known = upload is not None or scope["path"] in (CHECK_IN, HEALTH)
                await _send(send, Reply(405 if known else 404))

    return app


@contextmanager
def listening(
    aggregator: FleetAggregator,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    certificate: Certificate | None = None,
) -> Iterator[int]:
    """Serves devices from a thread of its own until the block ends.

    Args:
        aggregator: which.
        host: where, loopback by default.
        port: 0: a free one.
        certificate: None: without TLS, for loopback or behind what ends it.

    Yields:
        The port.

    Raises:
        ConfigError: it cannot be listened on, or the certificate cannot be read.
    """
    app = application(aggregator)
    options = {"http": TimedHttp, "lifespan": "off", "limit_concurrency": CONNECTIONS}
    with http.listening(app, host, port, name="check-in", certificate=certificate, **options) as bound:
        yield bound


class _Gate:
    """How many requests may be on their way at once, and how many bytes of bodies they may have together."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._left, self._left_bytes = most, most_bytes

    @contextmanager
    def room(self, size: int) -> Iterator[bool]:
        """Whether there is room for a body of `size` bytes; it is kept until the end."""
        room = self._left > 0 and self._left_bytes >= size
        taken = (1, size) if room else (0, 0)
        self._left, self._left_bytes = self._left - taken[0], self._left_bytes - taken[1]
        try:
            yield room
        finally:
            self._left, self._left_bytes = self._left + taken[0], self._left_bytes + taken[1]


async def _busy(receive: Receive) -> Reply:
    await _body(receive, 0)
    return Reply(503, retry_after_s=1 + _RANDOM.random() * (BUSY_S - 1))


async def _check_in(aggregator: FleetAggregator, receive: Receive) -> Reply:
    body = await _body(receive, MAX_CHECK_IN)
    if body is None:
        return Reply(413)
    try:
        said = CheckIn.model_validate_json(body)
    except ValidationError:
        return Reply(400)
    return aggregator.check_in(said)


async def _upload(aggregator: FleetAggregator, plan: str, upload: str, expected: int | None, receive: Receive) -> Reply:
    body = await _body(receive, expected or 0)
    if body is None and expected is not None:
        return aggregator.oversize()
    if len(body or b"") >= LARGE:
        return await asyncio.to_thread(aggregator.upload, plan, upload, body or b"")
    return aggregator.upload(plan, upload, body or b"")


async def _body(receive: Receive, most: int) -> bytes | None:
    """All of a request's body; None where it is longer than `most` bytes, and then no more of it is kept.

    Raises:
        ConnectionError: its sender went away.
    """
    parts: list[bytes] = []
    length, more = 0, True
    while more and length <= most + MAX_DRAINED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        part, more = message.get("body", b""), message.get("more_body", False)
        length += len(part)
        if length <= most:
            parts.append(part)
    return b"".join(parts) if length <= most else None


async def _send(send: Send, reply: Reply) -> None:
    headers = [(b"content-length", str(len(reply.body)).encode())]
    if reply.body:
        headers.append((b"content-type", b"application/octet-stream"))
    if reply.retry_after_s is not None:
        seconds = max(1, math.ceil(min(reply.retry_after_s, LONGEST_S)))
        headers.append((b"retry-after", str(seconds).encode()))
    if reply.status in (400, 413):  # there may be more of its body
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


def _upload_of(path: str) -> tuple[str, str] | None:
    """Plan and upload of `hybrid.plan.UPDATE`; None where it is another path."""
    parts = path.split("/")
    if len(parts) != _UPDATE_PARTS or (parts[1], parts[2], parts[4]) != ("v1", "plans", "updates"):
        return None
    plan, upload = parts[3], parts[5]
    return (plan, upload) if all(len(name) == 32 and _ID.issuperset(name) for name in (plan, upload)) else None


class Turns(Declared):
    """How devices take turns, in place of tossing coins.

    Attributes:
        factor: of the noise, that spans the rounds; `Banded((1.0,))`: it does not.
        separation: rounds, or flushes, from one that a device is in to the next, at least.
        buffer: of an asynchronous training; None: rounds close by the clock.
    """

    factor: Banded | Buffered
    separation: Count
    buffer: Buffer | None = None


class Tokens(Declared):
    """The issuer whose tokens updates need: see `hybrid.federation.issuer.RemoteIssuer`.

    Attributes:
        name, url, scope, authority: of it.
    """

    name: Host
    url: str
    scope: ScopeName
    authority: Path | None = None

    def issuer(self, token: str) -> RemoteIssuer:
        """It, shown that token."""
        return RemoteIssuer(name=self.name, url=self.url, token=token, scope=self.scope, authority=self.authority)


class Service(Declared):
    """What the process of an aggregator is told, as JSON.

    Attributes:
        task: what every round asks of devices.
        sampling, clip, noise_multiplier, minimum: of `hybrid.federation.aggregator.Round`.
        turns: None: devices toss coins.
        rounds: that are reserved in the ledger, those it has already among them.
        epsilon, delta: that the ledger allows for all of them, and for others as far as it goes; both None without
            noise, and so without privacy.
        tokens: None: nothing keeps an account with two devices from being counted twice.
    """

    task: Task
    sampling: Annotated[FiniteFloat, Field(gt=0, le=1)]
    clip: Positive
    noise_multiplier: Annotated[FiniteFloat, Field(ge=0)]
    minimum: Annotated[int, Field(ge=0)] = 0
    turns: Turns | None = None
    rounds: Count
    epsilon: Positive | None
    delta: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None
    tokens: Tokens | None = None

    @model_validator(mode="after")
    def _paid(self) -> Self:
        if not (self.noise_multiplier == 0) == (self.epsilon is None) == (self.delta is None):
            raise ValueError("epsilon and delta must be given with noise, and null where noise_multiplier is 0")
        return self

    @property
    def round(self) -> Round:
        """How each of its rounds is sampled, clipped and noised."""
        matrix = None
        if self.turns is not None:
            people = Participation(self.rounds, self.turns.separation)
            matrix = Matrix(self.turns.factor, people, sensitivity(self.turns.factor, people))
        return Round(self.sampling, self.clip, self.noise_multiplier, self.minimum, matrix=matrix)

    @contextmanager
    def aggregator(self, folder: Path, keys: Path, *, issuer_token: str | None = None) -> Iterator[FleetAggregator]:
        """It, with its ledger open.

        Args:
            folder: its own, with the ledger and the state of noise that spans rounds; one process at a time.
            keys: the folder of the control plane's signing key.
            issuer_token: that the issuer's control side asks for, where there are tokens.

        Raises:
            BudgetExceeded: what is left of the rounds would cost more than is allowed.
            ConfigError: the ledger is another's, or the settings are none that a fleet can keep; or there are tokens,
                and no `issuer_token`, or the other way round.
        """
        if (self.tokens is None) != (issuer_token is None):
            raise ConfigError("the issuer's token must be given where the settings have tokens, and else left out")
        windows = None if self.tokens is None or issuer_token is None else self.tokens.issuer(issuer_token)
        settings, buffer = self.round, None if self.turns is None else self.turns.buffer
        with self._account(settings, folder) as account:
            state = folder / NOISE_STATE
            key = signing_key(keys)
            yield FleetAggregator(self.task, settings, account, key, noise_state=state, buffer=buffer, windows=windows)

    @contextmanager
    def _account(self, settings: Round, folder: Path) -> Iterator[Ledger | None]:
        if self.epsilon is None or self.delta is None:
            yield None
            return
        with Ledger.open(folder, budget_epsilon=self.epsilon, delta=self.delta) as account:
            # A horizon is paid for by its first step, so one that was begun is not reserved again: without the state
            # of its noise another one would begin, for which nothing is left.
            done = sum(entry.purpose == PURPOSE for entry in account.entries)
            left = max(0, self.rounds - done) if self.turns is None else self.rounds * (done == 0)
            if left:
                account.reserve([settings.of(left)])
            yield account


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=Path, required=True, help="JSON, see Service")
    parser.add_argument(
        "--folder", type=Path, required=True, help="its own: ledger, last sum, halts; made where missing"
    )
    parser.add_argument("--keys", type=Path, required=True, help="folder of the signing key")
    parser.add_argument("--token", type=Path, required=True, help="file with what the control side asks for")
    parser.add_argument(
        "--issuer-token", type=Path, default=None, help="file with what the issuer's control side asks for, see Tokens"
    )
    sides = {"": ("devices", 8090), "control-": ("the ClientApp", 8091)}
    for side, (whose, port) in sides.items():
        http.add_side(parser, side, whose, port)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    devices, control = (http.certificate_of(arguments, parser, side) for side in sides)
    try:
        _serve(arguments, devices, control)
    except HybridError as error:
        raise SystemExit(f"aggregator: {error}") from None


def _serve(arguments: argparse.Namespace, devices: Certificate | None, control: Certificate | None) -> None:
    """Both sides, until the process is told to end."""
    service, token, ended = Service.read(arguments.settings), read_token(arguments.token), http.told_to_end()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    issuer_token = None if arguments.issuer_token is None else read_token(arguments.issuer_token)
    with service.aggregator(folder, arguments.keys, issuer_token=issuer_token) as aggregator:
        switch = KillSwitch(aggregator, service.task.model, folder)
        parameters = service.task.parameters
        app = control_app(aggregator, token, size=parameters, folder=folder / "release", switch=switch)
        with (
            listening(aggregator, arguments.host, arguments.port, certificate=devices) as port,
            controlled(
                app, host=arguments.control_host, port=arguments.control_port, certificate=control
            ) as control_port,
        ):
            print(f"devices check in at port {port}, the ClientApp at port {control_port}", flush=True)
            ended.wait()
            aggregator.stop("its process ends")
        refused = ", ".join(f"{count} {reason}" for reason, count in sorted(aggregator.refused.items()))
        log.info("uploads not taken: %s", refused or "none")


if __name__ == "__main__":
    main()
