"""A small model with its source files, for tests of the feature store."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as _replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybrid import Bucketize, Categorical, Clear, Entity, HybridModel, Label, Log1p, Numeric, Privacy, Server, View

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def declare(*views: View, **server: Any) -> HybridModel:
    """A model over the given views."""
    fields: dict[str, Any] = {
        "service": "offers_v1",
        "entity": Entity(name="offer", join_key="offer_id"),
        "views": views,
        "max_feature_age": 30 * DAY,
    }
    return HybridModel(
        name="coupon",
        server=Server(**fields | server),
        device={"habit": Numeric()},
        server_tower=lambda: None,
        device_tower=lambda: None,
        head=lambda: None,
        label=Label(column="redeemed", visible_to="server"),
        privacy=Privacy(epsilon=8, delta=1e-4, clip=1.0, unit="user"),
        merge="server",
        release=Clear(reason="for a test of the feature store"),
    )


@dataclass(frozen=True)
class Case:
    """A model, its sources' folder and its store; its time stands still."""

    model: HybridModel
    sources: Path
    store: Path
    now: datetime = NOW

    @property
    def now_ms(self) -> int:
        """Unix time."""
        return int(self.now.timestamp() * 1000)

    def with_model(self, **server: Any) -> Case:
        """The same sources and store under another declaration."""
        declared = {name: getattr(self.model.server, name) for name in ("service", "entity", "max_feature_age")}
        return _replace(self, model=declare(*server.pop("views", self.model.server.views), **declared | server))


def write(file: Path, **columns: Any) -> None:
    """A Parquet file of the given columns."""
    pd.DataFrame(columns).to_parquet(file, index=False)


@pytest.fixture
def one_view(tmp_path: Path) -> Case:
    """Offers a and b an hour old with an older row of a, c 40 days old, d tomorrow's.

    Slots: coupon by place (Bar 0, Coffee 1, missing 3), rate (x - 0.5) / 0.25.
    """
    write(
        tmp_path / "offers.parquet",
        offer_id=["a", "a", "b", "c", "d"],
        coupon=["Coffee", "Bar", None, "Bar", "Bar"],
        rate=[0.25, 0.75, None, 0.5, 0.5],
        event_timestamp=[NOW - 2 * DAY, NOW - DAY / 24, NOW - DAY / 24, NOW - 40 * DAY, NOW + DAY],
    )
    features = {"coupon": Categorical(vocabulary=("Bar", "Coffee")), "rate": Numeric(mean=0.5, std=0.25)}
    view = View(name="offers", source=tmp_path / "offers.parquet", features=features)
    return Case(declare(view), tmp_path, tmp_path / "feast")


@pytest.fixture
def two_views(tmp_path: Path) -> Case:
    """Shops 1, 2 with stock and visits of different age; 3 has stock only; keys are integers, "time" a feature."""
    write(
        tmp_path / "stock.parquet",
        shop_id=[1, 2, 3],
        open=[True, False, True],
        items=pd.array([9, None, 3], dtype="Int64"),
        event_timestamp=[NOW - DAY, NOW - 2 * DAY, NOW],
    )
    write(
        tmp_path / "visits.parquet",
        shop_id=[1, 1, 2],
        time=pd.Series([3.0, 30.0, 300.0], dtype="float32"),
        at=[NOW - 5 * DAY, NOW - 3 * DAY, NOW - DAY],
    )
    stock = View(
        name="stock",
        source=tmp_path / "stock.parquet",
        features={"open": Numeric(), "items": Bucketize(edges=(5.0,))},
    )
    visits = View(
        name="visits", source=tmp_path / "visits.parquet", timestamp_field="at", features={"time": Log1p(std=2.0)}
    )
    entity = Entity(name="shop", join_key="shop_id", dtype="integer")
    return Case(declare(stock, visits, service="shops_v1", entity=entity), tmp_path, tmp_path / "feast")
