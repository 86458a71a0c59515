"""Were features served that the offline store never had?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from feature_store.offline import KEY, TIME, as_of, keys_of, read_source
from hybrid.spec import HybridModel

if TYPE_CHECKING:
    import pandas as pd

SAME, LATE, SKEWED, ABSENT = "same", "late", "skewed", "absent"


@dataclass(frozen=True)
class Compared:
    """What the offline store says of n rows as served.

    Attributes:
        offline: (n, s) slots: those that the served ones were compared with; NaN where absent.
        status: (n,) "same": the join says the same of the moment when the row was served. "late": of an
            earlier one, but the offline store knew newer values already: the online store was behind.
            "skewed": of no moment between the features' time and the serving. "absent": the
            offline store has no features of the entity there.
    """

    offline: NDArray[np.float32]
    status: NDArray[np.object_]


@dataclass(frozen=True)
class Served:
    """The server's side of n rows, as served.

    Attributes:
        entity: (n,) join keys as text.
        slots: (n, s), NaN where a value is missing.
        feature_ms: (n,) when the oldest of the features was true, Unix time.
        merged_ms: (n,) when the row was served, Unix time.
    """

    entity: NDArray[np.object_]
    slots: NDArray[np.float32]
    feature_ms: NDArray[np.int64]
    merged_ms: NDArray[np.int64]


def compare(model: HybridModel, served: Served, folder: Path, tolerance: float) -> Compared:
    """Compares rows as served with the offline point-in-time join.

    The features of several views have each a time of their own, of which only the oldest is
    known; so a row that differs from the join at the time of serving is compared with it at
    every time since `feature_ms` at which a view's row of its entity changed.

    Args:
        model: applied to the store in `folder`.
        served: the rows.
        folder: of the Feast store.
        tolerance: largest difference of a slot that counts as none.

    Raises:
        ConfigError: the model was not applied.
    """
    offline, known = as_of(model, served.entity, _at(served.merged_ms), folder)
    same = known & _alike(served.slots, offline, tolerance)
    status = np.where(same, SAME, np.where(known, SKEWED, ABSENT)).astype(object)
    moments = _moments(model, served, np.flatnonzero(~same))
    if len(moments):
        rows = moments[_ROW].to_numpy()
        then, there = as_of(model, served.entity[rows], moments[TIME].dt.tz_localize(None).to_numpy(), folder)
        matches = there & _alike(served.slots[rows], then, tolerance)
        # What is shown beside a skewed row is what held at its features' own time, or soonest after it.
        for chosen, mark in ((there, SKEWED), (matches, LATE)):
            soonest = np.flatnonzero(chosen)[::-1]
            offline[rows[soonest]], status[rows[soonest]] = then[soonest], mark
    offline[status == ABSENT] = np.nan
    return Compared(offline, status)


_ROW = "__row"


def _moments(model: HybridModel, served: Served, rows: NDArray[np.intp]) -> pd.DataFrame:
    """(_ROW, TIME): for each of `rows` its features' own time, and each later one at which its entity changed."""
    import pandas as pd

    asked = pd.DataFrame({_ROW: rows, KEY: keys_of(model.server, served.entity[rows])})
    asked["from"] = pd.to_datetime(pd.Series(_at(served.feature_ms[rows])), utc=True)
    asked["to"] = pd.to_datetime(pd.Series(_at(served.merged_ms[rows])), utc=True)
    own = asked[[_ROW, "from"]].rename(columns={"from": TIME})
    changes = pd.concat([read_source(model.server, view, []) for view in model.server.views]).drop_duplicates()
    later = asked.merge(changes, on=KEY)
    later = later[(later["from"] < later[TIME]) & (later[TIME] <= later["to"])]
    return pd.concat([own, later[[_ROW, TIME]]]).drop_duplicates().sort_values([_ROW, TIME], ignore_index=True)


def _at(unix_ms: NDArray[np.int64]) -> NDArray[Any]:
    """The last microsecond of each millisecond, to which a feature's time was cut; Feast drops nanoseconds."""
    return unix_ms.astype("datetime64[ms]").astype("datetime64[ns]") + np.timedelta64(999, "us")


def _alike(a: NDArray[np.float32], b: NDArray[np.float32], tolerance: float) -> NDArray[np.bool_]:
    return np.asarray(np.isclose(a, b, rtol=0, atol=tolerance, equal_nan=True).all(axis=1))
