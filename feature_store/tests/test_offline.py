"""The historical join: as of each time, every row kept, and nothing invented."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

from feature_store.materialize import apply
from feature_store.offline import join
from hybrid.errors import ConfigError, NotFound

DAY = np.timedelta64(1, "D")
NOW = np.datetime64("2026-03-10T12:00", "ns")


@pytest.fixture
def applied(one_view):
    """`one_view`, applied; nothing is materialised, for training reads the sources."""
    apply(one_view.model, one_view.store)
    return one_view


def test_each_row_sees_what_was_known_at_its_time(applied):
    """a's rows: Coffee, 0.25 two days ago; Bar, 0.75 an hour ago. A row at its very time is known."""
    times = np.array([NOW - DAY, NOW, NOW - 2 * DAY])
    slots = join(applied.model, np.array(["a", "a", "a"]), times, applied.store)
    assert slots.tolist() == [[1, -1], [0, 1], [1, -1]]
    assert slots.dtype == np.float32


def test_duplicate_rows_survive(applied):
    """Feast's dask store gives one row for equal (entity, time); examples of one offer at one time are many."""
    entities = np.array(["b", "a", "a", "b", "a"])
    slots = join(applied.model, entities, np.full(5, NOW), applied.store)
    nothing = [3, np.nan]
    np.testing.assert_array_equal(slots, np.array([nothing, [0, 1], [0, 1], nothing, [0, 1]], dtype=np.float32))


def test_without_times_every_row_is_of_now(applied):
    """What a population without a time column gets."""
    slots = join(applied.model, np.array(["a", "a"]), None, applied.store, now=applied.now)
    assert slots.tolist() == [[0, 1], [0, 1]]


def test_absent_rows_are_an_error_with_their_count(applied):
    """zz is unknown, c is too old, d is of tomorrow, a was not there three days ago: 4 keys in 5 rows."""
    entities = np.array(["a", "zz", "zz", "c", "d", "a"])
    times = np.array([NOW, NOW, NOW, NOW, NOW, NOW - 3 * DAY])
    with pytest.raises(
        NotFound, match=r"^5 of 6 rows have no features of their offer at their time .*; 4 distinct keys$"
    ) as caught:
        join(applied.model, entities, times, applied.store)
    assert "zz" not in str(caught.value)


def test_a_missing_value_is_not_an_absent_row(applied):
    """b's features are missing, b is not."""
    slots = join(applied.model, np.array(["b"]), np.array([NOW]), applied.store)
    np.testing.assert_array_equal(slots, np.array([[3, np.nan]], dtype=np.float32))


def test_every_view_is_joined_at_its_own_time(two_views):
    """Two days ago shop 2's stock was known and its visits were not yet; shop 1's newest visits are 3 days old."""
    apply(two_views.model, two_views.store)
    slots = join(two_views.model, np.array([1, 2, 1]), np.array([NOW, NOW, NOW]), two_views.store)
    one, two = [1, 1, np.log(31) / 2], [0, 2, np.log(301) / 2]
    np.testing.assert_allclose(slots, [one, two, one], rtol=1e-6)
    with pytest.raises(NotFound, match=r"^1 of 1 rows have no features of their shop"):
        join(two_views.model, np.array([2]), np.array([NOW - 2 * DAY]), two_views.store)


def test_the_window_of_the_join_is_the_window_of_serving(applied):
    """A row exactly as old as `max_feature_age` is joined, as it is served; a second more and it is absent."""
    hour = applied.with_model(max_feature_age=timedelta(hours=1))
    apply(hour.model, hour.store)
    assert join(hour.model, np.array(["a"]), np.array([NOW]), hour.store).tolist() == [[0, 1]]
    with pytest.raises(NotFound):
        join(hour.model, np.array(["a"]), np.array([NOW + np.timedelta64(1, "s")]), hour.store)


def test_wrong_keys_and_times_are_refused(applied, two_views):
    """Before Feast guesses: numbers are no times, words are no integers, lengths must fit."""
    with pytest.raises(ConfigError, match="timestamps must be 1 of datetime64 in UTC, got 1 of int64"):
        join(applied.model, np.array(["a"]), np.array([1_700_000_000]), applied.store)
    with pytest.raises(ConfigError, match="timestamps must be 2 of datetime64 in UTC, got 1 of"):
        join(applied.model, np.array(["a", "a"]), np.array([NOW]), applied.store)
    with pytest.raises(ConfigError, match="shop_id must be integers"):
        join(two_views.model, np.array(["one"]), None, two_views.store)


def test_a_model_that_was_not_applied_is_named(one_view):
    """With the command that applies it."""
    message = "feature service 'offers_v1' is not in the feature store as declared; run `hybrid features apply coupon`"
    with pytest.raises(ConfigError, match=message):
        join(one_view.model, np.array(["a"]), None, one_view.store)


def test_a_model_that_changed_since_it_was_applied_is_named(applied):
    """A feature more than Feast has: applied again, it is there."""
    view = applied.model.server.views[0]
    fewer = applied.with_model(views=(view.model_copy(update={"features": {"rate": view.features["rate"]}}),))
    with pytest.raises(ConfigError, match="not in the feature store as declared"):
        join(fewer.model, np.array(["a"]), np.array([NOW]), fewer.store)
    apply(fewer.model, fewer.store)
    assert join(fewer.model, np.array(["a"]), np.array([NOW]), fewer.store).tolist() == [[1]]
