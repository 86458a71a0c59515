"""Attacks on towers whose answer is known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrid import Categorical, Numeric
from hybrid.features import Features
from hybrid.privacy.attacks import Knowledge, enumeration, posterior, search
from hybrid.privacy.profiles import Profiles
from hybrid.privacy.trained_attack import Fitting, trained

TWO = Features.of({"word": Categorical(vocabulary=("a", "b", "c")), "other": Categorical(vocabulary=("x", "y"))})
MANY = Features.of({f"word{place}": Categorical(vocabulary=tuple("abcd")) for place in range(9)})


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small run slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def people(features, count, seed=0):
    """(count, features) slots of declared words, at random."""
    rng = np.random.default_rng(seed)
    sizes = [len(transform.vocabulary) for transform in features.transforms.values()]
    return np.stack([rng.integers(size, size=count) for size in sizes], axis=1).astype(np.float32)


def tower(features, size, seed=0):
    """A random linear map: no two of these profiles have the same embedding."""
    weights = torch.randn(features.width, size, generator=torch.Generator().manual_seed(seed))
    return lambda encoded: encoded @ weights


def knowledge(features, slots, embed, *, aside=None, clip=None, sd=0.0):
    aside = slots if aside is None else aside
    return Knowledge(embed, Profiles.of(features, slots), slots, aside, clip, sd)


def released(knows, slots, seed=1):
    """What people release, with noise."""
    clear = knows.released(slots)
    return clear + knows.sd * torch.randn(clear.shape, generator=torch.Generator().manual_seed(seed))


def test_of_two_candidates_the_posterior_is_what_bayes_says():
    """sd 1, squared distances 1 and 1 + 2 ln 3: the likelihoods are 3 to 1, and with a prior of 1 to 9, 1 to 3."""
    distances = torch.tensor([[1.0, 1.0 + 2 * np.log(3.0)]])
    even, odd = torch.log(torch.tensor([0.5, 0.5])), torch.log(torch.tensor([0.1, 0.9]))
    np.testing.assert_allclose(posterior(distances, even, 1.0), [[0.75, 0.25]], rtol=1e-5)
    np.testing.assert_allclose(posterior(distances, odd, 1.0), [[0.25, 0.75]], rtol=1e-5)


def test_without_noise_the_nearest_candidate_has_all_the_weight():
    """Whatever the prior; of two that are equally near, each has its prior's."""
    prior = torch.log(torch.tensor([0.1, 0.3, 0.6]))
    np.testing.assert_allclose(posterior(torch.tensor([[1.0, 4.0, 9.0]]), prior, 0.0), [[1, 0, 0]])
    np.testing.assert_allclose(posterior(torch.tensor([[1.0, 1.0, 9.0]]), prior, 0.0), [[0.25, 0.75, 0]], rtol=1e-5)


def test_a_small_profile_is_recovered_exactly_from_a_clear_embedding():
    """Six profiles, of which the attacker knows people with two: the other four are enumerated too."""
    knows = knowledge(TWO, np.float32([[0, 0], [1, 1]]), tower(TWO, 3))
    everybody = np.float32([[a, b] for a in range(3) for b in range(2)])
    np.testing.assert_array_equal(enumeration(knows)(released(knows, everybody)), everybody)


def test_a_clipped_embedding_is_compared_with_clipped_ones():
    """All embeddings are longer than the clip, so only directions are left; they differ, and tell everything."""
    knows = knowledge(TWO, people(TWO, 50), tower(TWO, 3), clip=0.01)
    assert knows.released(people(TWO, 50)).norm(dim=1).max() <= 0.01 * (1 + 1e-6)
    everybody = np.float32([[a, b] for a in range(3) for b in range(2)])
    np.testing.assert_array_equal(enumeration(knows)(released(knows, everybody)), everybody)


def test_a_search_recovers_profiles_that_nobody_known_has():
    """Of 4^9 profiles 200 are known: the nearest of them is hardly ever the one, and nearly all are found."""
    knows = knowledge(MANY, people(MANY, 200), tower(MANY, 12))
    attacked = people(MANY, 200, seed=1)
    seen = released(knows, attacked)
    assert (enumeration(knows)(seen) == attacked).all(axis=1).mean() < 0.1
    assert (search(knows)(seen) == attacked).all(axis=1).mean() > 0.95


def test_a_search_that_covers_every_profile_is_the_posterior_s_choice():
    """Of six profiles a beam of 16 holds all; the guess is the one that enumeration weighs by the same prior."""
    known = np.float32([[0, 0]] * 5 + [[0, 1]] * 3 + [[1, 0]] * 2 + [[2, 1]] * 4)
    knows = knowledge(TWO, known, tower(TWO, 3), sd=1.0)
    seen = released(knows, people(TWO, 300))
    every = np.array([[a, b] for a in range(3) for b in range(2)])
    independent = np.outer([8 / 14, 2 / 14, 4 / 14], [7 / 14, 7 / 14]).ravel()
    squares = torch.cdist(seen, knows.released(every.astype(np.float32))).square()
    weight = posterior(squares, torch.log(torch.from_numpy(independent)).float(), 1.0).numpy()
    words = np.stack([weight[:, every[:, 0] == word].sum(axis=1) for word in range(3)], axis=1).argmax(axis=1)
    np.testing.assert_array_equal(search(knows)(seen)[:, 0], words)


@pytest.mark.parametrize("kind", ["enumeration", "trained"])
def test_under_much_noise_a_guess_is_the_prior_s(kind):
    """Noise a thousand times as large as the embedding; six in ten have the first word: that is guessed of all."""
    rng = np.random.default_rng(0)
    known = np.float32(np.stack([rng.choice(3, 500, p=[0.6, 0.3, 0.1]), rng.choice(2, 500, p=[0.2, 0.8])], axis=1))
    knows = knowledge(TWO, known[:400], tower(TWO, 3), aside=known[400:], sd=1e3)
    attack = enumeration(knows) if kind == "enumeration" else trained(knows, seed=0)
    guesses = attack(released(knows, people(TWO, 200)))
    assert (guesses == [0, 1]).all(axis=1).mean() > 0.95


def test_a_trained_attack_recovers_words_and_numbers_of_people_it_has_not_seen():
    """A word, and a number that takes any value, which is regressed: from an embedding that tells both."""
    features = Features.of({"word": Categorical(vocabulary=("a", "b", "c")), "number": Numeric()})
    rng = np.random.default_rng(0)
    slots = np.stack([rng.integers(3, size=2000), rng.normal(size=2000)], axis=1).astype(np.float32)
    knows = knowledge(features, slots[:1500], tower(features, 4), aside=slots[1500:1700])
    assert knows.profiles.values[1].grid
    attack = trained(knows, seed=0, fitting=Fitting(batch=128))
    right = knows.profiles.right(attack(released(knows, slots[1700:])), slots[1700:]).mean(axis=0)
    assert right[0] > 0.98
    assert right[1] > 0.8


def test_a_trained_attack_is_repeated_by_its_seed():
    """The same guesses, bit by bit."""
    known = people(TWO, 300)
    knows = knowledge(TWO, known, tower(TWO, 3), sd=0.5)
    seen = released(knows, people(TWO, 100, seed=2))
    first, second = (trained(knows, seed=3, fitting=Fitting(epochs=2))(seen) for _ in range(2))
    np.testing.assert_array_equal(first, second)
