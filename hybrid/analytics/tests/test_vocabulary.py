"""Frequent texts are found, rare ones are not, and one person moves each sum by at most its bound."""

from __future__ import annotations

import math
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.analytics.asking import NORMALISE, Answer, Exact, People, Simulated
from hybrid.analytics.vocabulary import discover, phases, spelled_by, surviving
from hybrid.errors import BudgetExceeded
from hybrid.features import UNUSED
from hybrid.privacy.ledger import Ledger
from hybrid.query import SPELLED_BITS, SPELLED_BYTES, Hashed, Query, Spelled, bucket_of, contributions, spelling

BUCKETS = 256
SECRETS = [f"secret {number}" for number in range(40)]
HELD = {"South West Region": 3000, "Łódź": 2000, "": 1500, "never": 1000, None: 300}
texts = st.none() | st.text(max_size=40) | st.sampled_from(["", "Cafe\u0301", "x" * SPELLED_BYTES, UNUSED, "a\0b"])


def people_with(values):
    column = np.array([*values, None], dtype=object)[:-1]
    return People({"word": column}, np.arange(len(column) + 1))


def population():
    values = [text for text, count in HELD.items() for _ in range(count)]
    return people_with([*values, *SECRETS])


def spellable(text):
    return text is not None and bucket_of(unicodedata.normalize("NFC", text), BUCKETS) >= 0


def of_seed(seed, folder, epsilon=1.0, column="word"):
    with Ledger.open(folder, budget_epsilon=epsilon, delta=1e-5) as ledger:
        ask = Simulated(population(), ledger, purpose=NORMALISE, epsilon=epsilon, seed=seed)
        ask.begin(phases())
        return discover(ask, column, 20, buckets=BUCKETS), ledger.spent().epsilon


def test_texts_of_many_are_found_with_how_many_hold_them(tmp_path):
    """All four, the most frequent first, each within its interval or near it; no text of one person, and no missing."""
    found, spent = of_seed(0, tmp_path)
    assert [each.text for each in found] == ["South West Region", "Łódź", "", "never"]
    for each in found:
        assert each.people.value == pytest.approx(HELD[each.text], abs=60)
        assert each.people.full.high - each.people.full.low > each.people.noise.high - each.people.noise.low
    assert 0.99 < spent <= 1.0


def test_without_noise_each_count_is_exact():
    """An oracle's; people without a text are in none of them."""
    found = discover(Exact(people_with(["a"] * 30 + ["b"] * 20 + [None] * 9)), "word", 20)
    assert [(each.text, round(each.people.value, 9)) for each in found] == [("a", 30), ("b", 20)]


def test_at_most_so_many_are_found():
    """The most frequent of them."""
    assert [each.text for each in discover(Exact(people_with("aaabbc")), "word", 2)] == ["a", "b"]


def test_nothing_is_asked_that_the_budget_cannot_pay(tmp_path):
    """Both phases are set aside before the first."""
    with Ledger.open(tmp_path, budget_epsilon=0.5, delta=1e-5) as ledger:
        ask = Simulated(population(), ledger, purpose=NORMALISE, epsilon=1.0, seed=0)
        with pytest.raises(BudgetExceeded):
            ask.begin(phases())
        assert ledger.entries == []


@given(st.lists(texts, min_size=1, max_size=5))
def test_a_person_moves_each_sum_by_at_most_its_bound(values):
    """A row has the norm 1, whatever its text, or adds nothing, and is the one row that counts: no clip is needed."""
    column, offsets = np.array([*values, None], dtype=object)[:-1], np.array([0, len(values)])
    for part in (Hashed(column="word", buckets=2), Spelled(column="word", buckets=2, survivors=(1, 0))):
        query = Query(parts=(part,))
        (vector,) = contributions(query, {"word": column}, offsets)
        assert query.norm == 1.0
        assert np.linalg.norm(vector) == pytest.approx(1.0 if spellable(values[-1]) else 0.0)


@settings(max_examples=30)
@given(st.text(max_size=SPELLED_BYTES).map(lambda text: unicodedata.normalize("NFC", text)).filter(spellable))
def test_every_text_of_32_bytes_is_read_from_its_bits(text):
    """Of any script; and with a few of its bits wrong, where their sums are near 0."""
    sums = 5.0 * spelling(text)
    sums[[1, 77, 280]] *= -0.1
    assert spelled_by(sums, bucket_of(text, BUCKETS), BUCKETS) == text


def test_a_text_of_another_bucket_is_not_taken():
    """The bucket is part of the check."""
    assert spelled_by(5.0 * spelling("never"), (bucket_of("never", BUCKETS) + 1) % BUCKETS, BUCKETS) is None


def test_an_empty_bucket_passes_the_threshold_seldom():
    """Of 100 buckets, each with a chance of 0.01 / 100: beyond 3.719 standard deviations (tables of the normal)."""
    total = np.zeros(100)
    total[[3, 7, 9]] = 2 * 3.718, 2 * 3.720, 2 * 5.0
    answer = Answer(Query(parts=(Hashed(column="word", buckets=100),)), total, 2.0, people=10)
    assert surviving(answer, 20) == (9, 7)
    assert surviving(answer, 1) == (9,)


def test_a_text_of_one_person_is_never_spelled():
    """Its bits are a 17th of the least noise there is: half of them are wrong, as those of noise alone."""
    rng = np.random.default_rng(0)
    bits, bucket = spelling("secret") / math.sqrt(SPELLED_BITS), bucket_of("secret", BUCKETS)
    for held in (0, 1):
        for _ in range(50):
            assert spelled_by(held * bits + rng.normal(size=SPELLED_BITS), bucket, BUCKETS) is None


def test_a_missing_text_and_one_too_long_count_nowhere():
    """33 bytes, characters that a terminal would obey, half of what marks unused places: none is in a bucket, so none
    can be found.
    """
    controls = ("a\0", "\x1b[2J", "\x7f", "\x9b2J")
    assert {bucket_of(text, 9) for text in ("x" * 33, "ż" * 17, *controls, f"{UNUSED}3", None)} == {-1}
