"""The coupon survey as a team would hold it: a table of people's rows, and a table of offers."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

DATA = Path(__file__).parent / "data"
PROFILE = [
    *("gender", "age", "maritalStatus", "has_children", "education", "occupation", "income", "car"),
    *("Bar", "CoffeeHouse", "CarryAway", "RestaurantLessThan20", "Restaurant20To50"),
]


def load() -> pd.DataFrame:
    """The survey's rows with a `user` and an `offer_id` column.

    A respondent's rows are contiguous with one constant profile, so each run of
    equal profiles is one user (see data/SOURCE.md).
    """
    rows = pd.read_csv(DATA / "coupons.csv.gz", dtype={"age": str})
    profile = rows[PROFILE].fillna("")
    starts = (profile != profile.shift()).any(axis=1)
    return rows.assign(
        user=starts.cumsum().map("respondent-{:04d}".format), offer_id=rows.coupon + "/" + rows.expiration
    )


def offers(rows: pd.DataFrame, *, now: datetime | None = None) -> pd.DataFrame:
    """One row per offer: what the server's feature store holds.

    Args:
        rows: of training users only, so that no one's own label comes back as a feature.
        now: event time of the aggregates; the current time if None.
    """
    grouped = rows.groupby("offer_id", as_index=False)
    table = grouped.agg(coupon=("coupon", "first"), expiration=("expiration", "first"), acceptance_rate=("Y", "mean"))
    return table.assign(event_timestamp=pd.Timestamp(now or datetime.now(UTC)))
