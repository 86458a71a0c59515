"""Packed server slots by entity, as serving reads them.

Reads through the online store's own `online_read`, a third of the cost of
`get_online_features` at one row; a contract test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from feature_store.definitions import OLDEST_MS, SCHEMA_HASH, SLOTS, open_store
from hybrid.errors import ConfigError, SchemaDrift, StaleFeatures, UnknownEntity

OK = "ok"
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

    Readers of one folder share one SQLite connection: use them from one thread
    at a time, whichever thread built them. Materialising meanwhile is safe.

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
            self._view = store.get_feature_view(packed_view)
        except FeatureViewNotFoundException:
            raise ConfigError(
                f"packed view {packed_view!r} is not in the feature store; "
                "run `hybrid features apply MODEL`, then `hybrid features materialize MODEL`"
            ) from None
        self._config = store.config
        self._online_store = store._get_provider().online_store
        self._join_key, self._integer = join_key, join_key_type == "integer"
        self._schema_hash, self._max_age_ms, self._width = schema_hash, max_age_s * 1000, width

    def read(self, entities: Sequence[str], now_ms: int) -> PackedRows:
        """Reads each distinct entity once.

        Args:
            entities: (n,) join keys as text, repeats allowed; an integer key that is not one is unknown.
            now_ms: Unix time in UTC.
        """
        place: dict[str, int] = {}
        index = np.fromiter((place.setdefault(e, len(place)) for e in entities), dtype=np.intp, count=len(entities))
        rows = self._distinct(list(place), now_ms)
        return PackedRows(rows.slots[index], rows.age_ms[index], rows.status[index])

    def _distinct(self, entities: list[str], now_ms: int) -> PackedRows:
        n = len(entities)
        rows = PackedRows(
            slots=np.full((n, self._width), np.nan, dtype=np.float32),
            age_ms=np.full(n, -1, dtype=np.int64),
            status=np.full(n, UnknownEntity.code, dtype=object),
        )
        keys = [(place, key) for place, key in enumerate(map(self._key, entities)) if key is not None]
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            found = self._online_store.online_read(self._config, self._view, [key for _, key in chunk], FIELDS)
            for (place, _), (_, values) in zip(chunk, found, strict=True):
                if values is not None:
                    self._fill(rows, place, values, now_ms)
        return rows

    def _fill(self, rows: PackedRows, place: int, values: dict[str, Any], now_ms: int) -> None:
        rows.status[place] = SchemaDrift.code
        if not all(field in values for field in FIELDS):
            return
        rows.age_ms[place] = age_ms = max(now_ms - values[OLDEST_MS].int64_val, 0)
        slots = values[SLOTS].float_list_val.val
        if values[SCHEMA_HASH].string_val != self._schema_hash or len(slots) != self._width:
            return
        if age_ms > self._max_age_ms:
            rows.status[place] = StaleFeatures.code
            return
        rows.slots[place], rows.status[place] = slots, OK

    def _key(self, entity: str) -> Any:
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        if not self._integer:
            return EntityKey(join_keys=[self._join_key], entity_values=[Value(string_val=entity)])
        try:
            return EntityKey(join_keys=[self._join_key], entity_values=[Value(int64_val=int(entity))])
        except ValueError:
            return None


FIELDS = [SLOTS, SCHEMA_HASH, OLDEST_MS]
_shared_store = lru_cache(maxsize=None)(open_store)
