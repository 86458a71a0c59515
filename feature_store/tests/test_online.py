"""Packed reads: what is served, and what is said where nothing may be."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from hypothesis import given
from hypothesis import strategies as st

from feature_store import online
from feature_store.definitions import open_store
from feature_store.materialize import apply, materialize, reader
from feature_store.online import PackedReader, key_encoder
from hybrid import Numeric
from hybrid.errors import ConfigError


@pytest.fixture
def loaded(one_view):
    """`one_view`, materialised."""
    apply(one_view.model, one_view.store)
    materialize(one_view.model, one_view.store, one_view.now)
    return one_view


def test_every_entity_has_its_status_in_the_order_asked(loaded):
    """a is there twice, zz is unknown, c is 40 days old and 30 are allowed; d is of tomorrow and was not loaded."""
    rows = reader(loaded.model, loaded.store).read(["a", "zz", "c", "a", "d"], loaded.now_ms)
    assert rows.status.tolist() == ["ok", "unknown_entity", "stale_features", "ok", "unknown_entity"]
    assert rows.age_ms.tolist() == [3_600_000, -1, 40 * 86_400_000, 3_600_000, -1]
    nothing = [np.nan, np.nan]
    np.testing.assert_array_equal(rows.slots, np.array([[0, 1], nothing, nothing, [0, 1], nothing], dtype=np.float32))
    assert rows.slots.dtype == np.float32


def test_a_missing_value_is_a_slot_of_its_own(loaded):
    """b is known, its coupon is missing (3 = vocabulary of 2, plus 1) and its rate NaN: not an unknown entity."""
    rows = reader(loaded.model, loaded.store).read(["b"], loaded.now_ms)
    assert rows.status.tolist() == ["ok"]
    np.testing.assert_array_equal(rows.slots, np.array([[3, np.nan]], dtype=np.float32))


def test_a_row_may_be_exactly_as_old_as_allowed(loaded):
    """An hour old at now; 30 days after its event it is served, one millisecond later it is not."""
    month_after = loaded.now_ms - 3_600_000 + 30 * 86_400_000
    read = reader(loaded.model, loaded.store).read
    assert [read(["a"], at).status[0] for at in (month_after, month_after + 1)] == ["ok", "stale_features"]


def test_a_clock_behind_the_row_gives_age_zero(loaded):
    """Clocks of two machines differ; an age is never negative, which means absent."""
    rows = reader(loaded.model, loaded.store).read(["a"], loaded.now_ms - 7_200_000)
    assert (rows.status[0], rows.age_ms[0]) == ("ok", 0)


def test_rows_packed_by_another_schema_are_drift(loaded):
    """A constant changed: the stored slots mean something else than the model learned."""
    view = loaded.model.server.views[0]
    changed = view.model_copy(update={"features": dict(view.features) | {"rate": Numeric(mean=0.4, std=0.25)}})
    other = loaded.with_model(views=(changed,))
    rows = reader(other.model, other.store).read(["a", "zz"], other.now_ms)
    assert rows.status.tolist() == ["schema_drift", "unknown_entity"]
    assert np.isnan(rows.slots).all()
    apply(other.model, other.store)
    materialize(other.model, other.store, other.now)
    assert reader(other.model, other.store).read(["a"], other.now_ms).status.tolist() == ["ok"]
    assert reader(loaded.model, loaded.store).read(["a"], loaded.now_ms).status.tolist() == ["schema_drift"]


def test_rows_of_another_width_are_drift(loaded):
    """Never cut, never filled."""
    server = loaded.model.server
    narrow = PackedReader(
        loaded.store,
        packed_view=server.packed_view,
        join_key="offer_id",
        join_key_type="text",
        schema_hash=server.features.schema_hash,
        max_age_s=1e9,
        width=1,
    )
    assert narrow.read(["a"], loaded.now_ms).status.tolist() == ["schema_drift"]


def test_keys_are_read_as_their_type(two_views):
    """Integer keys come as text over the wire; what is no 64-bit integer is unknown, like any absent key."""
    apply(two_views.model, two_views.store)
    materialize(two_views.model, two_views.store, two_views.now)
    rows = reader(two_views.model, two_views.store).read(["1", "one", "", str(2**70), "2"], two_views.now_ms)
    assert rows.status.tolist() == ["ok", "unknown_entity", "unknown_entity", "unknown_entity", "ok"]


def test_reading_nothing_is_nothing(loaded):
    """An empty batch has the same width."""
    rows = reader(loaded.model, loaded.store).read([], loaded.now_ms)
    assert (rows.slots.shape, rows.age_ms.shape, rows.status.shape) == ((0, 2), (0,), (0,))


def test_a_view_that_was_not_applied_is_named(one_view):
    """When the reader is built, not at the first request; with the commands."""
    with pytest.raises(ConfigError, match="packed view 'offers_v1__packed' is not in the feature store; run `hybrid"):
        reader(one_view.model, one_view.store)


def test_a_reader_works_on_another_thread_than_it_was_built_on(loaded):
    """The worker builds its readers first and reads on its own thread."""
    built, read = reader(loaded.model, loaded.store), []
    thread = threading.Thread(target=lambda: read.append(built.read(["a"], loaded.now_ms).status[0]))
    thread.start()
    thread.join()
    assert read == ["ok"]


def test_reads_go_on_while_a_materialisation_writes(loaded):
    """Another connection holds the write lock, as Feast does for a batch; the reader sees what was there before."""
    read = reader(loaded.model, loaded.store).read
    with closing(sqlite3.connect(loaded.store / "online.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute('DELETE FROM "hybrid_offers_v1__packed"')
        assert read(["a"], loaded.now_ms).status.tolist() == ["ok"]
        writer.execute("ROLLBACK")


def test_the_direct_read_gives_what_the_public_one_gives(loaded):
    """The contract that lets us use `online_read`: the same values as `get_online_features`, unknown keys too."""
    entities = ["a", "b", "zz"]
    features = ["offers_v1__packed:slots", "offers_v1__packed:schema_hash", "offers_v1__packed:oldest_ms"]
    public = open_store(loaded.store).get_online_features(features, {"offer_id": entities}).to_dict()
    rows = reader(loaded.model, loaded.store).read(entities, loaded.now_ms)
    np.testing.assert_array_equal(rows.slots[:2], np.array(public["slots"][:2], dtype=np.float32))
    assert [loaded.now_ms - oldest for oldest in public["oldest_ms"][:2]] == rows.age_ms[:2].tolist()
    assert public["slots"][2] is None
    assert rows.status[2] == "unknown_entity"


def test_every_online_store_gives_what_the_statement_for_sqlite_gives(loaded, monkeypatch):
    """Through the interface that Redis has too: the same rows of entities known, repeated, unknown and stale."""
    entities = ["b", "zz", "c", "a", "b", "d", ""]
    direct = reader(loaded.model, loaded.store).read(entities, loaded.now_ms)
    monkeypatch.setattr(online, "_from_sqlite", online._from_any_store)
    general = reader(loaded.model, loaded.store).read(entities, loaded.now_ms)
    np.testing.assert_array_equal(general.slots, direct.slots)
    assert general.age_ms.tolist() == direct.age_ms.tolist()
    assert general.status.tolist() == direct.status.tolist()


def test_a_row_without_one_of_its_fields_is_drift_and_has_no_age(loaded):
    """A store that was written half: the entity is known, and nothing of it is served."""
    with closing(sqlite3.connect(loaded.store / "online.db")) as connection, connection:
        connection.execute("DELETE FROM \"hybrid_offers_v1__packed\" WHERE feature_name = 'oldest_ms'")
    rows = reader(loaded.model, loaded.store).read(["a", "zz"], loaded.now_ms)
    assert rows.status.tolist() == ["schema_drift", "unknown_entity"]
    assert rows.age_ms.tolist() == [-1, -1]


def test_one_integer_has_many_texts(two_views):
    """ "1", "01" and "+1" are one entity, each answered in its place."""
    apply(two_views.model, two_views.store)
    materialize(two_views.model, two_views.store, two_views.now)
    rows = reader(two_views.model, two_views.store).read(["01", "1", "+1"], two_views.now_ms)
    assert rows.status.tolist() == ["ok"] * 3


@given(st.text(st.characters(codec="utf-8")))
def test_text_keys_are_encoded_as_feast_encodes_them(entity):
    """Of any length, in any script."""
    feasts = serialize_entity_key(online._key("shop_id", entity, integer=False), 3)
    assert key_encoder("shop_id", 3, integer=False)(entity) == feasts


@given(st.integers(-(2**63), 2**63 - 1))
def test_integer_keys_are_encoded_as_feast_encodes_them(number):
    """All that 64 bits hold."""
    feasts = serialize_entity_key(online._key("shop_id", str(number), integer=True), 3)
    assert key_encoder("shop_id", 3, integer=True)(str(number)) == feasts
