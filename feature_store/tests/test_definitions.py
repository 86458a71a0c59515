"""The Feast objects that a declaration becomes, and what is refused before Feast sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.definitions import build, check_sources
from hybrid import Categorical, Entity, Numeric
from hybrid.errors import ConfigError


def replace_column(file: Path, column: str, values: Any) -> None:
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, values), file)


def refused(case: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sources(case.model)
    assert message in str(caught.value)


def test_the_feast_objects_are_what_was_declared(two_views):
    """Entity, one view per file with the columns' own types, a service over both, and the packed view."""
    from feast.types import Array, Bool, Float32, Int64, String
    from feast.value_type import ValueType

    feast = build(two_views.model, two_views.store)
    assert (feast.entity.name, feast.entity.join_key, feast.entity.value_type) == ("shop", "shop_id", ValueType.INT64)
    fields = [{field.name: field.dtype for field in view.features} for view in feast.views]
    assert fields == [{"open": Bool, "items": Int64}, {"time": Float32}]
    assert [view.batch_source.timestamp_field for view in feast.views] == ["event_timestamp", "at"]
    assert [projection.name for projection in feast.service.feature_view_projections] == ["stock", "visits"]
    packed = {field.name: field.dtype for field in feast.packed.features}
    assert packed == {"slots": Array(Float32), "schema_hash": String, "oldest_ms": Int64}
    assert feast.packed.name == "shops_v1__packed"


def test_an_unknown_feature_is_named_with_what_the_file_has(one_view):
    """The declaration says `acceptance`, the file has `rate`."""
    view = one_view.model.server.views[0].model_copy(update={"features": {"acceptance": Numeric()}})
    refused(
        one_view.with_model(views=(view,)),
        "offers.acceptance: 'offers.parquet' has no such column, "
        "it has ['offer_id', 'coupon', 'rate', 'event_timestamp']",
    )


def test_a_column_must_fit_its_transform(one_view):
    """Text for numbers, and numbers for text, are errors of the declaration."""
    view = one_view.model.server.views[0]
    text = view.model_copy(update={"features": {"coupon": Numeric()}})
    refused(one_view.with_model(views=(text,)), "offers.coupon must be a number")
    number = view.model_copy(update={"features": {"rate": Categorical(vocabulary=("a",))}})
    refused(one_view.with_model(views=(number,)), "offers.rate must be text (string), 'offers.parquet' has double")


@pytest.mark.parametrize("dtype", [pa.decimal128(12, 2), pa.uint64(), pa.date32()])
def test_types_without_an_exact_meaning_are_refused(one_view, dtype):
    """Numbers are what float32 can take: decimals, dates and the largest integers are converted by their owner."""
    values = pa.array([1, 2, 3, 4, 5], pa.int32()).cast(dtype)
    replace_column(one_view.sources / "offers.parquet", "rate", values)
    refused(
        one_view, f"offers.rate must be a number (float64, float32, an integer or bool), 'offers.parquet' has {dtype}"
    )


def test_the_join_key_and_the_timestamp_are_checked(one_view):
    """Both must be there, of their type, in every row."""
    file = one_view.sources / "offers.parquet"
    entity = Entity(name="offer", join_key="offer")
    refused(one_view.with_model(entity=entity), "offers.offer: 'offers.parquet' has no such column")
    entity = Entity(name="offer", join_key="offer_id", dtype="integer")
    refused(
        one_view.with_model(entity=entity), "offers.offer_id must be an integer (int64), 'offers.parquet' has string"
    )
    replace_column(file, "offer_id", pa.array(["a", None, None, "c", "d"]))
    refused(one_view, "offers.offer_id must be in every row, 'offers.parquet' lacks it in 2")
    replace_column(file, "event_timestamp", pa.array([1, 2, 3, 4, 5]))
    refused(one_view, "offers.event_timestamp must be a timestamp, 'offers.parquet' has int64")


def test_a_source_must_be_a_parquet_file(one_view):
    """Absent, or something else."""
    file = one_view.sources / "offers.parquet"
    file.write_text("offer_id,rate\na,0.5\n")
    refused(one_view, "view 'offers': source must be a Parquet file, 'offers.parquet' is not (ArrowInvalid)")
    file.unlink()
    refused(one_view, "view 'offers': source must be a Parquet file, 'offers.parquet' does not exist")


def test_a_feature_cannot_have_the_name_of_feasts_own_column(two_views):
    """The historical join would mix the feature with the time that is asked about."""
    visits = two_views.model.server.views[1]
    write = visits.model_copy(update={"features": {"event_timestamp": Numeric()}})
    refused(two_views.with_model(views=(write,)), "visits.event_timestamp: Feast keeps this name")
