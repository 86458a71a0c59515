"""Server slots for training: a point-in-time join through Feast, then the transforms."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from feature_store.definitions import ENTITY_TIME, open_store
from feature_store.light import import_feast
from hybrid.errors import ConfigError, NotFound
from hybrid.spec import HybridModel, Server, View

if TYPE_CHECKING:
    import pandas as pd
    from feast import FeatureService

# Columns of ours beside the team's.
KEY, TIME, ROW = "__key", "__time", "__row"


def join(
    model: HybridModel,
    entities: NDArray[Any],
    timestamps: NDArray[Any] | None,
    folder: Path,
    *,
    now: datetime | None = None,
) -> NDArray[np.float32]:
    """What the server knew about each entity at each time, as slots.

    Every row asked for comes back, in order, repeats included. An entity
    without a row in every view, within `max_feature_age` before its time, is an
    error: training must not learn from absent rows as if they were values.

    Args:
        model: applied to the store in `folder` before.
        entities: (n,) join keys.
        timestamps: (n,) of datetime64, or of datetimes (without a zone: UTC); None: `now` for all rows.
        folder: of the Feast store.
        now: the time of "latest"; the clock's unless given.

    Returns:
        (n, s) float32 slots in the order of `model.server.features`.

    Raises:
        NotFound: some rows have no features at their time; says how many.
        ConfigError: the model was not applied, or a key or time cannot be read.
    """
    slots, known = as_of(model, entities, timestamps, folder, now=now)
    if not known.all():
        absent = keys_of(model.server, entities)[~known]
        raise NotFound(
            f"{len(absent)} of {len(known)} rows have no features of their {model.server.entity.name} at their time "
            f"(in every view, at most {model.server.max_feature_age} old); {len(set(absent.tolist()))} distinct keys"
        )
    return slots


def as_of(
    model: HybridModel,
    entities: NDArray[Any],
    timestamps: NDArray[Any] | None,
    folder: Path,
    *,
    now: datetime | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What the server knew about each entity at each time, and where it knew anything; arguments as for `join`.

    Returns:
        (n, s) float32 slots, and (n,) whether every view has a row within `max_feature_age` before that time.
        Slots where there is none mean nothing.

    Raises:
        ConfigError: the model was not applied, or a key or time cannot be read.
    """
    import pandas as pd

    rows = pd.DataFrame({KEY: keys_of(model.server, entities), TIME: _times(timestamps, len(entities), now)})
    # Feast's dask store keeps one row of those with equal (entity, time), and drops
    # an entity whose rows are all out of the window: so each distinct pair is asked for once.
    distinct = rows.drop_duplicates(ignore_index=True)
    joined = _historical(model, distinct, folder)
    place: NDArray[np.intp] = rows.merge(distinct.reset_index(names=ROW), on=[KEY, TIME], how="left")[ROW].to_numpy()
    return slots_of(model.server, joined)[place], _known(model.server, distinct)[place]


def slots_of(server: Server, raw: pd.DataFrame) -> NDArray[np.float32]:
    """Raw feature columns, missing values as Feast or pandas give them -> (n, s) slots."""
    columns = {
        name: raw[name].astype(object).where(raw[name].notna(), None).to_numpy() for name in server.features.names
    }
    return server.features.slots(server.features.inputs(columns))


def keys_of(server: Server, entities: NDArray[Any]) -> NDArray[Any]:
    """(n,) join keys as the store has them.

    Raises:
        ConfigError: they should be integers, and are not.
    """
    values = np.asarray(entities)
    if server.entity.dtype == "text":
        return values.astype(str).astype(object)
    try:
        return values.astype(np.int64)
    except ValueError:
        raise ConfigError(f"{server.entity.join_key} must be integers, got {values.dtype}") from None


def read_source(server: Server, view: View, columns: list[str]) -> pd.DataFrame:
    """A view's source: the join key as KEY, the event time in UTC as TIME, and `columns`."""
    import pandas as pd
    import pyarrow.parquet as pq

    names = [server.entity.join_key, view.timestamp_field, *columns]
    table: pd.DataFrame = pq.read_table(view.source, columns=names).to_pandas()
    time = pd.to_datetime(table[view.timestamp_field], utc=True).astype("datetime64[ns, UTC]")
    key = table[server.entity.join_key].astype(object if server.entity.dtype == "text" else np.int64)
    return table[columns].assign(**{KEY: key, TIME: time})


def _historical(model: HybridModel, distinct: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """One row of raw features for each of `distinct`, in its order; empty where Feast has none."""
    import_feast()
    from feast.errors import FeatureServiceNotFoundException

    store = open_store(folder)
    try:
        service = store.get_feature_service(model.server.service)
    except FeatureServiceNotFoundException:
        service = None
    if service is None or set(_names(service)) != set(model.server.features.names):
        raise ConfigError(
            f"feature service {model.server.service!r} is not in the feature store as declared; "
            f"run `hybrid features apply {model.name}`"
        )
    asked = distinct.rename(columns={KEY: model.server.entity.join_key, TIME: ENTITY_TIME})
    found: pd.DataFrame = store.get_historical_features(asked.reset_index(names=ROW), service).to_df()
    assert found[ROW].is_unique, "a historical join returned a row twice"
    return found.set_index(ROW).reindex(np.arange(len(asked)))


def _names(service: FeatureService) -> list[str]:
    return [field.name for projection in service.feature_view_projections for field in projection.features]


def _known(server: Server, distinct: pd.DataFrame) -> NDArray[np.bool_]:
    """(n,) whether every view has a row of the entity within the window: Feast cannot tell absent from empty."""
    import pandas as pd

    asked = distinct.reset_index(names=ROW).sort_values(TIME)
    known = np.ones(len(distinct), dtype=bool)
    for view in server.views:
        source = read_source(server, view, []).assign(there=True).sort_values(TIME)
        merged = pd.merge_asof(asked, source, on=TIME, by=KEY, tolerance=pd.Timedelta(server.max_feature_age))
        known[merged[ROW]] &= merged["there"].notna().to_numpy()
    return known


def _times(timestamps: NDArray[Any] | None, n: int, now: datetime | None) -> Any:
    import pandas as pd

    values = np.full(n, np.datetime64((now or datetime.now(UTC)).astimezone(UTC).replace(tzinfo=None), "ns"))
    if timestamps is not None:
        values = np.asarray(timestamps)
    if values.dtype.kind not in "MO" or len(values) != n:
        raise ConfigError(f"timestamps must be {n} of datetime64 in UTC, got {len(values)} of {values.dtype}")
    return pd.to_datetime(pd.Series(values), utc=True).astype("datetime64[ns, UTC]")
