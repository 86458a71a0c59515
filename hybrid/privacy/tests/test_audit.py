"""Each audit here has a fixed seed; a bound that holds with confidence c fails by chance in at most 1 - c of seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from hybrid.errors import ConfigError
from hybrid.privacy.accountant import noise_multiplier_for
from hybrid.privacy.audit import (
    adaptive,
    alike,
    at_least,
    at_most,
    audit,
    correlated,
    each_of,
    gaussian,
    likelihood,
    lower_bound,
    planted,
    play,
)
from hybrid.privacy.mechanisms import Aggregation, AggregationState, Release, gaussian_epsilon

DELTA = 1e-3
CLAIM = {"epsilon": 1.0, "delta": DELTA}
SAMPLED = {**CLAIM, "rounds": 10, "sampling": 0.5}
ADAPTIVE = {**CLAIM, "rounds": 2, "lr": 0.2}


def halves(rounds, noise_share=1.0):
    """A matrix mechanism of our own: C has ones on its diagonal and halves below it.

    Its noise n = C^-1 z is n_t = z_t - n_(t-1) / 2. A canary in rounds 1 and 4 moves C x by (1, 1/2, 0, 1, 1/2, ...),
    of norm sqrt(2.5).
    """
    noise_multiplier = math.sqrt(2.5) * noise_multiplier_for(1.0, DELTA, 1.0, 1)

    def step(state, cohort, noise):
        before, last = state
        row = noise.gaussian(before.size, sd=noise_share * noise_multiplier) - last / 2
        clipped = cohort(before.clip)
        return State(replace(before, round=before.round + 1), row), Release(
            clipped.total + row, clipped.received, before.clip
        )

    return correlated(
        "halves",
        Aggregation(lambda size: State(AggregationState(0, size, 1.0), np.zeros(size)), step),
        column=np.array([1.0, 0.5] + [0.0] * (rounds - 2)),
        separation=3,
        noise_multiplier=noise_multiplier,
        **CLAIM,
    )


class State(NamedTuple):
    """What `halves` carries on."""

    before: AggregationState
    last: np.ndarray

    @property
    def clip(self):
        return self.before.clip


SOUND = {
    "one release of everybody": (gaussian(**CLAIM, rounds=1, sampling=1.0), 50_000),
    "everybody in each of ten rounds": (gaussian(**CLAIM, rounds=10, sampling=1.0), 50_000),
    "half of the people in each round": (gaussian(**SAMPLED), 50_000),
    "few in each of many rounds": (gaussian(**CLAIM, rounds=100, sampling=0.05), 50_000),
    "an adaptive clip": (adaptive(**ADAPTIVE, sampling=0.5, quantile=0.5), 50_000),
    "an adaptive clip that seeks a low quantile": (adaptive(**ADAPTIVE, sampling=1.0, quantile=0.2), 50_000),
    "noise of a round that depends on the last": (halves(rounds=6), 50_000),
}


@pytest.mark.parametrize("name", SOUND)
def test_the_bound_of_a_sound_mechanism_is_below_its_claim_and_not_far_below(name):
    """At a claimed epsilon of 1 it lies in [0.4, 1), with the least noise that the accountant allows."""
    audited, trials = SOUND[name]
    finding = audit(audited, trials=trials, seed=1, confidence=0.95)
    assert 0.4 <= finding.bound.epsilon < 1.0
    assert not finding.refuted


@pytest.mark.parametrize("place", range(3))
def test_each_planted_bug_is_refuted(place):
    """Half the noise, weights by example counts and a division by replies give away more than they claim."""
    assert audit(planted(**SAMPLED)[place], trials=20_000, seed=1, confidence=0.99).refuted


def test_a_clip_that_does_not_clip_is_refuted():
    """A canary is a thousand clips long before it is clipped."""
    sound = gaussian(**SAMPLED)
    loose = replace(sound, summing=lambda updates, counts, clip: alike(updates, counts, 3.0 * clip))
    assert audit(loose, trials=20_000, seed=1, confidence=0.99).refuted


def test_correlated_noise_that_is_too_little_is_refuted():
    """Half of what the matrix mechanism asks for."""
    assert audit(halves(rounds=6, noise_share=0.5), trials=20_000, seed=1, confidence=0.99).refuted


@pytest.mark.parametrize("quantile", [0.2, 0.5])
def test_a_clip_that_moves_with_too_little_noise_is_refuted(quantile):
    """The moves of the clip are looked at: with a twentieth of the noise on the count alone, it shows."""

    class Quieter:
        def __init__(self, source):
            self.source = source

        def gaussian(self, size, sd):
            draw = self.source.gaussian(size, sd)
            draw[-1] /= 20.0
            return draw

    sound = adaptive(**ADAPTIVE, sampling=1.0, quantile=quantile)
    step = sound.aggregation.step
    quiet = replace(sound.aggregation, step=lambda state, cohort, noise: step(state, cohort, Quieter(noise)))
    assert audit(replace(sound, aggregation=quiet), trials=4000, seed=1, confidence=0.99).refuted


def test_the_bound_is_too_high_no_more_often_than_it_says():
    """Randomised response tells the truth with probability e / (1 + e): its epsilon is exactly 1. Of 1,000 audits at
    confidence 0.9 at most 100 may be above it; that more than 130 are has, were it 100, a probability below 0.002.
    """
    rng, truth = np.random.default_rng(0), math.e / (1.0 + math.e)
    too_high = 0
    for _ in range(1000):
        within, without = rng.random(400) < truth, rng.random(400) >= truth
        bound = lower_bound(within[None].astype(float), without[None].astype(float), delta=1e-12, confidence=0.9)
        too_high += bound.epsilon > 1.0
    assert too_high <= 130


def test_perfect_guesses_prove_what_so_many_trials_can():
    """300 of 300 right, none of 300 wrong: each probability is bounded with an error of 0.025, in closed form, by
    a = 0.025^(1/300) and 1 - a.
    """
    bound = lower_bound(np.ones((1, 400)), np.zeros((1, 400)), delta=0.1, confidence=0.95)
    share = 0.025 ** (1 / 300)
    assert (bound.right, bound.wrong) == pytest.approx((share, 1 - share))
    assert bound.epsilon == pytest.approx(math.log((share - 0.1) / (1 - share)))
    assert bound.trials == 600


def test_guesses_about_who_is_out_count_too():
    """One in ten of those who are out scores as nobody does who is in: 0.1 of the guesses are right, none is wrong."""
    without = -(np.random.default_rng(0).random((1, 4000)) < 0.1).astype(float)
    bound = lower_bound(np.zeros((1, 4000)), without, delta=1e-6, confidence=0.95)
    assert bound.guess == "out"
    assert bound.wrong == pytest.approx(1 - 0.025 ** (1 / 3000))
    assert bound.right == pytest.approx(0.1, abs=0.02)


def test_scores_that_say_nothing_prove_nothing():
    """Everybody scores alike: the right guesses are bounded from below, the wrong ones from above, so epsilon is 0."""
    assert lower_bound(np.zeros((1, 100)), np.zeros((1, 100)), delta=0.01, confidence=0.95).epsilon == 0.0


def test_the_best_of_several_looks_is_chosen():
    """The first look sees nothing, the second everything: the bound is that of the second alone."""
    within, without = np.stack([np.zeros(400), np.ones(400)]), np.zeros((2, 400))
    best = lower_bound(within[1:], without[1:], delta=0.1, confidence=0.95)
    assert lower_bound(within, without, delta=0.1, confidence=0.95) == best


def test_clopper_and_pearson_have_their_closed_forms():
    """P(n of n | p) = p^n, P(0 of n | p) = (1 - p)^n, P(at least 1 of 2 | p) = 1 - (1 - p)^2."""
    found = np.array([0, 1, 2])
    np.testing.assert_allclose(at_least(found, 2, 0.1), [0.0, 1 - math.sqrt(0.9), math.sqrt(0.1)])
    np.testing.assert_allclose(at_most(found, 2, 0.1), [1 - math.sqrt(0.1), math.sqrt(0.9), 1.0])


def test_the_score_is_the_likelihood_ratio():
    """A sum of one clip with noise of one clip: N(1; 1, 1) / N(1; 0, 1) = e^(1/2); half of the time who is in takes
    part. Two such rounds multiply.
    """
    np.testing.assert_allclose(likelihood(np.array([[1.0], [1.0]]), 1.0, 1.0), [1.0])
    np.testing.assert_allclose(likelihood(np.ones((1, 1)), 1.0, 0.5), [math.log(0.5 + 0.5 * math.exp(0.5))])


def test_scores_of_one_release_are_as_far_apart_as_the_noise_says():
    """Log-likelihood ratios of N(1/z, 1) to N(0, 1) have means of plus and minus mu^2 / 2 and a variance of mu^2, where
    mu = 1/z is the one whose exact epsilon is claimed. Of 40,000 canaries a mean is 0.02 mu off at four deviations.
    """
    audited = gaussian(**CLAIM, rounds=1, sampling=1.0)
    mu = 1.0 / noise_multiplier_for(1.0, DELTA, 1.0, 1)
    assert gaussian_epsilon(mu, DELTA) == pytest.approx(1.0, rel=3e-3)
    within, without = play(audited, trials=80_000, seed=0)
    assert within.mean() == pytest.approx(mu**2 / 2, abs=0.02 * mu)
    assert without.mean() == pytest.approx(-(mu**2) / 2, abs=0.02 * mu)
    assert within.std() == pytest.approx(mu, rel=0.02)


def test_a_seed_repeats_an_audit():
    """The same scores to the last bit; another seed has others."""
    audited = gaussian(**SAMPLED)
    first, again, other = (play(audited, trials=500, seed=seed)[0] for seed in (3, 3, 4))
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: audit(gaussian(**SAMPLED), trials=0, seed=0, confidence=0.9), "trials must be at least 1, got 0"),
        (lambda: audit(gaussian(**SAMPLED), trials=9, seed=0, confidence=1.0), "confidence must be in .0, 1., got 1.0"),
        (
            lambda: lower_bound(np.ones((1, 2)), np.ones((1, 9)), delta=0.1, confidence=0.9),
            "4 canaries on either side, got 2",
        ),
        (lambda: each_of(0.0, 3), "confidence must be in .0, 1., got 0.0"),
        (lambda: gaussian(**CLAIM, rounds=0, sampling=0.5), "count must be at least 1, got 0"),
    ],
)
def test_what_is_out_of_range_is_named(call, message):
    """The setting, what it must be, and what it was."""
    with pytest.raises(ConfigError, match=message):
        call()
