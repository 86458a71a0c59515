"""The Feast objects of a model, and the store that holds them.

From one declaration come a Feast entity, a feature view with raw values for
each declared view, a feature service over them, and the packed view: all slots
of an entity as one array, which is what serving reads (Feast decodes one value
per feature and row; one array is an order of magnitude cheaper than sixteen
numbers).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import ConfigError
from hybrid.features import Transform
from hybrid.spec import HybridModel, Server, View

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import Entity, FeatureService, FeatureStore, FeatureView

PROJECT = "hybrid"
ENTITY_TIME = "event_timestamp"  # Feast's name for the time that a historical join asks about

# Fields of a packed view. Feast keeps an event time of its own, in whole seconds
# on SQLite, and of the newest view; a row is as old as its oldest part.
SLOTS, SCHEMA_HASH, OLDEST_MS = "slots", "schema_hash", "oldest_ms"


@dataclass(frozen=True)
class Definitions:
    """What one model asks Feast for.

    Attributes:
        entity: what the features hang on.
        views: raw values, one Feast view per declared view.
        service: over `views`, for historical joins and for the check of the packed view.
        packed: SLOTS, the transformed features in the order of `server.features`;
            SCHEMA_HASH of them; OLDEST_MS, the event time of the oldest view's row, Unix ms.
    """

    entity: Entity
    views: tuple[FeatureView, ...]
    service: FeatureService
    packed: FeatureView

    @property
    def objects(self) -> list[Any]:
        """All of them, for `FeatureStore.apply`."""
        return [self.entity, *self.views, self.service, self.packed]


def open_store(folder: Path) -> FeatureStore:
    """The embedded Feast store in `folder`: file registry, SQLite online, Parquet offline.

    Takes seconds the first time in a process, to import Feast.
    """
    from feast import FeatureStore, RepoConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = RepoConfig(
        project=PROJECT,
        provider="local",
        registry={"path": str(folder / "registry.db"), "cache_ttl_seconds": 300},
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        offline_store={"type": "dask"},
        materialization={"online_write_batch_size": 10_000},
        entity_key_serialization_version=3,
    )
    return FeatureStore(config=config)


def packed_file(server: Server, folder: Path) -> Path:
    """The generated source of the packed view."""
    return folder / "packed" / f"{server.service}.parquet"


def build(model: HybridModel, folder: Path) -> Definitions:
    """Generates a model's Feast objects.

    Args:
        model: its sources must exist: their columns' types become the fields' types.
        folder: of the store, where the packed view's source will lie.

    Raises:
        ConfigError: a source is not what the declaration says; see `check_sources`.
    """
    from feast import Entity, FeatureService
    from feast.value_type import ValueType

    check_sources(model)
    server = model.server
    value_type = ValueType.STRING if server.entity.dtype == "text" else ValueType.INT64
    entity = Entity(name=server.entity.name, join_keys=[server.entity.join_key], value_type=value_type)
    views = tuple(_view(entity, server, view) for view in server.views)
    service = FeatureService(name=server.service, features=list(views))
    return Definitions(entity, views, service, _packed(entity, server, folder))


def check_sources(model: HybridModel) -> None:
    """Checks that every declared column is in its file, with a type that fits.

    Raises:
        ConfigError: names the view and column, what it must be and what the file has.
    """
    for view in model.server.views:
        schema = _schema(view)
        _check_column(view, schema, model.server.entity.join_key, _key_kind(model.server))
        _check_column(view, schema, view.timestamp_field, "timestamp")
        _check_filled(view, model.server.entity.join_key, view.timestamp_field)
        for name, transform in view.features.items():
            if name == ENTITY_TIME:
                raise ConfigError(
                    f"{view.name}.{name}: Feast keeps this name for the time asked about; rename the feature"
                )
            _check_column(view, schema, name, _feature_kind(transform))


def _view(entity: Entity, server: Server, view: View) -> FeatureView:
    from feast import FeatureView, Field, FileSource

    schema = _schema(view)
    return FeatureView(
        name=view.name,
        entities=[entity],
        ttl=server.max_feature_age,  # holds in historical joins only; `online` checks the age itself
        schema=[Field(name=name, dtype=_dtype(schema.field(name).type)) for name in view.features],
        source=FileSource(name=view.name, path=str(view.source), timestamp_field=view.timestamp_field),
    )


def _packed(entity: Entity, server: Server, folder: Path) -> FeatureView:
    from feast import FeatureView, Field, FileSource
    from feast.types import Array, Float32, Int64, String

    source = FileSource(name=server.packed_view, path=str(packed_file(server, folder)), timestamp_field=ENTITY_TIME)
    return FeatureView(
        name=server.packed_view,
        entities=[entity],
        ttl=server.max_feature_age,
        schema=[
            Field(name=SLOTS, dtype=Array(Float32)),
            Field(name=SCHEMA_HASH, dtype=String),
            Field(name=OLDEST_MS, dtype=Int64),
        ],
        source=source,
    )


def _schema(view: View) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not view.source.is_file():
        raise ConfigError(f"view {view.name!r}: source must be a Parquet file, {view.source.name!r} does not exist")
    try:
        return pq.read_schema(view.source)
    except pa.ArrowException as error:
        raise ConfigError(
            f"view {view.name!r}: source must be a Parquet file, {view.source.name!r} is not ({type(error).__name__})"
        ) from None


def _key_kind(server: Server) -> str:
    return "text" if server.entity.dtype == "text" else "integer"


def _feature_kind(transform: Transform) -> str:
    return "text" if transform.text else "number"


def _check_column(view: View, schema: pa.Schema, column: str, kind: str) -> None:
    if column not in schema.names:
        raise ConfigError(f"{view.name}.{column}: {view.source.name!r} has no such column, it has {schema.names}")
    got = schema.field(column).type
    if not _is(kind, got):
        raise ConfigError(f"{view.name}.{column} must be {_KINDS[kind]}, {view.source.name!r} has {got}")


def _check_filled(view: View, *columns: str) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(view.source, columns=list(columns))
    for column in columns:
        if nulls := table[column].null_count:
            raise ConfigError(f"{view.name}.{column} must be in every row, {view.source.name!r} lacks it in {nulls}")


_KINDS = {
    "text": "text (string)",
    "integer": "an integer (int64)",
    "number": "a number (float64, float32, an integer or bool)",
    "timestamp": "a timestamp",
}


def _is(kind: str, dtype: pa.DataType) -> bool:
    from pyarrow import types

    if kind == "text":
        inner = dtype.value_type if types.is_dictionary(dtype) else dtype
        return bool(types.is_string(inner) or types.is_large_string(inner))
    if kind == "integer":
        return bool(types.is_integer(dtype) and not types.is_uint64(dtype))
    if kind == "timestamp":
        return bool(types.is_timestamp(dtype))
    return bool(_is("integer", dtype) or types.is_float32(dtype) or types.is_float64(dtype) or types.is_boolean(dtype))


def _dtype(dtype: pa.DataType) -> Any:
    """Feast's type for a column: its converters take a value only as that very type."""
    from feast.types import Bool, Float32, Float64, Int32, Int64, String
    from pyarrow import types

    if types.is_floating(dtype):
        return Float32 if types.is_float32(dtype) else Float64
    if types.is_integer(dtype):
        return Int32 if types.is_signed_integer(dtype) and dtype.bit_width <= 32 else Int64
    return Bool if types.is_boolean(dtype) else String
