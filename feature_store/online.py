"""Packed server slots by entity, as serving reads them.

Feast's `get_online_features` decodes one value per feature and row. Here one
statement reads all rows out of SQLite, and they are decoded as columns; any
other online store is read through its own `online_read`. Contract tests hold
the three together.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from feature_store.definitions import OLDEST_MS, SCHEMA_HASH, SLOTS, open_store
from feature_store.light import import_feast
from hybrid.errors import ConfigError, SchemaDrift, StaleFeatures, UnknownEntity
from hybrid.protocol import OK

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

LENGTH, INT64 = struct.Struct("<I"), struct.Struct("<q")
BUSY_MS = 2_000  # that a locked SQLite is waited for: what answers in its place must be within a gateway's deadline
CHUNK = 10_000  # keys in one statement; SQLite takes 32,766 variables


@dataclass(frozen=True)
class PackedRows:
    """What the store knows about n entities, in the order they were asked for.

    Attributes:
        slots: (n, s) float32, in the order of the model's server features; NaN where status is not "ok".
        age_ms: (n,) int64, since the oldest view's row was true; -1 where there is no row.
        status: (n,) object: "ok", "unknown_entity", "stale_features" or "schema_drift".
    """

    slots: NDArray[np.float32]
    age_ms: NDArray[np.int64]
    status: NDArray[np.object_]


class PackedReader:
    """Reads one model's packed view.

    What a read needs is resolved once, here: resolving a Feast view re-reads the
    registry and costs more than the read. The first reader of a process and
    folder takes seconds (Feast's import), each further one milliseconds. Feast
    does not enforce a ttl online, so the age of every row is checked here.

    Readers of one folder share one connection; threads take turns.
    Materialising meanwhile is safe.

    Args:
        folder: of the Feast store.
        packed_view, join_key: their names in Feast.
        join_key_type: of the entity.
        schema_hash: of the features the model was trained with.
        max_age_s: older rows are stale; seconds.
        width: how many slots, s.

    Raises:
        ConfigError: the view was not applied.
    """

    def __init__(
        self,
        folder: Path,
        *,
        packed_view: str,
        join_key: str,
        join_key_type: Literal["text", "integer"],
        schema_hash: str,
        max_age_s: float,
        width: int,
    ) -> None:
        from feast.errors import FeatureViewNotFoundException

        store = _shared_store(folder)
        try:
            view = store.get_feature_view(packed_view)
        except FeatureViewNotFoundException:
            raise ConfigError(
                f"packed view {packed_view!r} is not in the feature store; "
                "run `hybrid features apply MODEL`, then `hybrid features materialize MODEL`"
            ) from None
        integer = join_key_type == "integer"
        fetch = _from_sqlite if store.config.online_store.type == "sqlite" else _from_any_store
        self._fetch = fetch(store, view, join_key, integer=integer)
        self._integer = integer
        self._lock = _lock_of(folder)
        self._layout = _Layout.of(schema_hash, width)
        self._max_age_ms, self._width = max_age_s * 1000, width

    def read(self, entities: Sequence[str], now_ms: int) -> PackedRows:
        """Reads each distinct entity once.

        Args:
            entities: (n,) join keys as text, repeats allowed; an integer key that is not one is unknown.
            now_ms: Unix time in UTC.
        """
        place: dict[str, int] = {}
        names = map(_canonical, entities) if self._integer else entities
        index = np.fromiter((place.setdefault(e, len(place)) for e in names), dtype=np.intp, count=len(entities))
        rows = self._distinct(list(place), now_ms)
        return PackedRows(rows.slots[index], rows.age_ms[index], rows.status[index])

    def _distinct(self, entities: list[str], now_ms: int) -> PackedRows:
        n = len(entities)
        rows = PackedRows(
            slots=np.full((n, self._width), np.nan, dtype=np.float32),
            age_ms=np.full(n, -1, dtype=np.int64),
            status=np.full(n, UnknownEntity.code, dtype=object),
        )
        with self._lock:
            fetched = [
                row for start in range(0, n, CHUNK) for row in self._fetch(start, entities[start : start + CHUNK])
            ]
        self._fill(rows, fetched, now_ms)
        return rows

    def _fill(self, rows: PackedRows, fetched: Sequence[Row], now_ms: int) -> None:
        from feast.protos.feast.types.Value_pb2 import Value

        rows.status[[place for place, *_ in fetched]] = SchemaDrift.code
        whole = [row for row in fetched if all(row[1:])]
        places = np.array([place for place, *_ in whole], dtype=np.intp)
        oldest_ms = np.array([Value.FromString(oldest).int64_val for *_, oldest in whole], dtype=np.int64)
        fits = np.fromiter((self._layout.fits(slots, schema) for _, slots, schema, _ in whole), bool, len(whole))
        rows.age_ms[places] = age_ms = np.maximum(now_ms - oldest_ms, 0)
        fresh = age_ms <= self._max_age_ms
        rows.status[places[fits & ~fresh]] = StaleFeatures.code
        good = fits & fresh
        rows.status[places[good]] = OK
        rows.slots[places[good]] = self._layout.slots([whole[number][1] for number in np.flatnonzero(good)])


# Of an entity that has a row: its place among those asked for, and SLOTS, SCHEMA_HASH and OLDEST_MS as Feast
# serialises them; empty where one is absent.
Row = tuple[int, bytes, bytes, bytes]
Fetch = Callable[[int, Sequence[str]], Iterable[Row]]  # place of the first entity, entities


@dataclass(frozen=True)
class _Layout:
    """How Feast serialises the slots of one schema: all rows alike, so that they are decoded together.

    Attributes:
        schema: SCHEMA_HASH, as it must be.
        prefix: what stands before the slots, little-endian float32.
        width: how many slots.
    """

    schema: bytes
    prefix: bytes
    width: int

    @classmethod
    def of(cls, schema_hash: str, width: int) -> _Layout:
        from feast.protos.feast.types.Value_pb2 import FloatList, Value

        example = Value(float_list_val=FloatList(val=[0.0] * width)).SerializeToString()
        schema = Value(string_val=schema_hash).SerializeToString()
        return cls(schema, example[: len(example) - 4 * width], width)

    def fits(self, slots: bytes, schema: bytes) -> bool:
        return (
            schema == self.schema and len(slots) == len(self.prefix) + 4 * self.width and slots.startswith(self.prefix)
        )

    def slots(self, values: Sequence[bytes]) -> NDArray[np.float32]:
        """Of rows that fit."""
        start = len(self.prefix)
        return np.frombuffer(b"".join(value[start:] for value in values), "<f4").reshape(len(values), self.width)


def _from_sqlite(store: FeatureStore, view: FeatureView, join_key: str, *, integer: bool) -> Fetch:
    """Reads rows, not Feast's objects: `online_read` costs four times as much."""
    from feast.infra.online_stores.helpers import compute_table_id

    connection = store._get_provider().online_store._get_conn(store.config)
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    versioned = store.config.registry.enable_online_feature_view_versioning
    table = compute_table_id(store.config.project, view, versioned).replace('"', '""')
    fields = ", ".join(f"COALESCE(max(CASE feature_name WHEN '{field}' THEN value END), x'')" for field in FIELDS)
    key_bytes = key_encoder(join_key, store.config.entity_key_serialization_version, integer=integer)

    def fetch(start: int, entities: Sequence[str]) -> Iterable[Row]:
        keys = ((key_bytes(entity), place) for place, entity in enumerate(entities, start))
        places = {key: place for key, place in keys if key is not None}
        marks = ",".join("?" * len(places))
        query = f'SELECT entity_key, {fields} FROM "{table}" WHERE entity_key IN ({marks}) GROUP BY entity_key'  # noqa: S608
        return [(places[key], *values) for key, *values in connection.execute(query, list(places))]

    return fetch


def _from_any_store(store: FeatureStore, view: FeatureView, join_key: str, *, integer: bool) -> Fetch:
    """Through the interface that every online store of Feast has."""
    online_store = store._get_provider().online_store

    def fetch(start: int, entities: Sequence[str]) -> Iterable[Row]:
        keys = ((_key(join_key, entity, integer=integer), place) for place, entity in enumerate(entities, start))
        asked = [(key, place) for key, place in keys if key is not None]
        found = online_store.online_read(store.config, view, [key for key, _ in asked], FIELDS)
        for (_, place), (_, values) in zip(asked, found, strict=True):
            if values is not None:
                slots, schema, oldest = (values[f].SerializeToString() if f in values else b"" for f in FIELDS)
                yield place, slots, schema, oldest

    return fetch


def key_encoder(join_key: str, version: int, *, integer: bool) -> Callable[[str], bytes | None]:
    """Text -> what Feast's `serialize_entity_key` gives for it, or None where it is no key of the type.

    All keys of one view begin alike, so only the value is encoded: a tenth of the cost.
    """
    import_feast()
    from feast.infra.key_encoding_utils import serialize_entity_key

    zero: bytes = serialize_entity_key(_key(join_key, "0", integer=integer), version)
    if integer:
        start = zero[: -INT64.size]
        return lambda entity: None if (number := _integer(entity)) is None else start + INT64.pack(number)
    start = zero[: -LENGTH.size - 1]

    def text(entity: str) -> bytes:
        value = entity.encode()
        return start + LENGTH.pack(len(value)) + value

    return text


def _key(join_key: str, entity: str, *, integer: bool) -> Any:
    """Feast's EntityKey, or None where the text is no key of the type."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    number = _integer(entity) if integer else None
    if integer and number is None:
        return None
    value = Value(string_val=entity) if number is None else Value(int64_val=number)
    return EntityKey(join_keys=[join_key], entity_values=[value])


def _canonical(entity: str) -> str:
    """One text for each integer: "7" and "07" are one entity."""
    number = _integer(entity)
    return entity if number is None else str(number)


def _integer(entity: str) -> int | None:
    """A 64-bit integer, or None where the text is none."""
    try:
        number = int(entity)
    except ValueError:
        return None
    return number if -(1 << 63) <= number < 1 << 63 else None


@cache
def _lock_of(_folder: Path) -> threading.Lock:
    """Of the connection that the folder's readers share."""
    return threading.Lock()


FIELDS = [SLOTS, SCHEMA_HASH, OLDEST_MS]
_shared_store = cache(open_store)
