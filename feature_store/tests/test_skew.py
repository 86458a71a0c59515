from datetime import UTC, datetime, timedelta

import numpy as np

from feature_store.materialize import apply
from feature_store.skew import Served, compare

NOW, DAY = datetime(2026, 3, 10, 12, tzinfo=UTC), timedelta(days=1)  # as in the fixtures
MS = 1_000
NAN = np.nan


def at(moment):
    return int(moment.timestamp() * MS)


def served(*rows):
    """(entity, slots, features' time, serving time) of each row."""
    entity, slots, feature, merged = zip(*rows, strict=True)
    return Served(
        np.array(entity, dtype=object),
        np.array(slots, np.float32),
        np.array([at(moment) for moment in feature]),
        np.array([at(moment) for moment in merged]),
    )


def test_rows_are_the_same_late_skewed_or_absent(one_view):
    """Of offer a: Bar at 0.75 since an hour, Coffee at 0.25 for two days before; e is in no source."""
    apply(one_view.model, one_view.store)
    hour = NOW - DAY / 24
    new, old = (0.0, 1.0), (1.0, -1.0)
    found = compare(
        one_view.model,
        served(
            ("a", new, hour, NOW),
            ("b", (3.0, NAN), hour, NOW),
            ("a", old, NOW - 2 * DAY, NOW - DAY),
            ("a", old, NOW - 2 * DAY, NOW),
            ("a", (0.0, 1.5), hour, NOW),
            ("a", (0.0, 0.5), NOW - 2 * DAY, NOW),
            ("e", new, hour, NOW),
        ),
        one_view.store,
        tolerance=1e-6,
    )
    assert found.status.tolist() == ["same", "same", "same", "late", "skewed", "skewed", "absent"]
    expected = [new, (3.0, NAN), old, old, new, old, (NAN, NAN)]
    np.testing.assert_array_equal(found.offline, np.array(expected, np.float32))


def test_a_difference_within_the_tolerance_is_none(one_view):
    """0.75 is slot 1; 1.25 is within 0.3 of it, 1.5 is not; a missing value is near to nothing."""
    apply(one_view.model, one_view.store)
    hour = NOW - DAY / 24
    rows = served(*(("a", (0.0, rate), hour, NOW) for rate in (1.25, 1.5, NAN)))
    assert compare(one_view.model, rows, one_view.store, 0.3).status.tolist() == ["same", "skewed", "skewed"]


def test_each_view_has_a_time_of_its_own(two_views):
    """Shop 1 has visits of 5 and of 3 days ago and a stock of yesterday; its row is as old as the visits.

    Slots: open, items (9 is past the edge: 1), log1p(time) / 2. The older visits never stood beside
    that stock, other visits never were, and two days ago there was no stock.
    """
    apply(two_views.model, two_views.store)
    visits = {days: np.log1p(time) / 2 for days, time in ((5, 3.0), (3, 30.0), (9, 300.0))}
    rows = served(
        ("1", (1, 1, visits[3]), NOW - 3 * DAY, NOW),
        ("1", (1, 1, visits[5]), NOW - 5 * DAY, NOW),
        ("1", (1, 1, visits[9]), NOW - 3 * DAY, NOW),
        ("1", (1, 1, visits[3]), NOW - 3 * DAY, NOW - 2 * DAY),
    )
    found = compare(two_views.model, rows, two_views.store, 1e-6)
    assert found.status.tolist() == ["same", "skewed", "skewed", "absent"]
