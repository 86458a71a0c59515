"""Plans and what devices send back: how a device takes part in training and answers queries, over HTTP.

A device asks `POST CHECK_IN` with a `CheckIn` as JSON, and is answered

    200  a signed message: a `TrainPlan` with its weights, a `QueryPlan` with its payload, or a `Halt`
    204  nothing to do; `Retry-After` says in how many seconds to ask again
    429, 503  the same, for a server that is busy

and sends its update, or its answer, once, `PUT UPDATE` with the upload's own random id in the path, which is answered

    200  it is counted, now or by an earlier attempt: a repeat of the same bytes is answered alike, and counted once
    429, 503  not taken; again after `Retry-After`, with the same id and bytes
    other 4xx  it will never be taken: 404 no such plan, 409 that id came with other bytes, or its token under another
               id, 403 its token is none of the plan's window, 410 the plan has ended, 413 or 400 its body is none of
               the plan's; the device deletes it

Where a plan has a `token`, the body is a token of that window (`hybrid.tokens`), and the update behind it.

Neither a check-in nor an update names the device or the person, and no header tells devices apart: what is the same for
a whole cohort is in the plan, and what is not is the update.

A signed message is 64 bytes of Ed25519 signature (RFC 8032), then the length of the JSON as 4 bytes, little-endian, the
JSON, and raw float32 numbers, little-endian, where the plan has some. The signature is over `CONTEXT` and all that
follows it: the key is the control plane's, which signs bundles too, and neither may pass for the other. Devices have
the public half from their host app.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from hybrid.errors import PlanError
from hybrid.query import Query
from hybrid.tokens import Window
from hybrid.trust import Trusted

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CHECK_IN = "/v1/check-in"
UPDATE = "/v1/plans/{plan}/updates/{upload}"
CONTEXT = b"hybrid plan 1\0"
MAX_BYTES = 64 << 20  # of a signed message
MAX_JSON = 64 << 10  # of its JSON
MAX_PARAMETERS = (MAX_BYTES - MAX_JSON - 128) // 4
MAX_PAYLOAD = 1 << 18  # numbers that a query brings along
QUERY_RUNTIME = 2  # of the first devices that know a `QueryPlan`: others are given none
TOKEN_RUNTIME = 3  # of the first devices that know a plan's `token`: others are given no plan that has one
JOURNAL_RUNTIME = 4  # of the first devices that know a query's `week`
SIGNATURE = 64
_LENGTH = struct.Struct("<I")

Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Share = Annotated[FiniteFloat, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Milliseconds = Annotated[int, Field(ge=0, lt=1 << 53)]  # Unix time in UTC; exact in a browser too


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Policy(_Message):
    """When a device may take part, decided on the device: every condition must hold, as long as it takes part.

    Attributes:
        charging: whether it must be on external power.
        battery: least charge, as a share; what a device without a battery reports is 1.
        idle: whether nobody may be using it.
        unmetered: whether the network must be free of charge by volume.
        thermal: warmest state that is allowed, as Android and iOS name them.
        free_mb: least free space where the store lies.
        separation_s: least time since it last took part.
        participations: most within `period_s`.
    """

    charging: bool = True
    battery: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.3
    idle: bool = True
    unmetered: bool = True
    thermal: Literal["nominal", "fair", "serious"] = "nominal"
    free_mb: Annotated[int, Field(ge=0, lt=1 << 31)] = 64
    separation_s: Annotated[FiniteFloat, Field(ge=0)] = 86_400.0
    participations: Count = 1
    period_s: Positive = 86_400.0


class Local(_Message):
    """What a device does with its examples: as `LocalTraining` and `hybrid.spec.Training` say.

    Attributes:
        steps, epochs: one of them; the other is None.
        lr, batch, proximal: of `LocalTraining`.
        tower_dropout: share of rows that train without the server's, and of those that train without the device's side.
        keep: of `LocalTraining`; absent where all examples are taken. A device that is older than it refuses a plan
            that has it: it would train with other examples than the version's correction is for.
    """

    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    lr: Positive
    batch: Count | None = None
    proximal: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    tower_dropout: Annotated[FiniteFloat, Field(ge=0, lt=0.5)] = 0.0
    keep: tuple[Share, Share] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("one of steps and epochs must be given")
        if self.lr * self.proximal > 1:
            raise ValueError("lr x proximal must be at most 1, else it overshoots")
        return self


class Turn(_Message):
    """Which steps of a training's fixed horizon an update may be released in, where devices take turns.

    A device takes part where `first_step` is at least `separation` after the last step in which an update that it
    began before may be. Nothing but the device sees to that: see docs/decisions/0027.

    Attributes:
        training: names the horizon; steps of one say nothing of another's, which is paid for by itself.
        first_step, last_step: from 1; the same in a round that all begin and end together.
        separation: steps from one that an update of a device is in to the next, at least.
    """

    training: Id
    first_step: Count
    last_step: Count
    separation: Count

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.first_step > self.last_step:
            raise ValueError("first_step must be at most last_step")
        return self


class TrainPlan(_Message):
    """What a cohort is asked to do once: train from these weights, and send a clipped update.

    Attributes:
        id: of the round's attempt; a device takes part in it at most once.
        model, version, definition_hash: whose training program; a device with another bundle does not take part.
        sampling: with this probability a device takes part, by a toss of its own; in (0, 1].
        turn: which steps an update for it may be in, where devices take turns; None: they toss coins.
        expires_ms: Unix time in UTC, from which on no update is taken.
        policy: when it may.
        examples: least and most it may train with; with fewer it does not take part, of more it takes the newest.
        seconds, memory_mb: of the training, at most.
        local: how it trains.
        clip: largest L2 norm of the flat update.
        upload: how the update travels: as float32, or in 8 bits by `hybrid.update`.
        parameters: length of the flat vector of weights.
        token: the window of which each update needs a token; None: none is asked for. All of a cohort have the same,
            signed: an issuer cannot tell devices by keys of their own.
    """

    kind: Literal["train"] = "train"
    format: Literal[1] = 1
    id: Id
    model: Name
    version: Count
    definition_hash: Digest
    sampling: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0
    turn: Turn | None = None
    expires_ms: Milliseconds
    policy: Policy = Policy()
    examples: tuple[Count, Count] = (1, 1024)
    seconds: Positive = 60.0
    memory_mb: Count = 512
    local: Local
    clip: Positive
    upload: Literal["float32", "int8"] = "float32"
    parameters: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)]
    token: Window | None = None

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.examples[0] > self.examples[1]:
            raise ValueError("examples must be the least and the most, in this order")
        return self

    @property
    def attached(self) -> int:
        """Numbers that travel behind it: the weights."""
        return self.parameters


class QueryPlan(_Message):
    """What everybody is asked once: to count over their own rows, and to send one vector of bounded norm.

    Nobody tosses a coin and nobody waits for a turn: who answers may be known, and a device without rows answers too.

    Attributes:
        id, model, version, definition_hash, expires_ms, policy: see `TrainPlan`; a query that reads scores is about
            this version's.
        seconds: of the counting, at most.
        query: what is asked; of a device at most `query.rows` rows are read.
        token: see `TrainPlan`.

    Raises:
        ValueError: (pydantic's) the query is none, or its payload would have more than `MAX_PAYLOAD` numbers.
    """

    kind: Literal["query"] = "query"
    format: Literal[1] = 1
    id: Id
    model: Name
    version: Count
    definition_hash: Digest
    expires_ms: Milliseconds
    policy: Policy = Policy()
    seconds: Positive = 60.0
    query: Query
    token: Window | None = None

    @model_validator(mode="after")
    def _carried(self) -> Self:
        if self.attached > MAX_PAYLOAD:
            raise ValueError(
                f"statistics x (counts + 1) of a query with spread must be at most {MAX_PAYLOAD}, got {self.attached}"
            )
        return self

    @property
    def attached(self) -> int:
        """Numbers that travel behind it: the payload of a query with `spread`."""
        query = self.query
        return 0 if query.spread is None else len(query.spread) * (query.counts + 1)

    @property
    def sampling(self) -> float:
        """Everybody is asked."""
        return 1.0

    @property
    def turn(self) -> None:
        """None: turns are a training's."""
        return

    @property
    def clip(self) -> float:
        """Largest L2 norm of an answer."""
        return self.query.norm

    @property
    def upload(self) -> Literal["float32"]:
        """How an answer travels."""
        return "float32"

    @property
    def parameters(self) -> int:
        """Length of an answer."""
        return self.query.size


Plan = TrainPlan | QueryPlan


class Halt(_Message):
    """The kill switch: a device stops to predict and to train with these versions, until it has another.

    Attributes:
        model: whose.
        versions: which; a bundle of one of them is not installed any more either.
        reason: for the person and the log.
    """

    kind: Literal["halt"] = "halt"
    format: Literal[1] = 1
    model: Name
    versions: Annotated[tuple[Count, ...], Field(min_length=1, max_length=1000)]
    reason: Annotated[str, Field(min_length=1, max_length=500)]


class CheckIn(_Message):
    """What a device says when it asks for something to do: nothing that tells it from others with its version.

    Attributes:
        model, version: of its bundle. Without a version it comes to report what its journal says, whatever it has.
        runtime: `device_runtime.RUNTIME`.
    """

    model: Name
    version: Count | None = None
    runtime: Count


_SIGNED: TypeAdapter[Plan | Halt] = TypeAdapter(Annotated[TrainPlan | QueryPlan | Halt, Field(discriminator="kind")])


def sign(message: Plan | Halt, key: Ed25519PrivateKey, numbers: NDArray[np.float32] | None = None) -> bytes:
    """A message as it travels.

    Args:
        message: what is asked.
        key: the control plane's.
        numbers: (message.attached,) finite: the weights of a `TrainPlan`, the payload of a `QueryPlan` with `spread`;
            None where there are none.

    Raises:
        PlanError: the numbers are not the message's, or its JSON is too long: no device would take it.
    """
    # Without what is None: a device that knows no turns, keep, tokens or weeks reads plans that have none.
    text = message.model_dump_json(exclude_none=True).encode()
    values = np.zeros(0, np.float32) if numbers is None else numbers
    _check(message, len(text), values)
    body = _LENGTH.pack(len(text)) + text + np.ascontiguousarray(values, "<f4").tobytes()
    return key.sign(CONTEXT + body) + body


def open_signed(data: bytes, trusted: Trusted, *, most: int = MAX_BYTES) -> tuple[Plan | Halt, NDArray[np.float32]]:
    """Verifies a message; nothing of it is read before that.

    Args:
        data: as it came.
        trusted: the host app's key, or keys, never one that came with a message.
        most: bytes that are looked at.

    Returns:
        It, and its weights or payload, read-only; none for a `Halt`.

    Raises:
        PlanError: too large, not signed by that key, of another format, or with other numbers than it says.
    """
    from cryptography.exceptions import InvalidSignature

    if len(data) > most:
        raise PlanError(f"a signed message has at most {most} bytes, got {len(data)}")
    body = data[SIGNATURE:]
    try:
        trusted.verify(data[:SIGNATURE], CONTEXT + body)
        (length,) = _LENGTH.unpack_from(body)
        begin = _LENGTH.size + length
        if length > MAX_JSON or len(body) < begin or (len(body) - begin) % 4:
            raise PlanError("the plan is damaged: its parts are not as long as it says")
        message = _SIGNED.validate_json(body[_LENGTH.size : begin])
    except InvalidSignature:
        raise PlanError("the plan is not signed by the key this device trusts") from None
    except ValidationError as error:
        raise PlanError(f"the plan is of another format: {error.error_count()} fields differ") from None
    except struct.error:
        raise PlanError("the plan is damaged: it has no length") from None
    numbers = np.frombuffer(body[begin:], "<f4").astype(np.float32)  # a copy: aligned, and the plan's bytes can go
    numbers.flags.writeable = False
    _check(message, length, numbers)
    return message, numbers


def _check(message: Plan | Halt, length: int, numbers: NDArray[np.float32]) -> None:
    """What both sides hold a message to."""
    expected = 0 if isinstance(message, Halt) else message.attached
    what = "numbers of payload" if isinstance(message, QueryPlan) else "weights"
    if numbers.shape != (expected,) or not np.isfinite(numbers).all():
        raise PlanError(f"the plan must have {expected} finite {what}, got shape {numbers.shape}")
    if length > MAX_JSON:
        raise PlanError(f"the plan must have at most {MAX_JSON} bytes of JSON, got {length}")
