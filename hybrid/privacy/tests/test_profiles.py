"""Values, profiles, and what counts as right."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid import Bucketize, Categorical, Hash, Numeric
from hybrid.features import Features
from hybrid.privacy.profiles import TOLERANCE, Profiles, Values, slots_of

NAN = np.float32(np.nan)
FEATURES = Features.of(
    {"word": Categorical(vocabulary=("a", "b")), "bucket": Bucketize(edges=(1.0,)), "number": Numeric(mean=2, std=2)}
)


def slots(**columns):
    """Raw columns of FEATURES -> slots."""
    return FEATURES.slots(FEATURES.inputs(columns))


SEEN = slots(word=["a", "a", None, "zz"], bucket=[0.0, 5.0, 5.0, None], number=[2.0, 4.0, None, 4.0])


def test_slots_come_back_from_what_a_tower_reads():
    """Unseen words, missing buckets and missing numbers included."""
    np.testing.assert_array_equal(slots_of(FEATURES, FEATURES.encode(SEEN)), SEEN)


def test_values_are_what_is_declared_and_what_is_seen():
    """Both words, seen or not, then unseen (2) and missing (3); both buckets and missing (2); 0, 1 and missing."""
    values = [found.slots for found in Profiles.of(FEATURES, SEEN).values]
    np.testing.assert_array_equal(values[0], [0, 1, 2, 3])
    np.testing.assert_array_equal(values[1], [0, 1, 2])
    np.testing.assert_array_equal(values[2], [0, 1, NAN])


def test_of_a_hash_only_values_that_somebody_has_are_known():
    """Two of 1,000 buckets."""
    found = Values.of("word", Hash(buckets=1000), np.array([7, 900, 7], np.float32))
    np.testing.assert_array_equal(found.slots, [7, 900])


def test_codes_and_slots_are_each_other_s_inverse_and_shares_are_counts():
    """Of four rows two have word 0, none word 1, one each the others."""
    profiles = Profiles.of(FEATURES, SEEN)
    np.testing.assert_array_equal(profiles.slots(profiles.codes(SEEN)), SEEN)
    np.testing.assert_allclose(profiles.shares[0], [0.5, 0, 0.25, 0.25])
    np.testing.assert_array_equal(profiles.encoder()(profiles.codes(SEEN)).numpy(), FEATURES.encode(SEEN))


def test_every_profile_is_enumerated_once():
    """4 words, 3 buckets and 3 numbers: 36 profiles, all different."""
    everything = Profiles.of(FEATURES, SEEN).everything()
    assert len(everything) == len(np.unique(everything, axis=0)) == 36


def test_many_numbers_become_a_grid_that_is_near_each_of_them():
    """A thousand numbers in [-2, 2]: no more than 21 values, and the nearest to each counts as right."""
    numbers = np.random.default_rng(0).uniform(-2, 2, 1000).astype(np.float32)
    values = Values.of("number", Numeric(), numbers)
    assert values.grid
    assert len(values) <= 21
    assert values.right(values.slots[values.codes(numbers)], numbers).all()


@pytest.mark.parametrize(
    ("guess", "truth", "right"),
    [(0.5, 0.5 + TOLERANCE, True), (0.5, 0.62, False), (NAN, NAN, True), (0.0, NAN, False), (NAN, 0.0, False)],
)
def test_a_number_is_right_within_a_tenth_of_its_standard_deviation(guess, truth, right):
    """A missing one where it is said to be missing."""
    values = Values.of("number", Numeric(std=7), np.array([0, 1], np.float32))
    assert values.right(np.float32([guess]), np.float32([truth])).tolist() == [right]


def test_the_best_constant_guess_is_the_commonest_value():
    """Word 0 (2 of 4), bucket 1 (2 of 4), number 1 (2 of 4); of 0, 0.08, 1 within a tenth of a deviation: 0."""
    np.testing.assert_array_equal(Profiles.of(FEATURES, SEEN).commonest(SEEN), [0, 1, 1])
    number = Features.of({"number": Numeric()})
    near = np.float32([[0.0], [0.08], [1.0], [1.15]])
    assert Profiles.of(number, near).commonest(near).tolist() == [0.0]
