"""What is brought into the store, and what is refused there."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from feature_store.definitions import open_store, packed_file
from feature_store.materialize import apply, materialize, reader
from hybrid import Entity, Numeric
from hybrid.errors import ConfigError, HybridError

DAY = timedelta(days=1)


def rows_of(case, entities):
    return reader(case.model, case.store).read(entities, case.now_ms)


def append(file, **columns):
    pd.concat([pd.read_parquet(file), pd.DataFrame(columns)]).to_parquet(file, index=False)


def test_the_newest_row_of_each_entity_is_loaded(one_view):
    """a, b and c: d's row is of tomorrow. Two of them are fresh, and compared three ways."""
    assert apply(one_view.model, one_view.store) == ["offers", "offers_v1", "offers_v1__packed"]
    done = materialize(one_view.model, one_view.store, one_view.now)
    assert (done.views, done.packed, done.checked) == ({"offers": 3}, 3, 2)
    rows = rows_of(one_view, ["a", "b"])
    np.testing.assert_array_equal(rows.slots, np.array([[0, 1], [3, np.nan]], dtype=np.float32))


def test_applying_and_materialising_again_is_harmless(one_view):
    """The second time sees the row that came since."""
    for _ in range(2):
        apply(one_view.model, one_view.store)
        materialize(one_view.model, one_view.store, one_view.now)
    append(
        one_view.sources / "offers.parquet",
        offer_id=["b"],
        coupon=["Coffee"],
        rate=[0.25],
        event_timestamp=[one_view.now],
    )
    materialize(one_view.model, one_view.store, one_view.now)
    assert rows_of(one_view, ["b"]).slots.tolist() == [[1.0, -1.0]]


def test_views_are_joined_on_the_key_as_of_now(two_views):
    """Shop 1: open, 9 items (bucket 1), log(1 + 30) / 2; shop 3 has no visits, so it has no packed row.

    Shop 1 is as old as its visits, 3 days; shop 2 as its stock, 2 days.
    """
    apply(two_views.model, two_views.store)
    done = materialize(two_views.model, two_views.store, two_views.now)
    assert (done.views, done.packed, done.checked) == ({"stock": 3, "visits": 2}, 2, 2)
    rows = rows_of(two_views, ["1", "2", "3"])
    assert rows.status.tolist() == ["ok", "ok", "unknown_entity"]
    assert rows.age_ms.tolist() == [3 * 86_400_000, 2 * 86_400_000, -1]
    expected = [[1, 1, np.log(31) / 2], [0, 2, np.log(301) / 2], [np.nan] * 3]
    np.testing.assert_allclose(rows.slots, expected, rtol=1e-6)


def test_an_ambiguous_source_is_refused(one_view):
    """Two values of one entity at one time: which is true cannot be known. An exact repeat is no harm."""
    apply(one_view.model, one_view.store)
    file, an_hour_ago = one_view.sources / "offers.parquet", one_view.now - DAY / 24
    append(file, offer_id=["a"], coupon=["Bar"], rate=[0.75], event_timestamp=[an_hour_ago])
    materialize(one_view.model, one_view.store, one_view.now)
    append(file, offer_id=["a"], coupon=["Coffee"], rate=[0.75], event_timestamp=[an_hour_ago])
    with pytest.raises(ConfigError, match="has 1 rows that repeat an entity and event_timestamp with other values"):
        materialize(one_view.model, one_view.store, one_view.now)


def test_a_source_without_rows_yet_is_refused(one_view):
    """Nothing to serve is an error where it can be mended, not an empty store."""
    apply(one_view.model, one_view.store)
    with pytest.raises(ConfigError, match=r"view 'offers': 'offers\.parquet' has no row up to 2025-"):
        materialize(one_view.model, one_view.store, one_view.now - 200 * DAY)


def test_a_model_that_was_not_applied_is_refused(one_view):
    """Or was applied, and changed since: what Feast has is not what is declared."""
    command = "are not in the feature store as declared; run `hybrid features apply coupon`"
    with pytest.raises(ConfigError, match=command):
        materialize(one_view.model, one_view.store, one_view.now)
    apply(one_view.model, one_view.store)
    view = one_view.model.server.views[0]
    fewer = one_view.with_model(views=(view.model_copy(update={"features": {"rate": Numeric()}}),))
    with pytest.raises(ConfigError, match=command):
        materialize(fewer.model, fewer.store, fewer.now)


def test_packed_values_that_differ_are_found(one_view, monkeypatch):
    """Rows packed by another reading of the sources than Feast's do not pass the check."""
    import feature_store.materialize as module

    apply(one_view.model, one_view.store)
    honest = module._pack

    def shifted(model, latest):
        packed = honest(model, latest)
        return packed.assign(slots=[slots + 1 for slots in packed["slots"]])

    monkeypatch.setattr(module, "_pack", shifted)
    with pytest.raises(HybridError, match="packed features of 2 of 2 sampled entities differ from get_online_features"):
        materialize(one_view.model, one_view.store, one_view.now)


def test_two_models_may_share_a_view_but_not_its_name(one_view):
    """Declared alike it is the same view; otherwise one model would change the other's features."""
    apply(one_view.model, one_view.store)
    apply(one_view.with_model(service="offers_v2").model, one_view.store)
    view = one_view.model.server.views[0]
    fewer = view.model_copy(update={"features": {"rate": Numeric()}})
    with pytest.raises(ConfigError, match=r"view 'offers' is also in feature service 'offers_v[12]', with other"):
        apply(one_view.with_model(service="offers_v3", views=(fewer,)).model, one_view.store)
    pd.read_parquet(view.source).assign(deal=["v", "w", "x", "y", "z"]).to_parquet(one_view.sources / "deals.parquet")
    entity = Entity(name="offer", join_key="deal")
    other = view.model_copy(update={"name": "deals", "source": one_view.sources / "deals.parquet"})
    with pytest.raises(ConfigError, match="entity 'offer' has join_key 'offer_id' in the feature store, got 'deal'"):
        apply(one_view.with_model(service="offers_v3", entity=entity, views=(other,)).model, one_view.store)


def test_the_packed_source_is_a_feast_source_like_any_other(one_view):
    """A Parquet file that Feast materialises: one row an entity, event time and hash beside the slots."""
    apply(one_view.model, one_view.store)
    materialize(one_view.model, one_view.store, one_view.now)
    table = pq.read_table(packed_file(one_view.model.server, one_view.store)).to_pydict()
    assert table["offer_id"] == ["a", "b", "c"]
    assert set(table["schema_hash"]) == {one_view.model.server.features.schema_hash}
    assert open_store(one_view.store).get_feature_view("offers_v1__packed").batch_source.path == str(
        packed_file(one_view.model.server, one_view.store)
    )


def test_rows_become_stale_as_time_passes(one_view):
    """The same rows, read 31 days later."""
    apply(one_view.model, one_view.store)
    materialize(one_view.model, one_view.store, one_view.now)
    later = replace(one_view, now=one_view.now + 31 * DAY)
    assert rows_of(later, ["a"]).status.tolist() == ["stale_features"]
