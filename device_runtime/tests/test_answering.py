import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_runtime.answering import Answerer, Readable
from hybrid import Categorical, Clear, Numeric
from hybrid.bundle import Bundle, Keeping, Manifest, Parameter, TrainProgram
from hybrid.features import Features
from hybrid.plan import QueryPlan
from hybrid.query import By, Categories, Histogram, Labels, Moments, Query, Scores, contributions

MANIFEST = Manifest(
    model="meals",
    version=7,
    definition_hash="ab" * 32,
    features=Features.of({"steps": Numeric(), "mood": Categorical(vocabulary=("glad", "sad"))}),
    request={"time": "text", "distance": "number"},
    server_embedding=2,
    device_embedding=4,
    merge="server",
    release=Clear(reason="a test of answering"),
    programs={},
    keeping=Keeping(max_seconds=30),
)
STEPS = Moments(column="steps", low=0, high=10)
SCORES = Scores(nodes=(0.0, 0.5, 1.0))


def plan(*parts, **fields):
    about = {"model": "meals", "version": 7, "definition_hash": "ab" * 32, "expires_ms": 1}
    return QueryPlan(id="1" * 32, **about, query=Query(parts=parts, **{"rows": 8} | fields))


@dataclass
class Rows:
    """Of one device."""

    columns: dict
    server: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    predicted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def features(self):
        return {name: self.columns[name] for name in ("steps", "mood")}


def rows(steps=(), label=None, **columns):
    n = len(steps)
    about = {"steps": steps, "mood": ["glad"] * n, "time": ["7AM"] * n, "distance": [1.5] * n}
    return Rows(about | {"label": [None] * n if label is None else label} | columns)


class Predicts:
    """Half of the first input, as a bundle's program would: one row at a time."""

    def __init__(self):
        self.asked = 0

    def predict(self, inputs, server):
        self.asked += 1
        assert (inputs.shape, server.shape) == ((1, 2), (1, 2))
        return float(inputs[0, 0]) / 2


def answerer(manifest=MANIFEST, program=None, **options):
    made = Answerer(Bundle(manifest, {}), **options)
    vars(made)["_program"] = program or Predicts()
    return made


def answered(asked, found, payload=None, go_on=lambda: True):
    return answerer().answer(asked, np.zeros(0, np.float32) if payload is None else payload, found, go_on)


def test_a_device_counts_its_rows_as_a_simulation_does():
    """Steps 2 and 5 of [0, 10]: count 2, sum 0.7, squares 0.29; moods and the group by the request's hour."""
    parts = (STEPS, Categories(column="mood", values=("glad",)))
    sent = answered(plan(*parts, by=By(column="time", values=("2PM", "7AM"))), rows([2.0, 5.0]))
    assert sent.dtype == np.float32
    np.testing.assert_allclose(sent, [0] * 6 + [2, 0.7, 0.29, 2, 0, 0], rtol=1e-6)


def test_a_device_without_rows_sends_zeros():
    """So that it answers says nothing of what it has; the same where all of them lack a label."""
    assert answered(plan(STEPS, SCORES), rows()).tolist() == [0] * 9
    empty = rows([1.0])
    empty.server = np.zeros((1, 2), np.float32)
    assert answered(plan(Labels()), empty).tolist() == [0, 0]


def test_scores_are_of_rows_that_this_version_s_server_side_contributed_to():
    """Scores 0.25 and 0.5 of labels 0 and 1; the third row has no embedding, and is not predicted."""
    program, found = Predicts(), rows([0.5, 1.0, 1.5], label=[0, 1, 1])
    found.server = np.array([[1, 1], [1, 1], [math.nan, math.nan]], np.float32)
    sent = answerer(program=program).answer(plan(SCORES), np.zeros(0, np.float32), found, lambda: True)
    assert sent.tolist() == [0.5, 0.5, 0, 0, 1, 0]
    assert program.asked == 2
    answered(plan(STEPS), found)
    assert program.asked == 2  # who asks no scores has none predicted


def test_where_devices_train_the_server_tower_scores_are_what_was_predicted():
    """They hold slots, which no program on the device embeds."""
    parameters = (Parameter(name="server_tower.weight", shape=(2, 3)),)
    train = TrainProgram(rows=4, server=3, missing=False, parameters=parameters)
    found = rows([1.0, 1.0], label=[1, 0])
    found.predicted = np.array([0.75, math.nan], np.float32)
    made = answerer(MANIFEST.model_copy(update={"train": train}))
    assert made.answer(plan(SCORES), np.zeros(0, np.float32), found, lambda: True).tolist() == [0, 0, 0, 0, 0.5, 0.5]


def test_squares_of_influences_are_sent_for_a_query_with_spread():
    """One positive, gradient (0, 3) and centre 1, cap 4: ((3 - 1) / 4)^2 = 1/4."""
    asked, payload = plan(Labels(), spread=(4.0,)), np.array([0, 3, 1], np.float32)
    assert answered(asked, rows([1.0], label=[1]), payload).tolist() == [0.25]


ANY = st.one_of(st.none(), st.floats(), st.floats(width=32))
PARTS = (
    STEPS,
    Histogram(column="distance", edges=(0.0, 3.0), cumulative=True),
    Categories(column="mood", values=("a",)),
    SCORES,
    Labels(),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(ANY, ANY, st.none() | st.sampled_from("ab"), st.sampled_from([0, 1, None]), ANY), max_size=10),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    st.integers(1, 4),
    st.none() | st.floats(1e-3, 10),
)
def test_no_device_sends_more_than_the_norm(found, parts, most, clip):
    """Whatever it holds and however much of it, also once rounded to float32."""
    steps, distance, mood, label, server = ([row[place] for row in found] for place in range(5))
    held = rows(steps, label, distance=distance, mood=mood)
    held.server = np.array([[math.nan if each is None else each] * 2 for each in server], np.float64)
    held.server = np.clip(held.server, -3e38, 3e38).astype(np.float32).reshape(-1, 2)
    program = Predicts()
    program.predict = lambda inputs, server: min(abs(float(server[0, 0])), 1.0)
    asked = plan(*parts, rows=most, clip=clip)
    sent = answerer(program=program).answer(asked, np.zeros(0, np.float32), held, lambda: True)
    assert np.isfinite(sent).all()
    assert np.linalg.norm(sent.astype(np.float64)) <= asked.clip * (1 + 1e-15)


def test_what_is_sent_is_what_a_simulation_clips_to():
    """In float32: within one part in 2^23 of each number, and exact where it is an integer."""
    asked = plan(STEPS, Histogram(column="steps", edges=(1.0, 5.0)), clip=1.5)
    held = rows(np.random.default_rng(0).uniform(0, 10, 6).tolist())
    (exact,) = contributions(asked.query, {"steps": held.columns["steps"]}, np.array([0, 6]))
    exact *= 1.5 / np.linalg.norm(exact)
    np.testing.assert_allclose(answered(asked, held), exact[0], rtol=2**-23)
    assert answered(plan(Labels()), rows([1.0] * 3, label=[0, 1, 1])).tolist() == [1, 2]


def test_a_device_that_is_told_to_stop_or_takes_too_long_sends_nothing():
    """Before the second prediction; after the bundle's 30 s, though the plan allows 60. The reason names no value."""
    found = rows([0.5, 1.0], label=[0, 1])
    found.server = np.ones((2, 2), np.float32)
    told, seconds = iter([True, False]), iter([0.0, 1.0, 31.0])
    stopped, late = answerer(), answerer(clock=lambda: next(seconds))
    assert stopped.answer(plan(SCORES), np.zeros(0, np.float32), found, lambda: next(told)) is None
    assert late.answer(plan(SCORES), np.zeros(0, np.float32), found, lambda: True) is None
    assert (stopped.gave_up, late.gave_up) == ("it was told to stop", "it took more than 30 s")


def test_values_of_another_type_give_nothing_and_are_not_quoted():
    made = answerer()
    assert made.answer(plan(STEPS), np.zeros(0, np.float32), rows(["Sentinel"]), lambda: True) is None
    assert made.gave_up == "the store holds other values than the bundle declares"


@pytest.mark.parametrize(
    ("parts", "by", "lacking"),
    [
        ((STEPS, Labels(), SCORES, Histogram(column="score", edges=(0.5,))), "time", []),
        ((Moments(column="distance", low=0, high=1),), None, []),
        ((Moments(column="weight", low=0, high=1),), None, ["weight"]),
        ((Moments(column="mood", low=0, high=1),), None, ["mood"]),
        ((Categories(column="steps", values=("a",)),), None, ["steps"]),
        ((STEPS, Categories(column="steps", values=("a",))), None, ["steps"]),
        ((Labels(),), "distance", ["distance"]),
        ((Labels(),), "entity", ["entity"]),
        ((Categories(column="label", values=("1",)),), None, ["label"]),
    ],
    ids=str,
)
def test_a_query_may_read_what_the_bundle_declares_as_it_declares_it(parts, by, lacking):
    """Device and request features, labels and scores; numbers as numbers, text as text."""
    query = Query(parts=parts, by=by and By(column=by, values=("7AM",)))
    assert Readable(MANIFEST).lacks(query) == lacking
