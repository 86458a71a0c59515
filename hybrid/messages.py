"""What crosses Kafka: Arrow record batches of many rows, one per record, and dead letters.

A record that cannot be read is a value too: `from_bytes` raises `BadMessage`,
and the worker sends a `DeadLetter` and goes on.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hybrid.errors import HybridError

if TYPE_CHECKING:
    import pyarrow as pa

    from hybrid.sealing import OpeningKey, SealingKey


NO_DEADLINE = (1 << 63) - 1  # after every other
MAX_KEPT_BYTES = 704 << 10  # of a record in its dead letter: in base64 they stay below Kafka's default limit of 1 MiB


class BadMessage(HybridError):
    """Bytes that are not a message of the expected schema, or one that nobody can answer.

    Attributes:
        code: why, as one stable word, for dead letters and counters.
    """

    def __init__(self, reason: str, code: str = "unreadable") -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class BatchMessage:
    """Rows of one (model, version), columnar: Arrow IPC, schema-versioned by the topic's name.

    Subclasses list their columns in `COLUMNS`; scalars travel as schema metadata. A column that came later stands
    in `LATER` too, with what a record without it means; one that says no more than that is left out.
    """

    TOPIC: ClassVar[str]
    COLUMNS: ClassVar[dict[str, str]]  # field -> "uuid" | "text" | "float32" | "int64" | "bool" | "vector"
    LATER: ClassVar[dict[str, Callable[[int], NDArray[Any]]]] = {}  # field -> (n) -> its values

    model: str
    version: int
    reply_partition: int

    def __post_init__(self) -> None:
        for name, values in self.LATER.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, values(len(self)))

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.COLUMNS))))

    def __getitem__(self, chosen: slice) -> Self:
        """Some of the rows."""
        return replace(self, **{name: getattr(self, name)[chosen] for name in self.COLUMNS})

    def to_bytes(self) -> bytes:
        """One Arrow IPC stream with one record batch."""
        import pyarrow as pa

        written = {name: kind for name, kind in self.COLUMNS.items() if name not in self.LATER or self._says(name)}
        arrays = [_to_arrow(kind, getattr(self, name)) for name, kind in written.items()]
        scalars = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name not in self.COLUMNS}
        schema = pa.schema(
            [pa.field(name, array.type, nullable=False) for name, array in zip(written, arrays, strict=True)],
            metadata=scalars,
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]

    def _says(self, name: str) -> bool:
        """Whether a later column differs from its absence: a wish that no row has, and no numbers, do not."""
        values = getattr(self, name)
        return bool(values.any()) if self.COLUMNS[name] == "bool" else values.size > 0

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads what `to_bytes` wrote, every column checked once.

        Raises:
            BadMessage: not Arrow, not this schema, compressed, empty, or not one batch.
        """
        import pyarrow as pa

        try:
            batch = _only_batch(data)
            present = batch.schema.names
            metadata = {k.decode(): v.decode() for k, v in (batch.schema.metadata or {}).items()}
            columns: dict[str, Any] = {
                name: _from_arrow(kind, batch.column(name))
                for name, kind in cls.COLUMNS.items()
                if name not in cls.LATER or name in present
            }
            scalars: dict[str, Any] = {
                f.name: int(metadata[f.name]) if f.type == "int" else metadata[f.name]
                for f in fields(cls)
                if f.name not in cls.COLUMNS
            }
        except (pa.ArrowException, KeyError, ValueError, TypeError, EOFError, OverflowError, OSError) as error:
            # The class alone: Arrow's messages can quote the bytes, which hold embeddings.
            raise BadMessage(f"not a {cls.TOPIC} record: {type(error).__name__}") from None
        return cls(**scalars, **columns)


@dataclass(frozen=True)
class DeviceEmbeddings(BatchMessage):
    """Requests of one model version on their way to the merge worker.

    Partitioned by a hash of the first `request_id`. At least once: a redelivery
    keeps its ids, and consumers drop repeats by them. A new column comes with a
    default; any other change is a new topic, `.v2`. Kept for one hour.

    Attributes:
        model, version: the pair these rows belong to.
        reply_partition: of the predictions topic that the waiting gateway reads.
        request_id: (n,) 16 bytes each, drawn by the gateway, one per row.
        entity: (n,) Feast join keys as text.
        request: (n, r) request features as slots; r may be 0.
        embedding: (n, d) as released (clear or noised); a row of NaN where the request came without. (n, 0) for
            models that merge on the device.
        event_ms: (n,) Unix time in UTC, the gateway's clock.
        wants_server: (n,) whether the answer is to hold the server's embedding.
        wants_slots: (n,) whether it is to hold the server's and the request's slots.
        deadline_ms: (n,) Unix time in UTC, the gateway's clock, after which nobody waits for the answer; `NO_DEADLINE`
            where that is not known.
    """

    TOPIC: ClassVar[str] = "hybrid.device-embeddings.v1"
    COLUMNS: ClassVar[dict[str, str]] = {
        "request_id": "uuid",
        "entity": "text",
        "request": "vector",
        "embedding": "vector",
        "event_ms": "int64",
        "wants_server": "bool",
        "deadline_ms": "int64",
        "wants_slots": "bool",
    }
    LATER: ClassVar[dict[str, Callable[[int], NDArray[Any]]]] = {
        "wants_server": lambda n: np.zeros(n, bool),
        "deadline_ms": lambda n: np.full(n, NO_DEADLINE),
        "wants_slots": lambda n: np.zeros(n, bool),
    }

    request_id: NDArray[np.void]
    entity: NDArray[np.object_]
    request: NDArray[np.float32]
    embedding: NDArray[np.float32]
    event_ms: NDArray[np.int64]
    wants_server: NDArray[np.bool_] = None  # type: ignore[assignment]  # see LATER
    deadline_ms: NDArray[np.int64] = None  # type: ignore[assignment]
    wants_slots: NDArray[np.bool_] = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Predictions(BatchMessage):
    """Answers of the merge worker on their way back to the gateway that asked.

    Written to partition `reply_partition`. At least once: the gateway drops an
    answer that nobody waits for. Kept for one hour.

    Attributes:
        request_id: (n,) 16 bytes each, as asked.
        status: (n,) "ok", or the code of the `ServingError` that says what is missing.
        fallback: (n,) what answers all the same, as the model declares; "none": nothing does unless status is "ok".
        prediction: (n,) probability of the label; NaN where there is no answer, and where the device predicts.
        feature_age_ms: (n,) age of the server features when merged; -1 where there are none.
        expires_ms: (n,) Unix time in UTC at which they are as old as the model allows; -1 where the answer is of none.
        server_embedding: (n, a) the server's side of the merge, NaN where there is none or it was not asked for;
            (n, 0) where no row asked.
        server_slots: (n, s + r) server and request features as they went into the server tower, NaN where a value is
            missing, and throughout where no tower was asked or they were not asked for; (n, 0) where no row asked.
    """

    TOPIC: ClassVar[str] = "hybrid.predictions.v1"
    COLUMNS: ClassVar[dict[str, str]] = {
        "request_id": "uuid",
        "status": "text",
        "fallback": "text",
        "prediction": "float32",
        "feature_age_ms": "int64",
        "expires_ms": "int64",
        "server_embedding": "vector",
        "server_slots": "vector",
    }
    LATER: ClassVar[dict[str, Callable[[int], NDArray[Any]]]] = {
        "expires_ms": lambda n: np.full(n, -1),
        "server_embedding": lambda n: np.empty((n, 0), np.float32),
        "server_slots": lambda n: np.empty((n, 0), np.float32),
    }

    request_id: NDArray[np.void]
    status: NDArray[np.object_]
    fallback: NDArray[np.object_]
    prediction: NDArray[np.float32]
    feature_age_ms: NDArray[np.int64]
    expires_ms: NDArray[np.int64] = None  # type: ignore[assignment]  # see LATER
    server_embedding: NDArray[np.float32] = None  # type: ignore[assignment]
    server_slots: NDArray[np.float32] = None  # type: ignore[assignment]


class DeadLetter(BaseModel):
    """A record that could not be processed: where it lies, why, and its bytes where they may be kept.

    The bytes can hold embeddings, so they are kept sealed to a public key only:
    whoever writes a letter cannot read it again. They open only as the bytes of
    this topic, partition and offset.

    Attributes:
        topic, partition, offset: of the record.
        code: why, as one stable word: a `BadMessage`'s.
        reason: why, as one sentence without values.
        length, sha256: of its bytes.
        sealed: the bytes, sealed (`hybrid.sealing`) and in base64; None where they are not kept.
        key_id: of the key that opens them.
        withheld: why the bytes are not kept: no key is configured, or they are more than `MAX_KEPT_BYTES`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    topic: str
    partition: int
    offset: int
    code: str = "unreadable"
    reason: str
    length: int
    sha256: str
    sealed: str | None = None
    key_id: str | None = None
    withheld: Literal["no_key", "too_large"] | None = None

    @classmethod
    def of(
        cls, data: bytes, *, topic: str, partition: int, offset: int, error: BadMessage, key: SealingKey | None = None
    ) -> DeadLetter:
        """Builds it from the record's bytes; without a key it does not keep them."""
        letter = cls(
            topic=topic,
            partition=partition,
            offset=offset,
            code=error.code,
            reason=str(error),
            length=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        if key is None:
            return letter.model_copy(update={"withheld": "no_key"})
        if len(data) > MAX_KEPT_BYTES:
            return letter.model_copy(update={"withheld": "too_large"})
        sealed = base64.b64encode(key.seal(data, letter._context)).decode()
        return letter.model_copy(update={"sealed": sealed, "key_id": key.key_id})

    def open(self, key: OpeningKey) -> bytes:
        """The record's bytes.

        Raises:
            CannotOpen: they were not kept, or are of another key, or the letter was changed.
        """
        from hybrid.sealing import CannotOpen

        if self.sealed is None:
            raise CannotOpen(f"the letter holds no bytes ({self.withheld})")
        if self.key_id != key.key_id:
            raise CannotOpen(f"the letter was sealed to key {self.key_id}, this is key {key.key_id}")
        try:
            data = key.open(base64.b64decode(self.sealed, validate=True), self._context)
        except ValueError:
            raise CannotOpen("the letter's bytes are not base64") from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise CannotOpen("the letter's bytes do not have its sha256")
        return data

    @property
    def _context(self) -> bytes:
        return f"hybrid dead letter v1\n{self.topic}\n{self.partition}\n{self.offset}".encode()

    @staticmethod
    def topic_for(topic: str) -> str:
        """The dead-letter topic of `topic`."""
        return f"{topic}.dead"


def _only_batch(data: bytes) -> pa.RecordBatch:
    """The one record batch of an IPC stream, its buffers checked against their lengths.

    Compressed batches are refused before they are unpacked: 17 kB can unpack to gigabytes.
    """
    import pyarrow as pa

    messages = list(pa.ipc.MessageReader.open_stream(data))
    if [message.type for message in messages] != ["schema", "record batch"]:
        raise ValueError("not one batch")
    schema, body = messages
    if _is_compressed(memoryview(body.metadata)):
        raise ValueError("compressed")
    batch = pa.ipc.read_record_batch(body, pa.ipc.read_schema(schema))
    batch.validate(full=True)
    if not len(batch):
        raise ValueError("no rows")
    return batch


def _is_compressed(metadata: memoryview) -> bool:
    """Whether a record batch's flatbuffer sets `RecordBatch.compression`.

    Source: Apache Arrow, format/Message.fbs: the header is field 2 of a message,
    compression field 3 of a record batch. Arrow verified the flatbuffer already.
    """

    def number(at: int, size: int) -> int:
        return int.from_bytes(metadata[at : at + size], "little")

    def place(table: int, field: int) -> int:
        """Where a table's field lies; `table` itself if it is not set."""
        vtable = table - int.from_bytes(metadata[table : table + 4], "little", signed=True)
        entry = 4 + 2 * field
        return table + (number(vtable + entry, 2) if entry < number(vtable, 2) else 0)

    message = number(0, 4)
    header = place(message, 2)
    batch = header + number(header, 4)
    return place(batch, 3) != batch


def _to_arrow(kind: str, values: NDArray[Any]) -> pa.Array:
    import pyarrow as pa

    if kind == "uuid":
        raw = np.ascontiguousarray(values, dtype="V16")
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(raw), [None, pa.py_buffer(raw)])
    if kind == "vector":
        flat = np.ascontiguousarray(values, dtype=np.float32)
        width = flat.shape[1]
        buffers, child = [None], pa.array(flat.ravel(), pa.float32())
        return pa.FixedSizeListArray.from_buffers(pa.list_(pa.float32(), width), len(flat), buffers, children=[child])
    return pa.array(values, _scalar_type(kind))


def _from_arrow(kind: str, array: pa.Array) -> NDArray[Any]:
    import pyarrow as pa

    if array.null_count:
        raise ValueError("nulls")
    if kind == "uuid":
        if array.type != pa.binary(16):
            raise TypeError("not 16 bytes")
        return np.frombuffer(array.buffers()[1], dtype="V16", count=len(array), offset=16 * array.offset)
    if kind == "vector":
        if not pa.types.is_fixed_size_list(array.type) or array.type.value_type != pa.float32():
            raise TypeError("not a float32 vector")
        flat = array.flatten()
        if flat.null_count:
            raise ValueError("nulls")
        return flat.to_numpy(zero_copy_only=True).reshape(len(array), array.type.list_size)  # type: ignore[no-any-return]
    if array.type != _scalar_type(kind):
        raise TypeError(f"not {kind}")
    return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _scalar_type(kind: str) -> pa.DataType:
    import pyarrow as pa

    return {"text": pa.string(), "float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}[kind]
