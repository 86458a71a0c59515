"""Redis as Feast's online store, where it answers as the contract of ours asks and Feast's own (0.67) does not.

- A row gives way to none that is older. Feast's also drops a row of the same
  event time: features packed anew from the same events, because a model's
  transforms changed, would never arrive, and every entity would stay
  "schema_drift" until it has a new event.
- An entity without a row is absent. Feast's has empty values of 1970 for it.
- A read leaves its arguments as they were. Feast's appends to the list of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from feast import FeatureView, RepoConfig
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig

Row = tuple[Any, dict[str, Any], datetime, datetime | None]  # entity key, values, event time, created


class NewestRedisOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc]
    """Feast's configuration, of this class."""

    type: Literal["feature_store.newest_redis.NewestRedisOnlineStore"] = (
        "feature_store.newest_redis.NewestRedisOnlineStore"
    )
    skip_dedup: bool = True  # Feast's own rule is replaced by ours


class NewestRedisOnlineStore(RedisOnlineStore):  # type: ignore[misc]
    """See the module. As in Feast's, two writers at once are not kept apart."""

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[Any],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Any] | None]]:
        """Event time and values of each entity; (None, None) of one without a row."""
        asked = None if requested_features is None else list(requested_features)
        return super().online_read(config, table, entity_keys, asked)  # type: ignore[no-any-return]

    def _get_features_for_entity(
        self, values: Sequence[Any], feature_view: str, requested_features: list[str]
    ) -> tuple[datetime | None, dict[str, Any] | None]:
        if not values[requested_features.index(f"_ts:{feature_view}")]:
            return None, None
        return super()._get_features_for_entity(values, feature_view, requested_features)  # type: ignore[no-any-return]

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Callable[[int], Any] | None
    ) -> None:
        """Writes the rows that are not older than what is stored; of an entity's the newest, the last of equals."""
        newest: dict[bytes, Row] = {}
        for row in data:
            key = row[0].SerializeToString(deterministic=True)
            if key not in newest or _utc(row[2]) >= _utc(newest[key][2]):
                newest[key] = row
        rows = list(newest.values())
        stored = self.online_read(config, table, [row[0] for row in rows], [table.features[0].name])
        kept = [row for row, (at, _) in zip(rows, stored, strict=True) if at is None or _utc(at) <= _utc(row[2])]
        super().online_write_batch(config, table, kept, None)
        if progress:
            progress(len(data))


def _utc(at: datetime) -> datetime:
    return at if at.tzinfo else at.replace(tzinfo=UTC)
