"""What one person contributes to a question."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hybrid.errors import BadRequest, ConfigError
from hybrid.query import (
    By,
    Categories,
    Histogram,
    Labels,
    Moments,
    Query,
    Scores,
    contributions,
    squares,
)

AGE = Moments(column="age", low=0, high=10)


def _vectors(query, columns, offsets, payload=None):
    return np.concatenate(list(contributions(query, columns, np.array(offsets), payload)))


def test_moments_of_a_person():
    """2 and 5 of [0, 10] are x = 0.2 and 0.5: sum 0.7, squares 0.29; 40 counts as 10; None as nothing."""
    query = Query(parts=(AGE,), rows=3)
    found = _vectors(query, {"age": [2, 5, 40, None]}, [0, 2, 3, 4])
    np.testing.assert_allclose(found, [[2, 0.7, 0.29], [1, 1, 1], [0, 0, 0]], atol=1e-6)


def test_moments_of_logarithms():
    """With bounds 0 and e^2 - 1, the value e - 1 has the logarithm 1: x = 1/2."""
    part = Moments(column="age", low=0, high=math.e**2 - 1, scale="log1p")
    np.testing.assert_allclose(_vectors(Query(parts=(part,)), {"age": [math.e - 1]}, [0, 1]), [[1, 0.5, 0.25]])


def test_histogram_of_a_person():
    """Edges 1 and 5: 0.5 is below, 1 between, 5 and infinity from the last on, None missing."""
    query = Query(parts=(Histogram(column="x", edges=(1, 5)),), rows=9)
    found = _vectors(query, {"x": [0.5, 1, 5, np.inf, None]}, [0, 5])
    assert found.tolist() == [[1, 1, 2, 1]]


def test_categories_of_a_person():
    """Texts are compared after NFC; others and missing have cells of their own."""
    query = Query(parts=(Categories(column="town", values=("Köln", "Ulm")),), rows=9)
    found = _vectors(query, {"town": ["Ko\u0308ln", "Bonn", None, "Ulm", "Ulm"]}, [0, 5])
    assert found.tolist() == [[1, 2, 1, 1]]


@pytest.mark.parametrize(("take", "expected"), [("last", [1, 1]), ("first", [2, 0])])
def test_of_more_rows_than_are_taken_the_last_or_first_count(take, expected):
    """Labels 0, 0, 1 and two rows taken."""
    assert _vectors(Query(parts=(Labels(),), rows=2, take=take), {"label": [0, 0, 1]}, [0, 3]).tolist() == [expected]


def test_rows_without_a_label_are_not_among_those_taken():
    """Of labels 1, unknown, unknown, the last known one counts where one row is taken."""
    assert _vectors(Query(parts=(Labels(),)), {"label": [1, np.nan, 7]}, [0, 3]).tolist() == [[0, 1]]


def test_groups_are_one_vector_after_another():
    """Two people in groups b and a; a row of no group counts nowhere."""
    query = Query(parts=(Labels(),), rows=3, by=By(column="hour", values=("a", "b")))
    columns = {"label": [1, 0, 0], "hour": ["b", "a", "z"]}
    assert _vectors(query, columns, [0, 1, 3]).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]


def test_a_score_is_shared_between_the_nodes_beside_it():
    """0.2 of nodes 0, 0.4 and 1 is half at each of the first two; 0.7 half at each of the last two."""
    query = Query(parts=(Scores(nodes=(0.0, 0.4, 1.0)),), rows=2)
    found = _vectors(query, {"score": [0.2, 0.7], "label": [0, 1]}, [0, 2])
    np.testing.assert_allclose(found, [[0.5, 0.5, 0, 0, 0.5, 0.5]], atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_the_mean_score_survives_the_sharing(scores):
    """Sums over nodes of what is linear between them are exact: node x count adds up to the sum of scores."""
    nodes = np.linspace(0, 1, 7)
    query = Query(parts=(Scores(nodes=tuple(nodes.tolist())),), rows=len(scores))
    found = _vectors(query, {"score": scores, "label": [1] * len(scores)}, [0, len(scores)])[0]
    assert found[7:] @ nodes == pytest.approx(sum(scores), abs=1e-5)


@pytest.mark.parametrize(
    "part", [Histogram(column="x", edges=(1, 2, 3), cumulative=True), Scores(nodes=(0, 0.3, 1), cumulative=True)]
)
def test_what_travels_encoded_is_decoded(part):
    """The square root of the running sum, twice, is the running sum; and decoding undoes encoding."""
    rng = np.random.default_rng(0)
    counts = rng.random((5, part.size))
    query = Query(parts=(part,))
    np.testing.assert_allclose(query.decode(query.encode(counts)), counts, atol=1e-12)
    run = part.ordered[0]
    twice = query.encode(query.encode(counts))[:, :run]
    np.testing.assert_allclose(twice, np.cumsum(counts[:, :run], axis=1), atol=1e-12)


def test_gradients_are_carried_through_the_encoding():
    """g x decode(t) = decode_transposed(g) x t, for every g and t."""
    query = Query(
        parts=(AGE, Histogram(column="x", edges=(1, 2, 3), cumulative=True)), by=By(column="h", values=("a", "b"))
    )
    rng = np.random.default_rng(1)
    g, t = rng.random((2, 1, query.counts))
    assert query.decode_transposed(g) @ t.T == pytest.approx(g @ query.decode(t).T)


def test_sums_of_neighbouring_cells_have_little_noise():
    """Over 512 cells the running sum's noise is below 1 + ln(512) / pi = 2.99 of a row's, plainly its root is 22.6."""
    part = Histogram(column="x", edges=tuple(range(511)), cumulative=True)
    query = Query(parts=(part,))
    half = np.concatenate([np.ones(256), np.zeros(257)])[None]
    assert part.row_norm * np.linalg.norm(query.decode_transposed(half)) < 1 + math.log(512) / math.pi


PARTS = (
    AGE,
    Moments(column="age", low=-5, high=1e6, scale="log1p"),
    Histogram(column="age", edges=(0.0, 3.0, 7.0)),
    Histogram(column="age", edges=(0.0, 3.0, 7.0), cumulative=True),
    Categories(column="town", values=("a", "b")),
    Labels(),
    Scores(nodes=(0.0, 0.25, 1.0)),
    Scores(nodes=(0.0, 0.25, 1.0), cumulative=True),
)
NUMBERS = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.integers(-(10**30), 10**30))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(NUMBERS, st.one_of(st.none(), st.text(max_size=3)), st.sampled_from([0, 1, math.nan, 7]), NUMBERS),
        max_size=12,
    ),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_no_person_s_vector_is_longer_than_the_bound(rows, parts, most):
    """Whatever the values and however many rows: finite, and of at most the worst case's L2 norm."""
    age, town, label, score = ([row[place] for row in rows] for place in range(4))
    town = ["".join(c for c in text if not 0xD800 <= ord(c) < 0xE000) if text else text for text in town]
    columns = {"age": _numbers(age), "town": town, "label": label, "score": _numbers(score)}
    query = Query(parts=tuple(parts), rows=most)
    found = _vectors(query, columns, [0, len(rows)])
    assert np.isfinite(found).all()
    assert np.linalg.norm(found) <= query.bound * (1 + 1e-12)


def _numbers(values):
    return np.array([math.nan if value is None else float(value) for value in values])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 3))
def test_a_person_alone_contributes_as_among_others(counts, rows):
    """A device computes for one person what a simulation computes for all."""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    rng = np.random.default_rng(len(counts))
    columns = {"age": rng.random(offsets[-1]) * 12, "label": rng.integers(0, 2, offsets[-1])}
    query = Query(parts=(AGE, Labels(), Histogram(column="age", edges=(2, 8), cumulative=True)), rows=rows)
    together = _vectors(query, columns, offsets)
    for person, (begin, end) in enumerate(pairwise(offsets)):
        own = {name: column[begin:end] for name, column in columns.items()}
        np.testing.assert_allclose(_vectors(query, own, [0, end - begin]), together[person : person + 1], atol=1e-12)


def test_squares_of_influences():
    """Counts (3, 1), gradient (2, -1), centre 1: influence 6 - 1 - 1 = 4; of the cap 8 a half, squared a quarter."""
    query = Query(parts=(Labels(),), rows=4, spread=(8.0,))
    payload = np.array([2.0, -1.0, 1.0], np.float32)
    np.testing.assert_allclose(squares(query, np.array([[3.0, 1.0]]), payload), [[0.25]])
    assert _vectors(query, {"label": [0, 0, 0, 1]}, [0, 4], payload).tolist() == [[0.25]]


def test_a_square_is_at_most_its_cap():
    """Whatever the gradient, infinite too, each is in [0, 1], and a person's norm at most the root of how many."""
    query = Query(parts=(Labels(),), rows=4, spread=(1e-9, 1.0))
    payload = np.array([1e30, np.inf, 0.0, np.nan, 1.0, 0.0], np.float32)
    found = _vectors(query, {"label": [0, 1]}, [0, 2], payload)
    assert ((found >= 0) & (found <= 1)).all()
    assert np.linalg.norm(found) <= query.norm == math.sqrt(2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Moments(column="x", low=1, high=1),
        lambda: Histogram(column="x", edges=(1, 1)),
        lambda: Histogram(column="x", edges=()),
        lambda: Scores(nodes=(0.5,)),
        lambda: Scores(nodes=(0.5, 1.5)),
        lambda: Categories(column="x", values=("a", "a")),
        lambda: Query(parts=()),
        lambda: Query(parts=(Labels(),), rows=0),
        lambda: Query(parts=(Labels(),), clip=0),
        lambda: Query(
            parts=(Histogram(column="x", edges=tuple(range(4000))),),
            by=By(column="h", values=tuple(map(str, range(1000)))),
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(wrong):
    """Empty, unordered, out of range, or of more than 2^20 cells."""
    with pytest.raises(ValidationError):
        wrong()


def test_columns_are_checked():
    """One that is not there, and one of another type."""
    with pytest.raises(ConfigError, match="age"):
        _vectors(Query(parts=(AGE,)), {}, [0, 1])
    with pytest.raises(BadRequest):
        _vectors(Query(parts=(AGE,)), {"age": ["x"]}, [0, 1])
    with pytest.raises(ConfigError, match="payload"):
        _vectors(Query(parts=(Labels(),), spread=(1.0,)), {"label": [0]}, [0, 1], np.zeros(2))


PHASES = Histogram(column="left", edges=(0.5, 1.5), cumulative=True)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"parts": (PHASES, AGE)}, r"read version, left, stopped alone, got \['age'\]"),
        ({"parts": (PHASES, Labels())}, r"got \['label'\]"),
        ({"by": By(column="city", values=("Bonn",))}, r"got \['city'\]"),
        ({"rows": 2}, "rows=1 and no spread"),
        ({"spread": (1.0,)}, "rows=1 and no spread"),
        ({"week": "2026-W54"}, "week"),
        ({"week": "W47"}, "week"),
    ],
    ids=str,
)
def test_a_query_about_journals_reads_nothing_of_a_person(fields, why):
    """Neither beside them nor as groups; of other queries a column may be called as it likes."""
    good = {"parts": (PHASES,), "by": By(column="version", values=("4",)), "week": "2026-W53"}
    assert Query(**good).norm == pytest.approx(math.sqrt(1 + 1 / 4 + 9 / 64))
    assert Query(parts=(PHASES, AGE)).week is None
    with pytest.raises(ValidationError, match=why):
        Query(**good | fields)
