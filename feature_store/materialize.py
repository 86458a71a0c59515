"""Brings a model's features into the store: apply, pack, materialise, and check that what is served is right."""

from __future__ import annotations

from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from feature_store.definitions import (
    ENTITY_TIME,
    OLDEST_MS,
    SCHEMA_HASH,
    SLOTS,
    Definitions,
    build,
    open_store,
    packed_file,
)
from feature_store.light import import_feast
from feature_store.offline import KEY, TIME, join, read_source, slots_of
from feature_store.online import PackedReader
from hybrid.errors import ConfigError, HybridError
from hybrid.spec import HybridModel, View

if TYPE_CHECKING:
    import pandas as pd
    from feast import FeatureStore, FeatureView

SAMPLE = 100
EPOCH = datetime(1970, 1, 2, tzinfo=UTC)


@dataclass(frozen=True)
class Materialized:
    """What `materialize` did.

    Attributes:
        views: view -> entities with raw values in the online store.
        packed: entities with packed slots: those that every view knows.
        checked: how many of them were compared, packed = unpacked = offline.
    """

    views: dict[str, int]
    packed: int
    checked: int


def apply(model: HybridModel, folder: Path) -> list[str]:
    """Registers a model's Feast objects; again is harmless.

    Returns:
        Names of the views and the service, as Feast has them.

    Raises:
        ConfigError: a source is not as declared, or another feature service
            holds a view or entity of that name that is defined otherwise.
    """
    definitions = build(model, folder)
    store = open_store(folder)
    _check_not_taken(store, definitions)
    store.apply(definitions.objects)
    if store.config.online_store.type == "sqlite":
        _prepare_sqlite(store, definitions, folder / "online.db")
    return [*(view.name for view in definitions.views), definitions.service.name, definitions.packed.name]


def not_applied(model: HybridModel, folder: Path) -> list[str]:
    """Names of a model's views and service that the store has not, or not as they are declared.

    Raises:
        ConfigError: a source is not as declared.
    """
    definitions = build(model, folder)
    store = open_store(folder)
    services = {service.name for service in store.list_feature_services()}
    missing = [definitions.service.name] if definitions.service.name not in services else []
    return [*_different(store, definitions), *missing]


def materialize(model: HybridModel, folder: Path, now: datetime) -> Materialized:
    """Loads the newest row of each entity into the online store, raw and packed, and checks a sample.

    Rows later than `now` are left out. Rows older than `max_feature_age` are
    loaded, so that a reader can say "stale" and not "unknown".

    Args:
        model: applied to the store in `folder` before.
        folder: of the Feast store.
        now: with a time zone.

    Raises:
        ConfigError: the model was not applied as it is declared; a source is
            not as declared, holds no row up to `now`, or has different values
            for one entity at one time.
        HybridError: packed, unpacked and offline values differ.
    """
    store = open_store(folder)
    definitions = build(model, folder)
    _check_applied(store, definitions, model)
    latest = {view.name: _latest(model, view, now) for view in model.server.views}
    packed = _pack(model, latest)
    _write(model, packed, folder)
    with redirect_stdout(StringIO()):  # Feast prints its progress
        store.materialize(EPOCH, now, feature_views=[*latest, definitions.packed.name])
    checked = _check(model, packed, store, folder, now)
    return Materialized({name: len(rows) for name, rows in latest.items()}, len(packed), checked)


def _prepare_sqlite(store: FeatureStore, definitions: Definitions, file: Path) -> None:
    """Gives SQLite what Feast does not: readers that go on during a write, and rows that give way to none older."""
    import sqlite3

    import_feast()
    from feast.infra.online_stores.helpers import compute_table_id

    versioned = store.config.registry.enable_online_feature_view_versioning
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        for view in (*definitions.views, definitions.packed):
            table = compute_table_id(store.config.project, view, versioned).replace('"', '""')
            database.execute(
                f'CREATE TRIGGER IF NOT EXISTS "{table}_newest" BEFORE UPDATE ON "{table}" '
                "WHEN NEW.event_ts < OLD.event_ts BEGIN SELECT RAISE(IGNORE); END"
            )
        database.commit()


def _check_not_taken(store: FeatureStore, definitions: Definitions) -> None:
    ours = {view.name: _content(view) for view in definitions.views}
    others = [s for s in store.list_feature_services() if s.name != definitions.service.name]
    for service in others:
        for name in {projection.name for projection in service.feature_view_projections} & ours.keys():
            if _content(store.get_feature_view(name)) != ours[name]:
                raise ConfigError(
                    f"view {name!r} is also in feature service {service.name!r}, with other features or another "
                    "source; declare it alike in both models, or give it another name"
                )
    for entity in store.list_entities():
        if entity.name == definitions.entity.name and entity.join_key != definitions.entity.join_key:
            raise ConfigError(
                f"entity {entity.name!r} has join_key {entity.join_key!r} in the feature store, "
                f"got {definitions.entity.join_key!r}; give it another name"
            )


def _check_applied(store: FeatureStore, definitions: Definitions, model: HybridModel) -> None:
    if different := _different(store, definitions):
        raise ConfigError(
            f"views {different} are not in the feature store as declared; run `hybrid features apply {model.name}`"
        )


def _different(store: FeatureStore, definitions: Definitions) -> list[str]:
    applied = {view.name: _content(view) for view in store.list_feature_views()}
    declared = {view.name: _content(view) for view in (*definitions.views, definitions.packed)}
    return sorted(name for name, content in declared.items() if applied.get(name) != content)


def _content(view: FeatureView) -> tuple[str, str, list[tuple[str, str]]]:
    """What makes a Feast view another one, though it has the same name."""
    fields = sorted((field.name, str(field.dtype)) for field in view.features)
    return view.batch_source.path, view.batch_source.timestamp_field, fields


def _latest(model: HybridModel, view: View, now: datetime) -> pd.DataFrame:
    """The newest row of each entity up to `now`, indexed by key."""
    rows = read_source(model.server, view, list(view.features))
    rows = rows[rows[TIME] <= now].drop_duplicates()
    ambiguous = int(rows.duplicated([KEY, TIME]).sum())
    if ambiguous:
        raise ConfigError(
            f"view {view.name!r}: {view.source.name!r} has {ambiguous} rows that repeat an entity and "
            f"{view.timestamp_field} with other values; keep one of each"
        )
    if rows.empty:
        raise ConfigError(f"view {view.name!r}: {view.source.name!r} has no row up to {now.isoformat()}")
    return rows.sort_values(TIME).groupby(KEY).tail(1).set_index(KEY)


def _pack(model: HybridModel, latest: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Entities that every view knows -> one row each, the columns of the packed source."""
    import pandas as pd

    frames = [rows.rename(columns={TIME: f"{TIME}_{name}"}) for name, rows in latest.items()]
    joined = pd.concat(frames, axis=1, join="inner").sort_index()
    times = joined[[f"{TIME}_{name}" for name in latest]]
    oldest: pd.Series[int] = times.min(axis=1).astype("datetime64[ms, UTC]").astype("int64")
    return pd.DataFrame(
        {
            model.server.entity.join_key: joined.index,
            ENTITY_TIME: times.max(axis=1).to_numpy(),
            SLOTS: list(slots_of(model.server, joined)),
            SCHEMA_HASH: model.server.features.schema_hash,
            OLDEST_MS: oldest.to_numpy(),
        }
    )


def _write(model: HybridModel, packed: pd.DataFrame, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = packed_file(model.server, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".new")
    pq.write_table(pa.Table.from_pandas(packed, preserve_index=False), draft)
    draft.replace(target)


def _check(model: HybridModel, packed: pd.DataFrame, store: FeatureStore, folder: Path, now: datetime) -> int:
    """Compares the three ways to the same slots on a sample of entities that are not stale."""
    server, now_ms = model.server, int(now.timestamp() * 1000)
    fresh = packed.loc[now_ms - packed[OLDEST_MS] <= server.max_feature_age.total_seconds() * 1000]
    places = np.unique(np.linspace(0, max(len(fresh) - 1, 0), SAMPLE).astype(int))[: len(fresh)]
    keys = fresh[server.entity.join_key].to_numpy()[places]
    if len(keys):
        served = reader(model, folder).read([str(key) for key in keys], now_ms).slots
        _same(served, _unpacked(model, store, keys), "get_online_features")
        _same(served, join(model, keys, None, folder, now=now), "get_historical_features")
    return len(keys)


def reader(model: HybridModel, folder: Path) -> PackedReader:
    """The reader of a declared model's packed view."""
    server = model.server
    return PackedReader(
        folder,
        packed_view=server.packed_view,
        join_key=server.entity.join_key,
        join_key_type=server.entity.dtype,
        schema_hash=server.features.schema_hash,
        max_age_s=server.max_feature_age.total_seconds(),
        width=len(server.features),
    )


def _unpacked(model: HybridModel, store: FeatureStore, keys: NDArray[np.object_]) -> NDArray[np.float32]:
    import pandas as pd

    service = store.get_feature_service(model.server.service)
    online = store.get_online_features(service, {model.server.entity.join_key: keys.tolist()}).to_dict()
    return slots_of(model.server, pd.DataFrame(online, dtype=object))


def _same(served: NDArray[np.float32], other: NDArray[np.float32], source: str) -> None:
    different = ~(np.isclose(served, other, rtol=0, atol=0, equal_nan=True)).all(axis=1)
    if different.any():
        raise HybridError(
            f"the packed features of {int(different.sum())} of {len(served)} sampled entities differ from "
            f"{source}; is another process writing the sources?"
        )
