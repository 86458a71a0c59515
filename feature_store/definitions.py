"""The Feast objects of a model, and the store that holds them.

From one declaration come a Feast entity, a feature view with raw values for
each declared view, a feature service over them, and the packed view: all slots
of an entity as one array, which is what serving reads (Feast decodes one value
per feature and row; one array is an order of magnitude cheaper than sixteen
numbers).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feature_store.light import import_feast
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

ONLINE_FILE = "online.json"
NEWEST_REDIS = "feature_store.newest_redis.NewestRedisOnlineStore"
COMMA = "\\u002c"


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


class OnlineStore(BaseModel):
    """Where the features that serving reads lie: `online.json` in the store's folder, SQLite where there is none.

    Attributes:
        kind: "sqlite", a file in the folder, for one machine; "redis", a server.
        address: of Redis, HOST:PORT.
        database: of Redis, its number: deployments that share a server must not share a database.
        tls: whether Redis is spoken to over TLS.
        username: of Redis, if it has users.
        password_file: a file that holds Redis's password; an absolute path, read by each process that opens the store.
        timeout_s: of one call to Redis.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sqlite", "redis"] = "sqlite"
    address: str = Field("127.0.0.1:6379", pattern=r"^[A-Za-z0-9_.-]+:[0-9]{1,5}$")
    database: int = Field(0, ge=0)
    tls: bool = False
    username: str | None = None
    password_file: Path | None = None
    timeout_s: float = Field(2.0, gt=0)

    @classmethod
    def read(cls, folder: Path) -> OnlineStore:
        """The configuration of the store in `folder`.

        Raises:
            ConfigError: the file is not one; names the setting.
        """
        file = folder / ONLINE_FILE
        if not file.exists():
            return cls()
        try:
            return cls.of(json.loads(file.read_text()))
        except ValueError:
            raise ConfigError(f"{ONLINE_FILE} in the feature store must be JSON") from None

    @classmethod
    def of(cls, settings: Any) -> OnlineStore:
        """A configuration from its settings by name.

        Raises:
            ConfigError: one of them is wrong; names it.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"the online store's settings ({ONLINE_FILE}): {wrong}") from None

    def write(self, folder: Path) -> Path:
        """Replaces the configuration in one step; open stores keep theirs."""
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{ONLINE_FILE}.new"
        draft.write_text(self.model_dump_json(indent=2))
        return draft.replace(folder / ONLINE_FILE)

    def for_feast(self, folder: Path) -> dict[str, Any]:
        """What Feast is told.

        Raises:
            ConfigError: the password's file cannot be read.
        """
        if self.kind == "sqlite":
            return {"type": "sqlite", "path": str(folder / "online.db")}
        settings: dict[str, Any] = {
            "db": self.database,
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": self.timeout_s,
        }
        settings |= {"ssl": True} if self.tls else {}
        settings |= {"username": self.username} if self.username else {}
        settings |= {"password": secret_of(self.password_file)} if self.password_file else {}
        # Feast splits at commas first and reads each value as JSON, where a comma can be written otherwise.
        text = [f"{name}={json.dumps(value).replace(',', COMMA)}" for name, value in settings.items()]
        return {"type": NEWEST_REDIS, "connection_string": ",".join([self.address, *text])}


def open_store(folder: Path) -> FeatureStore:
    """The embedded Feast store in `folder`: file registry, Parquet offline, online as `OnlineStore` says.

    Takes seconds the first time in a process, to import Feast.

    Raises:
        ConfigError: the online store's configuration is wrong, or its client is not installed.
    """
    import_feast()
    from feast import FeatureStore, RepoConfig

    folder.mkdir(parents=True, exist_ok=True)
    online = OnlineStore.read(folder)
    if online.kind == "redis" and find_spec("redis") is None:
        raise ConfigError(
            "the online store is Redis, whose client is not installed: pip install 'hybrid-towers[redis]'"
        )
    config = RepoConfig(
        project=PROJECT,
        provider="local",
        registry={"path": str(folder / "registry.db"), "cache_ttl_seconds": 300},
        online_store=online.for_feast(folder),
        offline_store={"type": "dask"},
        materialization={"online_write_batch_size": 10_000},
        entity_key_serialization_version=3,
    )
    return FeatureStore(config=config)


def secret_of(file: Path) -> str:
    """The password in a file. Raises: ConfigError: the file cannot be read."""
    try:
        return file.read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"password_file must be a readable file, {file}: {type(error).__name__}") from None


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
    import_feast()
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
    import_feast()
    from feast.types import Bool, Float32, Float64, Int32, Int64, String
    from pyarrow import types

    if types.is_floating(dtype):
        return Float32 if types.is_float32(dtype) else Float64
    if types.is_integer(dtype):
        return Int32 if types.is_signed_integer(dtype) and dtype.bit_width <= 32 else Int64
    return Bool if types.is_boolean(dtype) else String
