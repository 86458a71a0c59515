"""What became of each row's request: what a gateway's bytes say, and the results' file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hybrid.bundle import Manifest
from hybrid.errors import ConfigError, ServingError
from hybrid.protocol import (
    CONSTANT,
    DEVICE_ONLY,
    EXPIRES_MS,
    FALLBACK,
    FALLBACKS,
    FEATURE_AGE_MS,
    MERGED,
    NONE,
    OK,
    PREDICTION,
    SERVER_EMBEDDING,
    SERVER_SLOTS,
    STATUS,
    VERSION,
    answered,
)

BAD_ANSWER, EXPIRED, TIMEOUT, UNREACHABLE = "bad_answer", "expired", "timeout", "unreachable"
UNUSABLE = frozenset({BAD_ANSWER, EXPIRED, TIMEOUT, UNREACHABLE})  # the gateway gave no answer, or none for use


@dataclass(frozen=True)
class Answer:
    """What became of one row's request: a prediction, or why there is none.

    Attributes:
        device, row: whose.
        status: "ok"; why a side was missing: a `ServingError` code from the gateway; or, where it gave no answer
            that can be used, "unreachable", "timeout", "bad_answer", or "expired" by this device's clock.
        http_status: of the last answer; 0 without one.
        prediction: probability; NaN unless the status is "ok" or a fallback answered.
        version: that predicted; -1 without a prediction.
        feature_age_ms: of the server's features when merged; -1 where there were none.
        merged: where the embeddings met; "" without a prediction.
        latency_ms: from the row's inputs to the answer, retries included.
        attempts: requests sent; 1 to 3.
        error: one sentence; "" where ok.
        fallback: what answered in place of both sides; "none": nothing had to, or nothing did.
        expires_ms: Unix time in UTC after which the server's embedding may not be used; -1 where nothing ages.
        server_embedding: what the server contributed, for the example that the device may keep; empty where it was
            not asked for, or nothing of the kind was merged.
        server_slots: server and request features as they went into the server tower, NaN where a value is missing:
            what is kept in the embedding's place where devices train the server tower too; empty likewise.
    """

    device: int
    row: int
    status: str
    http_status: int = 0
    prediction: float = math.nan
    version: int = -1
    feature_age_ms: int = -1
    merged: str = ""
    latency_ms: float = 0.0
    attempts: int = 0
    error: str = ""
    fallback: str = NONE
    expires_ms: int = -1
    server_embedding: tuple[float, ...] = ()
    server_slots: tuple[float, ...] = ()


class Results(AbstractContextManager["Results"]):
    """Answers on their way to a Parquet file, one column per field of `Answer`, and their summary.

    The file is complete once the context ends, however it ends.

    Args:
        file: replaced.
        batch: rows per row group.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, file: Path, *, batch: int = 4096) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "tuple": pa.list_(pa.float32())}
        self._schema = pa.schema(
            [(name, kinds[str(kind).partition("[")[0]]) for name, kind in Answer.__annotations__.items()]
        )
        try:
            self._writer = pq.ParquetWriter(file, self._schema)
        except OSError as error:
            raise ConfigError(f"{str(file)!r} cannot be written: {type(error).__name__}") from None
        self._batch = batch
        self._waiting: list[Answer] = []
        self._statuses: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._predicted = 0
        self._latencies: list[float] = []

    def add(self, answer: Answer) -> None:
        """Takes one answer."""
        self._waiting.append(answer)
        self._statuses[answer.status] += 1
        self._fallbacks[answer.fallback] += 1
        self._predicted += not math.isnan(answer.prediction)
        self._latencies.append(answer.latency_ms)
        if len(self._waiting) >= self._batch:
            self._flush()

    def summary(self) -> dict[str, Any]:
        """Counts by status and by fallback, and the latency's quantiles in milliseconds.

        "answered" counts what the gateway answered, "predicted" what has a prediction, a fallback's included.
        """
        found = np.quantile(self._latencies, [0.5, 0.99]).tolist() if self._latencies else (None, None)
        p50, p99 = (None if each is None else round(each, 3) for each in found)
        unanswered = sum(self._statuses[status] for status in UNUSABLE)
        return {
            "requests": self._statuses.total(),
            "answered": self._statuses.total() - unanswered,
            "predicted": self._predicted,
            "statuses": dict(self._statuses),
            "fallbacks": {kind: rows for kind, rows in self._fallbacks.items() if kind != NONE},
            "latency_ms": {"p50": p50, "p99": p99},
        }

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            batch = pa.RecordBatch.from_pylist([vars(answer) for answer in self._waiting], schema=self._schema)
            self._writer.write_batch(batch)
            self._waiting.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()


def read_answer(status: int, content: bytes, manifest: Manifest, *, contribution: bool = False) -> dict[str, Any]:
    """The fields of `Answer` that a gateway's answer holds; one that cannot be used is "bad_answer".

    Where the device merges they hold no prediction yet, but the server's side of it.

    Args:
        status: of HTTP.
        content: the body.
        manifest: of the bundle whose version was asked.
        contribution: whether what the server contributed was asked for: its slots, where the bundle's training
            program takes those, else its embedding.
    """
    try:
        document = json.loads(content)
        if status != 200:
            return {"status": _plain(document.get("code", ServingError.code)), "error": _plain(document["error"])}
        outputs = {output["name"]: output["data"] for output in document["outputs"]}
        found: dict[str, Any]
        if manifest.merge == "server":
            found = {"prediction": _probability(outputs), "merged": _plain(outputs[MERGED][0])}
        else:
            if outputs[MERGED][0] != "device":
                raise ValueError("merged elsewhere")
            found = {"expires_ms": _expiry(outputs)}
        found |= _about(outputs, manifest)
        slots = slots_of(manifest) if contribution else 0
        if slots:
            found["server_slots"] = _server_slots(outputs, found["fallback"], slots)
        if manifest.merge == "device" or (contribution and not slots):
            found["server_embedding"] = _server_embedding(outputs, found["fallback"], manifest.server_embedding)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # The class alone: the text of the error could quote what was answered.
        return {"status": BAD_ANSWER, "error": f"the gateway's answer cannot be read ({type(error).__name__})"}
    return found


def slots_of(manifest: Manifest) -> int:
    """How many slots the server contributes to an example; 0: it is the embedding that it contributes."""
    train = manifest.train
    return train.server if train is not None and train.takes_slots else 0


def _about(outputs: Mapping[str, Sequence[Any]], manifest: Manifest) -> dict[str, Any]:
    """What every answer says of itself."""
    version, age_ms = int(outputs[VERSION][0]), int(outputs[FEATURE_AGE_MS][0])
    status, fallback = _plain(outputs.get(STATUS, [OK])[0]), outputs.get(FALLBACK, [NONE])[0]
    if version != manifest.version:
        raise ValueError("another version than was asked")
    if not -1 <= age_ms < 1 << 63:
        raise ValueError("no age")
    if fallback not in FALLBACKS or not answered(status, fallback):
        raise ValueError("nothing answers, though it was said to be answered")
    return {"status": status, "fallback": fallback, "version": version, "feature_age_ms": age_ms}


def _probability(outputs: Mapping[str, Sequence[Any]]) -> float:
    prediction = float(outputs[PREDICTION][0])
    if not 0 <= prediction <= 1:
        raise ValueError("not a probability")
    return prediction


def _expiry(outputs: Mapping[str, Sequence[Any]]) -> int:
    """The moment, which only features have: where the server's side was merged from none, -1."""
    expires_ms = int(outputs[EXPIRES_MS][0])
    if not -1 <= expires_ms < 1 << 63 or (expires_ms == -1 and outputs[FALLBACK][0] == NONE):
        raise ValueError("no expiry")
    return expires_ms


def _server_embedding(outputs: Mapping[str, Sequence[Any]], fallback: str, size: int) -> tuple[float, ...]:
    """As float32 has it; empty where a constant answered, which is of no embedding."""
    if fallback == CONSTANT:
        return ()
    with np.errstate(over="ignore"):  # past float32 is infinite, which is refused
        server = np.array(outputs[SERVER_EMBEDDING], dtype=np.float64).astype(np.float32)
    if server.shape != (size,) or not np.isfinite(server).all():
        raise ValueError("not an embedding")
    return tuple(server.tolist())


def _server_slots(outputs: Mapping[str, Sequence[Any]], fallback: str, size: int) -> tuple[float, ...]:
    """As float32 has them; null, a missing value, is NaN. Empty where the server's side was missing."""
    if fallback in {CONSTANT, DEVICE_ONLY}:
        return ()
    with np.errstate(over="ignore"):
        slots = np.array(outputs[SERVER_SLOTS], dtype=np.float64).astype(np.float32)
    if slots.shape != (size,) or np.isinf(slots).any():
        raise ValueError("not the slots")
    return tuple(slots.tolist())


def _plain(text: object) -> str:
    """What a gateway wrote, short and storable, whatever it wrote."""
    return str(text)[:500].encode(errors="replace").decode()
