"""Transforms against values worked out by hand, and one hash against its published vectors."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hybrid.errors import BadRequest, ConfigError
from hybrid.features import UNUSED, Bucketize, Categorical, Features, Hash, Log1p, Numeric, murmur3_32

NAN, INF = float("nan"), float("inf")
COMPOSED, DECOMPOSED = "Caf\u00e9", "Cafe\u0301"  # the same word in NFC and in NFD


def slots(transform, raw):
    return transform.slots(transform.inputs(raw)).tolist()


def encoded(transform, raw):
    return transform.encode(transform.slots(transform.inputs(raw))).tolist()


def test_numeric_is_normalised_and_clipped():
    """(80 - 60) / 20 = 1; (1000 - 60) / 20 = 47 is clipped to 10, and so below."""
    assert slots(Numeric(mean=60, std=20), [80, 60, 1000, -1000]) == [1.0, 0.0, 10.0, -10.0]


@pytest.mark.parametrize("missing", [None, NAN, INF, -INF, 1e300])
def test_a_missing_or_infinite_number_is_the_mean_with_a_flag(missing):
    """Encoded as 0 and 1; 1e300 is infinite in float32, the precision of every side."""
    assert encoded(Numeric(mean=60, std=20), [missing]) == [[0.0, 1.0]]


def test_a_present_number_has_no_flag():
    """The largest float32 is a number, though far: clipped, and present."""
    assert encoded(Numeric(), [3e38, 1e-45]) == [[10.0, 0.0], [pytest.approx(1e-45, abs=1e-45), 0.0]]


def test_log1p_is_of_what_is_positive():
    """log(1 + e - 1) = 1, (1 - 0.5) / 0.5 = 1; a negative number counts as 0: (0 - 0.5) / 0.5 = -1."""
    assert slots(Log1p(mean=0.5, std=0.5), [np.e - 1, -7, 0]) == pytest.approx([1.0, -1.0, -1.0], abs=1e-6)


def test_bucketize_edges_belong_to_the_bucket_above():
    """Edges 1, 24: below 1 is bucket 0, 1 is 1, 24 is 2; missing is one past the last."""
    assert slots(Bucketize(edges=(1, 24)), [0.99, 1, 23.9, 24, INF, -INF, NAN, None]) == [0, 1, 1, 2, 2, 0, 3, 3]


def test_bucketize_compares_in_float32():
    """0.1 as a double is below float32's 0.1; both sides round first, so it reaches the edge."""
    assert slots(Bucketize(edges=(0.1,)), np.array([0.1])) == [1.0]


def test_edges_must_ascend_as_float32():
    """1 and 1 + 1e-9 are one number in float32, so no value could fall between them."""
    with pytest.raises(ValidationError, match="edges must ascend as float32"):
        Bucketize(edges=(1.0, 1.0 + 1e-9))
    with pytest.raises(ValidationError, match="edges must ascend as float32"):
        Bucketize(edges=(2.0, 1.0))


@pytest.mark.parametrize(
    ("transform", "constants"),
    [
        (Numeric, {"std": 1e-50}),
        (Numeric, {"mean": 1e39}),
        (Log1p, {"clip": 1e39}),
        (Bucketize, {"edges": (0.0, 1e39)}),
    ],
)
def test_constants_must_be_held_by_float32(transform, constants):
    """A std of 1e-50 would be 0 there, and every value missing."""
    with pytest.raises(ValidationError, match="must be a number that float32 holds"):
        transform(**constants)


def test_categorical_is_the_place_in_the_vocabulary():
    """Unseen text is one past it, missing text two past it: never the same."""
    transform = Categorical(vocabulary=("Bar", COMPOSED))
    assert slots(transform, ["Bar", COMPOSED, "Pub", None, NAN, ""]) == [0, 1, 2, 3, 3, 2]


def test_text_is_compared_after_nfc():
    """A word typed on another keyboard is the same word, in the vocabulary and in the value, as text and as bytes."""
    for vocabulary in (COMPOSED, DECOMPOSED):
        transform = Categorical(vocabulary=("Bar", vocabulary))
        assert slots(transform, [COMPOSED, DECOMPOSED, DECOMPOSED.encode()]) == [1, 1, 1]
    assert slots(Hash(buckets=1 << 20), [COMPOSED]) == slots(Hash(buckets=1 << 20), [DECOMPOSED])


def test_a_vocabulary_has_each_text_once():
    """In NFC, so the two forms of one word are a repeat."""
    with pytest.raises(ValidationError):
        Categorical(vocabulary=(COMPOSED, DECOMPOSED))


def test_hash_is_murmur_modulo_buckets():
    """murmur3_32("hello") = 0x248bfa47 = 613153351, which leaves 51 over 100; missing is bucket 100."""
    assert slots(Hash(buckets=100), ["hello", None]) == [51, 100]


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [
        (b"", 0, 0),
        (b"", 1, 0x514E28B7),
        (b"", 0xFFFFFFFF, 0x81F16F39),
        (b"\xff\xff\xff\xff", 0, 0x76293B50),
        (b"\x21\x43\x65\x87", 0, 0xF55B516B),
        (b"\x21\x43\x65\x87", 0x5082EDEE, 0x2362F9DE),
        (b"\x21\x43\x65", 0, 0x7E4A8634),
        (b"\x21\x43", 0, 0xA0F7B07A),
        (b"\x21", 0, 0x72661CF4),
        (b"\x00\x00\x00\x00", 0, 0x2362F9DE),
        (b"\x00\x00\x00", 0, 0x85F0B427),
        (b"\x00\x00", 0, 0x30F4C306),
        (b"\x00", 0, 0x514E28B7),
        (b"aaaa", 0x9747B28C, 0x5A97808A),
        (b"abcd", 0x9747B28C, 0xF0478627),
        (b"Hello, world!", 0x9747B28C, 0x24884CBA),
        ("\u03c0".encode() * 8, 0x9747B28C, 0xD58063C1),
        (b"The quick brown fox jumps over the lazy dog", 0x9747B28C, 0x2FA826CD),
    ],
)
def test_murmur_vectors(data: bytes, seed: int, expected: int):
    """The vectors that implementations of MurmurHash3_x86_32 share (I. Boyd, stackoverflow.com/a/31929528)."""
    assert murmur3_32(data, seed) == expected


@pytest.mark.parametrize(
    ("transform", "raw", "message"),
    [
        (Numeric(), ["warm"], "must be numbers"),
        (Numeric(), [1.0, "warm"], "must be numbers"),
        (Categorical(vocabulary=("a",)), [3], "must be text, got int"),
        (Categorical(vocabulary=("a",)), [b"\xff"], "text must be UTF-8"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_without_being_shown(transform, raw, message):
    """The message has the feature and the type; values are private."""
    with pytest.raises(BadRequest, match=message) as caught:
        Features.of({"temperature": transform}).inputs({"temperature": raw})
    assert str(caught.value).startswith("feature 'temperature': ")
    assert "warm" not in str(caught.value)


def test_an_absent_column_is_named():
    """Never filled in."""
    with pytest.raises(BadRequest, match=r"features \['rate'\] are missing"):
        Features.of({"hour": Numeric(), "rate": Numeric()}).inputs({"hour": [1]})


def test_encoded_columns_follow_the_declared_order():
    """Two number columns, then three of a one-hot: vocabulary of one, unseen, missing."""
    features = Features.of({"rate": Numeric(), "hour": Categorical(vocabulary=("7AM",))})
    inputs = features.inputs({"hour": ["7AM", "8AM"], "rate": [0.5, None]})
    assert features.encode(features.slots(inputs)).tolist() == [[0.5, 0, 1, 0, 0], [0, 1, 0, 1, 0]]


def test_the_schema_hash_changes_with_all_that_changes_a_slot():
    """A constant, a word, an order or a name; and not with how often it is asked."""
    rate, hour = Numeric(mean=0.5), Categorical(vocabulary=("7AM", "2PM"))
    variants = [
        {"rate": rate, "hour": hour},
        {"hour": hour, "rate": rate},
        {"rate": Numeric(mean=0.6), "hour": hour},
        {"rate": rate, "hour": Categorical(vocabulary=("2PM", "7AM"))},
        {"ratio": rate, "hour": hour},
    ]
    assert len({Features.of(variant).schema_hash for variant in variants}) == len(variants)
    assert Features.of(variants[0]).schema_hash == Features.of(dict(variants[0])).schema_hash


@given(st.lists(st.none() | st.text() | st.just(COMPOSED) | st.just(DECOMPOSED), max_size=20))
def test_every_text_has_one_valid_index(values):
    """Any text falls within the transform's cardinality, at the same place in either normal form."""
    for transform in (Categorical(vocabulary=("Bar", COMPOSED)), Hash(buckets=7)):
        index = transform.inputs(values)
        assert ((index >= 0) & (index < transform.cardinality)).all()
        other = [None if value is None else unicodedata.normalize("NFD", value) for value in values]
        assert transform.inputs(other).tolist() == index.tolist()


LEARNED_LATER = {
    "trips": Numeric(normalise="federated", low=0, high=100),
    "spent": Log1p(normalise="federated", low=0, high=1000, clip=3),
    "zone": Categorical(discover=3),
}


def test_constants_written_by_hand_have_the_json_they_always_had():
    """What may be learned left no trace in them, so that no hash of a declaration moved."""
    assert Numeric(mean=2).model_dump() == {"kind": "numeric", "mean": 2.0, "std": 1.0, "clip": 10.0}
    assert Log1p().model_dump(mode="json") == {"kind": "log1p", "mean": 0.0, "std": 1.0, "clip": 10.0}
    assert Categorical(vocabulary=("a",)).model_dump(mode="json") == {"kind": "categorical", "vocabulary": ["a"]}


def test_a_transform_to_be_learned_comes_back_from_its_json():
    """Of the declaration; it has no mean, std or vocabulary to mistake for learned ones."""
    features = Features.of(LEARNED_LATER)
    dumped = features.model_dump(mode="json")["transforms"]
    assert dumped["trips"] == {"kind": "numeric", "clip": 10.0, "normalise": "federated", "low": 0.0, "high": 100.0}
    assert dumped["zone"] == {"kind": "categorical", "discover": 3}
    assert Features.model_validate_json(features.model_dump_json()) == features
    assert features.pending == ("trips", "spent", "zone")


@pytest.mark.parametrize("name", LEARNED_LATER)
def test_nothing_stands_for_constants_that_are_not_learned(name):
    """Not even mean 0: what would be computed with it is refused, and how to learn them is said."""
    transform = LEARNED_LATER[name]
    with pytest.raises(ConfigError, match="not learned yet: `hybrid train` learns them"):
        transform.slots(transform.inputs(["port"] if transform.text else [3.0]))
    with pytest.raises(ConfigError, match=f"the constants of {name} are not learned yet"):
        Features.of({name: transform}).slots(np.zeros((1, 1), np.float32))


def test_learned_constants_are_those_of_a_transform_written_by_hand():
    """Its clip stays; 60 is then (60 - 50) / 20 = 0.5."""
    assert LEARNED_LATER["trips"].learned(50.0, 20.0) == Numeric(mean=50, std=20)
    assert LEARNED_LATER["spent"].learned(1.5, 0.5) == Log1p(mean=1.5, std=0.5, clip=3)
    assert slots(LEARNED_LATER["trips"].learned(50.0, 20.0), [60]) == [0.5]


@pytest.mark.parametrize("found", [(), ("port",), ("port", "centre"), ("port", "centre", "airport")])
def test_a_learned_vocabulary_has_the_width_that_was_declared(found):
    """Three places and two, whatever was found; text that was not found is unseen, in no unused place."""
    transform = LEARNED_LATER["zone"]
    learned = transform.learned(found)
    assert (learned.width, learned.pending) == (transform.width, False) == (5, False)
    assert slots(learned, [*found, "beach", "", None]) == [*range(len(found)), 3, 3, 4]
    assert all(word.startswith(UNUSED) for word in learned.vocabulary[len(found) :])


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: Numeric(normalise="federated"), "low and high must be given"),
        (lambda: Numeric(normalise="federated", low=1, high=1), "low and high must be given"),
        (lambda: Log1p(normalise="federated", low=-3, high=0), "low and high must be given"),
        (lambda: Numeric(normalise="federated", low=0, high=1, mean=0.5), "mean and std must be left out"),
        (lambda: Numeric(low=0, high=1), "low and high must be left out without normalise"),
        (Categorical, "must hold at least one text, or be left out with discover"),
        (lambda: Categorical(vocabulary=("a",), discover=3), "must hold at least one text, or be left out with"),
    ],
)
def test_constants_are_written_or_learned_never_both(declare, message):
    """A log of max(x, 0) is one number from -3 to 0, so those are no bounds of it."""
    with pytest.raises(ValidationError, match=message):
        declare()
