"""The four stages of a merge, each a function: decode -> features -> forward -> encode.

Columnar throughout: rows of many requests, of many records, go through Feast and
Triton together. A row without one side carries the reason to the end, with what
answers in its place: what the model declares, or nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.deployment import Deployment
from hybrid.errors import (
    BadRequest,
    MissingDevice,
    SchemaDrift,
    StaleFeatures,
    Unavailable,
    UnknownEntity,
    UnknownModel,
)
from hybrid.messages import BadMessage, DeadLetter, DeviceEmbeddings, Predictions
from hybrid.protocol import CACHED, CONSTANT, DEVICE_ONLY, NONE, OK, SERVER_ONLY, answered
from serving.exchange import DEADLINE_S, MAX_RECORD_BYTES
from serving.kafka import Record
from serving.topics import PARTITIONS
from serving.triton import Models

if TYPE_CHECKING:
    from hybrid.sealing import SealingKey

log = logging.getLogger(__name__)

ERROR = "error"  # declared in place of a fallback
MAX_BATCH_ROWS = 2048  # of one forward pass and of one answer; a Triton model takes 4096
MAX_NAME_BYTES = 256  # of a model; every answer repeats it
ROW_BYTES = 128  # of an answer's row beside what the server contributes, at most
Find = Callable[[str, int], Deployment | None]
_Traced = tuple[DeviceEmbeddings, tuple[str, ...]]  # a message, and the traces of its record


class PackedRows(Protocol):
    """What a feature store says about n entities; see `Reader`."""

    @property
    def slots(self) -> NDArray[np.float32]:
        """(n, s) server slots."""

    @property
    def age_ms(self) -> NDArray[np.int64]:
        """(n,) age of each row; -1 where there is none. Where the status is "unavailable": of what was last read."""

    @property
    def status(self) -> NDArray[np.object_]:
        """(n,) "ok", or the code of the `ServingError` that says why not."""


class Reader(Protocol):
    """The online feature store, for one deployment."""

    def read(self, entities: Sequence[str], now_ms: int) -> PackedRows:
        """The packed rows of some entities, repeats allowed, in their order."""


@dataclass(frozen=True)
class Batch:
    """Rows of one deployment, out of one record or several.

    Attributes:
        deployment: the version that answers.
        reply_partition: (n,) where each row's gateway waits.
        request_id, entity, request, embedding, event_ms: as in `DeviceEmbeddings`, of the deployment's widths.
        traces: of the records with rows in it.
        wants_server: as in `DeviceEmbeddings`; None: no row does.
        deadline_ms: as in `DeviceEmbeddings`; None: of no row known.
        wants_slots: as in `DeviceEmbeddings`; None: no row does.
    """

    deployment: Deployment
    reply_partition: NDArray[np.int64]
    request_id: NDArray[np.void]
    entity: NDArray[np.object_]
    request: NDArray[np.float32]
    embedding: NDArray[np.float32]
    event_ms: NDArray[np.int64]
    traces: tuple[str, ...] = ()
    wants_server: NDArray[np.bool_] | None = None
    deadline_ms: NDArray[np.int64] | None = None
    wants_slots: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.request_id)

    @property
    def on_device(self) -> bool:
        """Whether the device merges: then the server's embedding is all that is computed."""
        return self.deployment.merge == "device"

    @cached_property
    def without_device(self) -> NDArray[np.bool_]:
        """(n,) whether the request came without an embedding that the merge needs."""
        absent = np.isnan(self.embedding).all(axis=1)  # also where it has no numbers at all
        return np.asarray(absent & (not self.on_device), dtype=bool)

    @property
    def gives_server(self) -> NDArray[np.bool_]:
        """(n,) whether the answer is to hold the server's embedding; whoever writes to the topic may want anything."""
        if self.on_device or self.wants_server is None or not self.deployment.serving.contribution:
            return np.full(len(self), self.on_device)
        return self.wants_server

    @property
    def gives_slots(self) -> NDArray[np.bool_]:
        """(n,) whether the answer is to hold what goes into the server tower; see `gives_server`."""
        if self.wants_slots is None or not self.deployment.server_slots:
            return np.zeros(len(self), bool)
        return self.wants_slots

    def ends_ms(self, now_ms: int, deadline_s: float) -> NDArray[np.int64]:
        """(n,) when each row is waited for no longer: at its deadline, but at most `deadline_s` after it was asked.

        Whoever may write to the topic may write any number: no row was asked later than now, none waits longer.
        """
        ends = np.clip(self.event_ms, 0, now_ms) + int(1000 * deadline_s)
        return ends if self.deadline_ms is None else np.minimum(ends, self.deadline_ms)


@dataclass(frozen=True)
class Decoded:
    """What some records hold: rows to merge, rows refused at once, records that cannot be read."""

    batches: list[Batch]
    refused: list[Predictions]
    dead: list[DeadLetter]


@dataclass(frozen=True)
class Joined:
    """The server's side of a batch.

    Attributes:
        slots: (n, server + request); meaningless where the server's side is missing.
        age_ms: (n,) of the server features; -1 where there are none.
        status: (n,) "ok", or the code that says which side is missing, and why.
        fallback: (n,) what answers in its place; "none": nothing, the row is an error unless its status is "ok".
        read_ms: when the features were as old as `age_ms` says, Unix time in UTC.
    """

    slots: NDArray[np.float32]
    age_ms: NDArray[np.int64]
    status: NDArray[np.object_]
    fallback: NDArray[np.object_]
    read_ms: int = 0

    @cached_property
    def with_server(self) -> NDArray[np.bool_]:
        """(n,) whether the server tower is asked."""
        merged = (self.status == OK) & (self.fallback == NONE)
        return np.asarray(merged | np.isin(self.fallback, [SERVER_ONLY, CACHED]), dtype=bool)


@dataclass(frozen=True)
class Merged:
    """What the networks say of a batch.

    Attributes:
        prediction: (n,) probabilities; NaN where nothing answers, and everywhere if the device merges.
        server: (n, a) the server's side of the merge; NaN where there is none.
    """

    prediction: NDArray[np.float32]
    server: NDArray[np.float32]


Sample = Callable[[Batch, Joined, NDArray[np.float32], int], None]  # batch, joined, predictions, when


def decode(
    records: Sequence[Record],
    find: Find,
    key: SealingKey | None = None,
    reply_partitions: int = PARTITIONS[Predictions.TOPIC],
) -> Decoded:
    """Bytes -> rows, merged by deployment; nothing is checked again after this but single values.

    Args:
        records: polled together.
        find: (model, version) -> the deployment that answers, if there is one.
        key: seals the bytes of records that cannot be read.
        reply_partitions: of the topic of answers: a record that asks for another cannot be answered.
    """
    parts: dict[tuple[str, int], list[_Traced]] = defaultdict(list)
    refused: list[Predictions] = []
    dead: list[DeadLetter] = []
    for record in records:
        try:
            message = _readable(record, reply_partitions)
        except BadMessage as error:
            dead.append(record.dead_letter(error, key))
            continue
        reason = _misfit(message, find(message.model, message.version))
        if reason is None:
            parts[message.model, message.version].append((message, record.traces))
        else:
            refused += refusals(message, reason)
    batches = [batch for key, messages in parts.items() for batch in _batches(find(*key), messages)]
    return Decoded(batches, refused, dead)


def features(batch: Batch, reader: Reader, now_ms: int, deadline_s: float = DEADLINE_S) -> Joined:
    """The server's slots of each row, the request's beside them, and what answers where a side is missing.

    A row that nobody waits for any more (see `Batch.ends_ms`) is "unavailable": after an
    outage, those who gave up cost those who still wait nothing. The gateways' clocks and
    ours must agree to well below what callers wait.
    """
    n, width = len(batch), len(batch.deployment.server)
    status = np.full(n, OK, dtype=object)
    status[batch.without_device] = MissingDevice.code
    status[~(batch.without_device | np.isfinite(batch.embedding).all(axis=1))] = BadRequest.code
    late = now_ms > batch.ends_ms(now_ms, deadline_s)
    status[late] = Unavailable.code
    slots, age_ms = np.zeros((n, width), np.float32), np.full(n, -1, np.int64)
    asked = np.isin(status, [OK, MissingDevice.code])
    server = np.full(n, OK, dtype=object)
    if asked.any():
        slots[asked], age_ms[asked], server[asked] = _read(reader, batch.entity[asked].tolist(), now_ms, width)
    status[server != OK] = server[server != OK]
    fallback = np.where(late, NONE, _fallback(batch, status, age_ms >= 0))
    age_ms[(status == Unavailable.code) & (fallback != CACHED)] = -1
    return Joined(np.concatenate([slots, batch.request], axis=1), age_ms, status, fallback, now_ms)


def _read(reader: Reader, entities: list[str], now_ms: int, width: int) -> tuple[Any, Any, Any]:
    """Slots, ages and statuses; all "unavailable" where the store fails."""
    try:
        rows = reader.read(entities, now_ms)
    except Exception as error:
        # The class alone: a store's message can quote the entity.
        log.error("the feature store does not answer for %d rows: %s", len(entities), type(error).__name__)
        return np.zeros((len(entities), width), np.float32), -1, Unavailable.code
    return rows.slots, rows.age_ms, rows.status


def _fallback(batch: Batch, status: NDArray[np.object_], last: NDArray[np.bool_]) -> NDArray[np.object_]:
    """(n,) what the model declares for each row's status; `last`, where features read before can take its place."""
    serving = batch.deployment.serving
    none_kept = ERROR if serving.constant is None else CONSTANT
    without_server = {
        UnknownEntity.code: serving.missing_entity,
        StaleFeatures.code: serving.stale_features,
        SchemaDrift.code: serving.stale_features,
        Unavailable.code: serving.unavailable,
    }
    declared = np.full(len(batch), NONE, dtype=object)
    declared[status == MissingDevice.code] = serving.missing_device
    for code, answer in without_server.items():
        here = status == code
        declared[here & ~batch.without_device] = none_kept if answer == CACHED else answer
        if answer == CACHED:
            declared[here & last] = CACHED
        # With both sides missing nothing is left to predict from.
        both = ERROR if ERROR in (answer, serving.missing_device) or serving.constant is None else CONSTANT
        declared[here & batch.without_device] = both
    declared[declared == ERROR] = NONE
    return declared


def forward(batch: Batch, joined: Joined, models: Models, until_s: float = math.inf) -> Merged:
    """The server tower, then the head unless the device merges; by `until_s`, `time.monotonic`, both.

    In the place of a missing side stands the embedding that was learned for it.
    An extreme embedding can overflow the head: that row too gets no finite number, and no other row is touched.

    Raises:
        Unavailable: Triton failed, or did not give one number a row.
    """
    server = _server_side(batch, joined, models, until_s)
    if batch.on_device:
        return Merged(np.full(len(batch), np.nan, np.float32), server)
    return Merged(_predicted(batch, joined, server, models, until_s), server)


def _server_side(batch: Batch, joined: Joined, models: Models, until_s: float) -> NDArray[np.float32]:
    """(n, a): of the tower, or learned for a missing side; NaN where neither is merged."""
    served = batch.deployment
    server = np.full((len(batch), served.server_embedding), np.nan, np.float32)
    if served.missing_server:
        server[joined.fallback == DEVICE_ONLY] = served.missing_server
    with_server = joined.with_server
    if with_server.any():
        slots = {"slots": joined.slots[with_server]}
        server[with_server] = models.infer(served.server_tower, served.version, slots, "embedding", until_s)
    return server


def _predicted(
    batch: Batch, joined: Joined, server: NDArray[np.float32], models: Models, until_s: float
) -> NDArray[np.float32]:
    """(n,) probabilities of the head; NaN where nothing answers."""
    served = batch.deployment
    prediction = np.full(len(batch), np.nan, np.float32)
    if served.serving.constant is not None:
        prediction[joined.fallback == CONSTANT] = served.serving.constant
    asked = joined.with_server | (joined.fallback == DEVICE_ONLY)
    if not asked.any():
        return prediction
    device = batch.embedding
    if batch.without_device.any():
        learned = np.array(served.missing_device or np.nan, np.float32)
        device = np.where(batch.without_device[:, None], learned, device)
    both = {"server": server[asked], "device": device[asked]}
    answer = models.infer(served.head, served.version, both, "prediction", until_s).reshape(-1)
    if len(answer) != asked.sum():
        raise Unavailable(f"Triton model {served.head!r} version {served.version} gave no prediction per row")
    prediction[asked] = answer
    return prediction


def encode(batch: Batch, joined: Joined, merged: Merged) -> list[Predictions]:
    """One message for each gateway that waits."""
    served = batch.deployment
    given, server = batch.gives_server, merged.server
    lacking = np.zeros(len(batch), bool) if batch.on_device else ~np.isfinite(merged.prediction)
    if given.any():
        lacking |= given & (joined.fallback != CONSTANT) & ~np.isfinite(server).all(axis=1)
    else:
        server = server[:, :0]
    # Of a row that no tower was asked about they mean nothing.
    given_slots, slots = batch.gives_slots & joined.with_server, joined.slots
    if batch.gives_slots.any():
        lacking |= given_slots & np.isinf(slots).any(axis=1)
    else:
        slots = slots[:, :0]
    overflowed = answered(joined.status, joined.fallback) & lacking
    lives_ms = int(1000 * served.max_feature_age_s) - joined.age_ms
    columns = {
        "request_id": batch.request_id,
        "status": np.where(overflowed, Unavailable.code, joined.status),
        "fallback": np.where(overflowed, NONE, joined.fallback),
        "prediction": merged.prediction,
        "feature_age_ms": joined.age_ms,
        "expires_ms": np.where(joined.with_server & ~overflowed, joined.read_ms + lives_ms, -1),
        "server_embedding": np.where((given & ~overflowed)[:, None], server, np.float32(np.nan)),
        "server_slots": np.where((given_slots & ~overflowed)[:, None], slots, np.float32(np.nan)),
    }
    return [
        Predictions(served.model, served.version, int(p), **_rows(columns, batch.reply_partition == p))
        for p in np.unique(batch.reply_partition)
    ]


def merge(
    batch: Batch,
    reader_of: Callable[[Deployment], Reader],
    models: Models,
    now_ms: int,
    deadline_s: float = DEADLINE_S,
    *,
    stage: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    sample: Sample = lambda *_: None,
) -> list[Predictions]:
    """The last three stages, each within its `stage`; what the store or Triton fails at is as the model declares.

    Triton is waited for as long as the most patient caller of the batch waits.
    """
    left_ms = int(batch.ends_ms(now_ms, deadline_s).max()) - now_ms
    until_s = time.monotonic() + left_ms / 1000
    try:
        with stage("features"):
            joined = features(batch, reader_of(batch.deployment), now_ms, deadline_s)
    except Exception as error:
        log.error("%d rows unavailable: %s", len(batch), type(error).__name__)
        joined = features(batch, _NoReader(), now_ms, deadline_s)
    try:
        with stage("forward"):
            merged = forward(batch, joined, models, until_s)
    except Exception as error:
        # The text of ours alone, which holds no values.
        log.error("%d rows without Triton: %s", len(batch), error if isinstance(error, Unavailable) else type(error))
        joined = _without_models(batch, joined)
        merged = forward(batch, joined, models)
    sample(batch, joined, merged.prediction, now_ms)
    with stage("encode"):
        return encode(batch, joined, merged)


def within_limit(message: Predictions) -> Iterator[Predictions]:
    """The same answers in messages of which each is below Kafka's limit: what the server contributes can be wide."""
    floats = message.server_embedding.shape[1] + message.server_slots.shape[1]
    rows = max(1, MAX_RECORD_BYTES // (ROW_BYTES + 4 * floats))
    for start in range(0, len(message), rows):
        yield message[start : start + rows]


class _NoReader:
    """The feature store of a deployment that cannot be opened."""

    def read(self, entities: Sequence[str], now_ms: int) -> PackedRows:
        """Nothing."""
        raise Unavailable("the feature store cannot be opened")


def _without_models(batch: Batch, joined: Joined) -> Joined:
    """Nothing can be predicted: the constant is left to rows that have a fallback, where the model declares one.

    A device that merges predicts by itself: it keeps its fallbacks.
    """
    status = np.where(joined.with_server, Unavailable.code, joined.status)
    nothing = np.zeros(len(batch), bool)
    fallback = np.where(joined.with_server, _fallback(batch, status, nothing), joined.fallback)
    if batch.on_device:
        return replace(joined, status=status, fallback=fallback)
    last = NONE if batch.deployment.serving.constant is None else CONSTANT
    return replace(joined, status=status, fallback=np.where(fallback == NONE, NONE, last))


def probe(deployment: Deployment) -> tuple[Batch, Joined]:
    """One row of zeros, as if it had been read, to try a deployment's models with."""
    inputs, size = len(deployment.request), deployment.sent_embedding
    one, zeros = np.zeros(1, np.int64), np.zeros((1, inputs), np.float32)
    entity, slots = np.array([""], dtype=object), np.zeros((1, len(deployment.server) + inputs), np.float32)
    batch = Batch(deployment, one, np.zeros(1, "V16"), entity, zeros, np.zeros((1, size), np.float32), one)
    return batch, Joined(slots, one, np.array([OK], dtype=object), np.array([NONE], dtype=object))


def refusals(message: DeviceEmbeddings, reason: str) -> list[Predictions]:
    """The answers to a record none of whose rows can be predicted: several, so that none outgrows Kafka's limit."""
    rows = len(message)
    return [
        Predictions(
            message.model,
            message.version,
            message.reply_partition,
            request_id=message.request_id[start : start + MAX_BATCH_ROWS],
            status=np.full(n, reason, dtype=object),
            fallback=np.full(n, NONE, dtype=object),
            prediction=np.full(n, np.nan, np.float32),
            feature_age_ms=np.full(n, -1),
        )
        for start in range(0, rows, MAX_BATCH_ROWS)
        for n in [min(MAX_BATCH_ROWS, rows - start)]
    ]


def _readable(record: Record, reply_partitions: int) -> DeviceEmbeddings:
    message = DeviceEmbeddings.from_bytes(record.value)
    if not 0 <= message.reply_partition < reply_partitions:
        raise BadMessage(f"reply_partition must be below {reply_partitions}", "bad_reply_partition")
    if len(message.model.encode()) > MAX_NAME_BYTES:
        raise BadMessage(f"the model's name must have at most {MAX_NAME_BYTES} bytes", "name_too_long")
    return message


def _misfit(message: DeviceEmbeddings, deployment: Deployment | None) -> str | None:
    """Why no row of a record can be predicted; None where they can."""
    if deployment is None:
        return UnknownModel.code
    widths = message.embedding.shape[1], message.request.shape[1]
    return None if widths == (deployment.sent_embedding, len(deployment.request)) else BadRequest.code


def _batches(deployment: Deployment | None, traced: Sequence[_Traced]) -> list[Batch]:
    assert deployment is not None
    messages = [message for message, _ in traced]
    names = DeviceEmbeddings.COLUMNS
    columns = {name: np.concatenate([getattr(message, name) for message in messages]) for name in names}
    columns["reply_partition"] = np.concatenate([np.full(len(m), m.reply_partition) for m in messages])
    return [
        Batch(deployment, **_rows(columns, slice(start, start + MAX_BATCH_ROWS)), traces=_traces(traced, start))
        for start in range(0, len(columns["entity"]), MAX_BATCH_ROWS)
    ]


def _traces(traced: Sequence[_Traced], start: int) -> tuple[str, ...]:
    """Those of the records with rows in the batch that begins at row `start`."""
    ends = np.cumsum([len(message) for message, _ in traced])
    first, last = np.searchsorted(ends, [start, start + MAX_BATCH_ROWS - 1], side="right")
    return tuple(trace for _, traces in traced[first : last + 1] for trace in traces)


def _rows(columns: dict[str, NDArray[Any]], chosen: Any) -> dict[str, Any]:
    return {name: values[chosen] for name, values in columns.items()}
