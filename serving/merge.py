"""The four stages of a merge, each a function: decode -> features -> forward -> encode.

Columnar throughout: rows of many requests, of many records, go through Feast and
Triton together. A row that cannot be predicted carries its reason to the end.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.deployment import Deployment
from hybrid.errors import BadRequest, Unavailable, UnknownModel
from hybrid.messages import BadMessage, DeadLetter, DeviceEmbeddings, Predictions
from serving.exchange import DEADLINE_S
from serving.kafka import PARTITIONS, Record
from serving.triton import Models

log = logging.getLogger(__name__)

OK = "ok"
MAX_BATCH_ROWS = 2048  # of one forward pass and of one answer; a Triton model takes 4096
MAX_NAME_BYTES = 256  # of a model; every answer repeats it
Find = Callable[[str, int], Deployment | None]
_Traced = tuple[DeviceEmbeddings, tuple[str, ...]]  # a message, and the traces of its record


class PackedRows(Protocol):
    """What a feature store says about n entities; see `Reader`."""

    @property
    def slots(self) -> NDArray[np.float32]:
        """(n, s) server slots."""

    @property
    def age_ms(self) -> NDArray[np.int64]:
        """(n,) age of each row; -1 where there is none."""

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
    """

    deployment: Deployment
    reply_partition: NDArray[np.int64]
    request_id: NDArray[np.void]
    entity: NDArray[np.object_]
    request: NDArray[np.float32]
    embedding: NDArray[np.float32]
    event_ms: NDArray[np.int64]
    traces: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.request_id)


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
        slots: (n, server + request); meaningless where `status` is not "ok".
        age_ms: (n,) of the server features; -1 where there are none.
        status: (n,) "ok", or why the row cannot be predicted.
    """

    slots: NDArray[np.float32]
    age_ms: NDArray[np.int64]
    status: NDArray[np.object_]


Sample = Callable[[Batch, Joined, NDArray[np.float32], int], None]  # batch, joined, predictions, when


def decode(records: Sequence[Record], find: Find) -> Decoded:
    """Bytes -> rows, merged by deployment; nothing is checked again after this but single values."""
    parts: dict[tuple[str, int], list[_Traced]] = defaultdict(list)
    refused: list[Predictions] = []
    dead: list[DeadLetter] = []
    for record in records:
        try:
            message = _readable(record)
        except BadMessage as error:
            dead.append(record.dead_letter(str(error)))
            continue
        reason = _misfit(message, find(message.model, message.version))
        if reason is None:
            parts[message.model, message.version].append((message, record.traces))
        else:
            refused += refusals(message, reason)
    batches = [batch for key, messages in parts.items() for batch in _batches(find(*key), messages)]
    return Decoded(batches, refused, dead)


def features(batch: Batch, reader: Reader, now_ms: int, deadline_s: float = DEADLINE_S) -> Joined:
    """The server's slots of each row, and the request's beside them.

    A row asked more than `deadline_s` ago is "unavailable": after an outage, those who
    gave up cost those who still wait nothing. The gateways' clocks and ours must agree
    to well below that.
    """
    n, width = len(batch), len(batch.deployment.server)
    status = np.full(n, OK, dtype=object)
    status[~np.isfinite(batch.embedding).all(axis=1)] = BadRequest.code
    status[now_ms - batch.event_ms > 1000 * deadline_s] = Unavailable.code
    slots, age_ms = np.zeros((n, width), np.float32), np.full(n, -1, np.int64)
    asked = status == OK
    if asked.any():
        rows = reader.read(batch.entity[asked].tolist(), now_ms)
        slots[asked], age_ms[asked], status[asked] = rows.slots, rows.age_ms, rows.status
    return Joined(np.concatenate([slots, batch.request], axis=1), age_ms, status)


def forward(batch: Batch, joined: Joined, models: Models) -> NDArray[np.float32]:
    """(n,) probabilities: the server tower, then the head; NaN where the status is not "ok".

    An extreme embedding can overflow the head: that row too gets no finite number, and no other row is touched.

    Raises:
        Unavailable: Triton failed, or did not give one number a row.
    """
    prediction = np.full(len(batch), np.nan, np.float32)
    ready, served = joined.status == OK, batch.deployment
    if not ready.any():
        return prediction
    embedding = models.infer(served.server_tower, served.version, {"slots": joined.slots[ready]}, "embedding")
    both = {"server": embedding, "device": batch.embedding[ready]}
    answer = models.infer(served.head, served.version, both, "prediction").reshape(-1)
    if len(answer) != ready.sum():
        raise Unavailable(f"Triton model {served.head!r} version {served.version} gave no prediction per row")
    prediction[ready] = answer
    return prediction


def encode(batch: Batch, joined: Joined, prediction: NDArray[np.float32]) -> list[Predictions]:
    """One message for each gateway that waits."""
    served = batch.deployment
    overflowed = (joined.status == OK) & ~np.isfinite(prediction)
    status = np.where(overflowed, Unavailable.code, joined.status)
    columns = {"request_id": batch.request_id, "status": status, "feature_age_ms": joined.age_ms}
    columns["prediction"] = prediction
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
    """The last three stages, each within its `stage`; where the store or Triton fails, every row says "unavailable"."""
    try:
        with stage("features"):
            joined = features(batch, reader_of(batch.deployment), now_ms, deadline_s)
        with stage("forward"):
            prediction = forward(batch, joined, models)
        sample(batch, joined, prediction, now_ms)
        with stage("encode"):
            return encode(batch, joined, prediction)
    except Unavailable as error:
        log.warning("%d rows unavailable: %s", len(batch), error)
    except Exception as error:
        # The class alone: a store's message can quote the entity.
        log.error("%d rows unavailable: %s", len(batch), type(error).__name__)
    n = len(batch)
    failed = Joined(np.zeros((n, 0), np.float32), np.full(n, -1), np.full(n, Unavailable.code, dtype=object))
    return encode(batch, failed, np.full(n, np.nan, np.float32))


def probe(deployment: Deployment) -> tuple[Batch, Joined]:
    """One row of zeros, as if it had been read, to try a deployment's models with."""
    inputs, size = len(deployment.request), deployment.device_embedding
    one, zeros = np.zeros(1, np.int64), np.zeros((1, inputs), np.float32)
    entity, slots = np.array([""], dtype=object), np.zeros((1, len(deployment.server) + inputs), np.float32)
    batch = Batch(deployment, one, np.zeros(1, "V16"), entity, zeros, np.zeros((1, size), np.float32), one)
    return batch, Joined(slots, one, np.array([OK], dtype=object))


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
            prediction=np.full(n, np.nan, np.float32),
            feature_age_ms=np.full(n, -1),
        )
        for start in range(0, rows, MAX_BATCH_ROWS)
        for n in [min(MAX_BATCH_ROWS, rows - start)]
    ]


def _readable(record: Record) -> DeviceEmbeddings:
    message = DeviceEmbeddings.from_bytes(record.value)
    if not 0 <= message.reply_partition < PARTITIONS[Predictions.TOPIC]:
        raise BadMessage(f"reply_partition must be below {PARTITIONS[Predictions.TOPIC]}")
    if len(message.model.encode()) > MAX_NAME_BYTES:
        raise BadMessage(f"the model's name must have at most {MAX_NAME_BYTES} bytes")
    return message


def _misfit(message: DeviceEmbeddings, deployment: Deployment | None) -> str | None:
    """Why no row of a record can be predicted; None where they can."""
    if deployment is None:
        return UnknownModel.code
    widths = message.embedding.shape[1], message.request.shape[1]
    return None if widths == (deployment.device_embedding, len(deployment.request)) else BadRequest.code


def _batches(deployment: Deployment | None, traced: Sequence[_Traced]) -> list[Batch]:
    assert deployment is not None
    messages = [message for message, _ in traced]
    names = ("request_id", "entity", "request", "embedding", "event_ms")
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
