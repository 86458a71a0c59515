"""What a mechanism gives away at least: canaries go through the real one, and an adversary's guesses are counted.

An accountant proves that a mechanism costs at most epsilon, if the code does
what the proof assumes. An audit looks at the code from the other side: a
*canary* is a person whose update is as long as the clip lets it be, in a
direction of its own; half of the canaries are zeroed out, by a coin; and an
adversary who sees every release, and knows everything but these coins, says
which. Whoever tells better than epsilon and delta allow has found a bug. A bound below
the claim proves nothing: it says that this adversary, in so many trials, found none.

Many canaries go through one run at once, in orthogonal directions: noise that is
independent in each coordinate makes each of them a trial of its own. All of
it is an oracle: seeds are known, and nothing of it is a release.

Source:
    Nasr et al., USENIX Security 2023, "Tight auditing of differentially private machine learning", sections 3 and 4
    (the white-box game, canaries of the clip's length), https://arxiv.org/abs/2302.07956. Many canaries in one run:
    Andrew et al., ICLR 2024, https://arxiv.org/abs/2302.03098, and Steinke, Nasr and Jagielski, NeurIPS 2023,
    https://arxiv.org/abs/2305.08846.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.privacy.accountant import noise_multiplier_for
from hybrid.privacy.mechanisms import (
    Aggregation,
    AggregationState,
    ClippedSum,
    Cohort,
    NoiseSource,
    Release,
    SeededNoise,
    adaptive_gaussian_sum,
    clip_and_sum,
    clip_rows,
    gaussian_sum,
    quantile_noise_for,
    update_noise_multiplier,
)

Guess = Literal["in", "out"]
GUESSES: tuple[Guess, ...] = ("in", "out")
Scores = NDArray[np.float64]
Attendance = Callable[[np.random.Generator, int], NDArray[np.bool_]]
"""(rng, canaries) -> (rounds, canaries): in which rounds each canary takes part, zeroed out or not."""

CANARIES = 128  # of one run: measured, more take longer each, since their rows leave the cache
OTHERS = 16  # who take part in each round beside the canaries
LONG = 1000.0  # of a canary's update before it is clipped, in clips: a clip that does not hold is seen at once
WITHIN = 1.0 - 1e-9  # of one that must not count as longer than the clip
COUNT = 10.0  # examples that a canary says it has, of which others have one: they must not matter
CHOOSING = 4  # one trial in so many chooses the threshold, the others count
CAUTION = 20.0  # times less error is allowed where the threshold is chosen: luck in a thin tail is no good threshold
THRESHOLDS = 200
RUN, NOISE = 0, 1  # streams of one seed


@dataclass(frozen=True)
class Seen:
    """What the adversary has of one run, everybody else's part taken away.

    Attributes:
        sums: along each canary's direction, over the clip of the round, shape (rounds, canaries).
        clips: of each round and of the one that would come next, shape (rounds + 1,).
        below, above: how many of the others had norms up to the clip and above it, shape (rounds,): see `ClippedSum`.
    """

    sums: Scores
    clips: Scores
    below: Scores
    above: Scores


Score = Callable[[Seen], Scores]
"""What was seen -> (looks, canaries): looked at it in one or more ways, the higher, the likelier a canary was in."""

Summing = Callable[[NDArray[np.float64], NDArray[np.float64], float], ClippedSum]
"""(updates (k, p), how many examples each says it has (k,), clip) -> ClippedSum."""


def alike(updates: NDArray[np.float64], counts: NDArray[np.float64], clip: float) -> ClippedSum:
    """What an aggregator does: how many examples anybody has goes nowhere."""
    return clip_and_sum([updates], updates.shape[1], clip)


@dataclass(frozen=True)
class Audited:
    """A mechanism, how it is used, what is claimed for it, and how its releases are looked at.

    Any mechanism with the shape of an `Aggregation` can be one. The bound holds for
    every score: the likelihood ratio of the mechanism that is claimed makes it tight, looks at
    parts of a release find bugs in the parts.

    Attributes:
        name: for people.
        aggregation: the real one.
        rounds: of one run, after which the adversary guesses.
        attendance: who takes part when.
        score: the adversary's.
        epsilon, delta: claimed, for the whole run.
        canaries: of one run; more than one where nothing that is released depends on two of them.
        norm: of their updates before they are clipped, in clips.
        summing: how the updates of a round are clipped and summed.
    """

    name: str
    aggregation: Aggregation
    rounds: int
    attendance: Attendance
    score: Score
    epsilon: float
    delta: float
    canaries: int = CANARIES
    norm: float = LONG
    summing: Summing = alike


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon, from guesses that were counted.

    Attributes:
        epsilon: the mechanism's is at least this, with the confidence that was asked for; >= 0.
        guess: which canaries the guesses were about: those that were in, or those that were out.
        right: share of these that were guessed, its lower bound.
        wrong: share of the others that were guessed too, its upper bound.
        trials: that were counted.
    """

    epsilon: float
    guess: Guess
    right: float
    wrong: float
    trials: int


@dataclass(frozen=True)
class Finding:
    """What an audit found.

    Attributes:
        name: of the mechanism.
        epsilon, delta: claimed.
        rounds: of one run.
        bound: see `Bound`.
    """

    name: str
    epsilon: float
    delta: float
    rounds: int
    bound: Bound

    @property
    def refuted(self) -> bool:
        """Whether more was given away than is claimed."""
        return self.bound.epsilon > self.epsilon


def audit(
    audited: Audited,
    *,
    trials: int,
    seed: int,
    confidence: float,
    progress: Callable[[int, int], None] | None = None,
) -> Finding:
    """Plays the game so many times, and counts.

    Args:
        audited: what is audited.
        trials: canaries to play with, in all; rounded up to whole runs.
        seed: of coins and noise.
        confidence: with which the bound holds, in (0, 1). A mechanism that keeps its claim is refuted with a
            probability of at most 1 - confidence.
        progress: called with how many trials are done, of how many.

    Raises:
        ConfigError: trials or confidence is outside its range.
    """
    within, without = play(audited, trials=trials, seed=seed, progress=progress)
    bound = lower_bound(within, without, delta=audited.delta, confidence=confidence)
    return Finding(audited.name, audited.epsilon, audited.delta, audited.rounds, bound)


def play(
    audited: Audited, *, trials: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Scores, Scores]:
    """Scores of about `trials` canaries together.

    Returns:
        Those of canaries that were in, shape (looks, n), and of those that were zeroed out, shape (looks, m).

    Raises:
        ConfigError: trials is less than 1.
    """
    if trials < 1:
        raise ConfigError(f"trials must be at least 1, got {trials!r}")
    noise = SeededNoise(seed, NOISE)
    rng = np.random.default_rng([seed, RUN])
    runs = math.ceil(trials / audited.canaries)
    members = rng.random((runs, audited.canaries)) < 0.5
    scores = []
    for run in range(runs):
        scores.append(audited.score(_observe(audited, members[run], rng, noise)))
        if progress:
            progress(run + 1, runs)
    every, was_in = np.concatenate(scores, axis=1), members.ravel()
    return every[:, was_in], every[:, ~was_in]


def _observe(audited: Audited, members: NDArray[np.bool_], rng: np.random.Generator, noise: NoiseSource) -> Seen:
    """One run of the mechanism on the canaries and `OTHERS`, whose updates have one direction more."""
    size = audited.canaries + 1
    attends = audited.attendance(rng, audited.canaries)
    assert attends.shape == (audited.rounds, audited.canaries)
    state = audited.aggregation.init(size)
    norms = state.clip * np.geomspace(0.25, 4.0, OTHERS)
    others = np.zeros((OTHERS, size))
    others[:, -1] = norms
    updates = canary_updates(np.arange(audited.canaries), size, audited.norm) * members[:, None]
    sums, clips = np.empty((audited.rounds, audited.canaries)), [state.clip]
    for number in range(audited.rounds):
        here = updates[attends[number]]
        counts = np.repeat([1.0, COUNT], [OTHERS, len(here)])

        def cohort(clip: float, here: NDArray[Any] = here, counts: NDArray[Any] = counts) -> ClippedSum:
            return audited.summing(np.concatenate([others, clip * here]), counts, clip)

        state, release = audited.aggregation.step(state, cohort, noise)
        sums[number] = release.sum[:-1] / release.clip
        clips.append(state.clip)
    within = (norms <= np.array(clips[:-1])[:, None]).sum(axis=1)
    return Seen(sums, np.array(clips), within, OTHERS - within)


def canary_updates(places: NDArray[np.int64], size: int, norm: float) -> NDArray[np.float64]:
    """Updates of canaries, each in a direction of its own.

    Args:
        places: which canaries', shape (k,), each in [0, p).
        size: p, the length of an update.
        norm: of each.

    Returns:
        Shape (k, p).

    >>> canary_updates(np.array([2, 0]), size=3, norm=5.0).tolist()
    [[0.0, 0.0, 5.0], [5.0, 0.0, 0.0]]
    """
    updates = np.zeros((len(places), size))
    updates[np.arange(len(places)), places] = norm
    return updates


def poisson(sampling: float, rounds: int) -> Attendance:
    """Each canary takes part in each round by an independent coin; with sampling 1 in all."""
    return lambda rng, canaries: rng.random((rounds, canaries)) < sampling


def every(separation: int, rounds: int) -> Attendance:
    """Each canary takes part in the first round and in every `separation`-th after it."""
    taking = np.arange(rounds) % separation == 0
    return lambda rng, canaries: np.repeat(taking[:, None], canaries, axis=1)


def likelihood(sums: Scores, noise_multiplier: float, sampling: float) -> Scores:
    """The logarithm of the likelihood ratio of Gaussian sums in which a canary takes part by an unseen coin.

    By Neyman and Pearson no other score tells better, if noise and sampling are what is claimed.

    Args:
        sums: along each canary's direction, over the clip, shape (rounds, canaries).
        noise_multiplier: standard deviation of the sums' noise over the clip; > 0.
        sampling: in (0, 1].

    Returns:
        Shape (canaries,).
    """
    ratios: Scores = _mixed(_gaussian_ratio(sums, 1.0, noise_multiplier), sampling).sum(axis=0)
    return ratios


def _gaussian_ratio(value: Scores, shift: Scores | float, sd: float) -> Scores:
    """Logarithm of N(value; shift, sd^2) / N(value; 0, sd^2)."""
    ratio: Scores = (value - shift / 2.0) * shift / sd**2
    return ratio


def _mixed(log_ratio: Scores, sampling: float) -> Scores:
    """log(1 - q + q ratio)."""
    if sampling == 1.0:
        return log_ratio
    return np.logaddexp(math.log1p(-sampling), math.log(sampling) + log_ratio)


def gaussian(*, epsilon: float, delta: float, rounds: int, sampling: float, clip: float = 1.0) -> Audited:
    """The Gaussian mechanism with the least noise that epsilon allows.

    Args:
        epsilon: claimed, for the whole run.
        delta: likewise.
        rounds: of a run.
        sampling: of each canary in each round, by Poisson sampling; 1: everybody.
        clip: largest L2 norm of an update.

    Raises:
        ConfigError: an argument is outside its range.
    """
    noise_multiplier = noise_multiplier_for(epsilon, delta, sampling, rounds)
    return Audited(
        name=f"Gaussian, {sampled(sampling)}",
        aggregation=gaussian_sum(clip_norm=clip, noise_multiplier=noise_multiplier, minimum=0),
        rounds=rounds,
        attendance=poisson(sampling, rounds),
        score=lambda seen: likelihood(seen.sums, noise_multiplier, sampling)[None],
        epsilon=epsilon,
        delta=delta,
    )


def adaptive(
    *, epsilon: float, delta: float, rounds: int, sampling: float, quantile: float, lr: float, clip: float = 1.0
) -> Audited:
    """The Gaussian mechanism whose clip follows a quantile; one canary a run, since all of them move the one clip.

    What is left of a move of the clip without the others is the canary's noised count. It is looked at together
    with the sum, and alone.

    Args:
        epsilon: claimed, for the whole run.
        delta: likewise.
        rounds: of a run.
        sampling: see `gaussian`.
        quantile: in (0, 1).
        lr: of the clip's logarithm.
        clip: the first round's.

    Raises:
        ConfigError: an argument is outside its range.
    """
    noise_multiplier = noise_multiplier_for(epsilon, delta, sampling, rounds)
    planned = float(2 * OTHERS)  # half of them do not reply
    quantile_noise = quantile_noise_for(noise_multiplier, planned)
    aggregation = adaptive_gaussian_sum(
        initial_clip=clip,
        quantile=quantile,
        lr=lr,
        noise_multiplier=noise_multiplier,
        quantile_noise=quantile_noise,
        planned_cohort=planned,
        minimum=0,
    )
    update_noise = update_noise_multiplier(noise_multiplier, quantile_noise)
    count_noise = 2.0 * max(quantile, 1.0 - quantile) * quantile_noise
    longer = quantile >= 0.5  # the canary counts where it moves the count most
    moved_by = -quantile if longer else 1.0 - quantile

    def score(seen: Seen) -> Scores:
        count = -planned / lr * np.diff(np.log(seen.clips)) - (1.0 - quantile) * seen.below + quantile * seen.above
        move = _gaussian_ratio(count, moved_by, count_noise)[:, None]
        looks = _gaussian_ratio(seen.sums, 1.0, update_noise) + move, move
        return np.stack([_mixed(look, sampling).sum(axis=0) for look in looks])

    return Audited(
        name=f"Gaussian, adaptive clip, {sampled(sampling)}",
        aggregation=aggregation,
        rounds=rounds,
        attendance=poisson(sampling, rounds),
        score=score,
        epsilon=epsilon,
        delta=delta,
        canaries=1,
        norm=LONG if longer else WITHIN,
    )


def correlated_likelihood(sums: Scores, noise_multiplier: float, column: Scores, taking: NDArray[np.bool_]) -> Scores:
    """As `likelihood`, of sums whose noise is C^-1 Z: C times the sums has independent noise again.

    Args:
        sums: along each canary's direction, over the clip, shape (rounds, canaries).
        noise_multiplier: standard deviation of Z over the clip; > 0.
        column: the first one of C, lower triangular and Toeplitz, shape (rounds,).
        taking: in which rounds each canary takes part, shape (rounds, canaries).

    Returns:
        Shape (canaries,).
    """
    lag = np.subtract.outer(np.arange(len(column)), np.arange(len(column)))
    c = np.where(lag >= 0, column[lag], 0.0)
    ratios: Scores = _gaussian_ratio(c @ sums, c @ taking.astype(np.float64), noise_multiplier).sum(axis=0)
    return ratios


def sampled(sampling: float) -> str:
    """For names: who takes part in a round."""
    return "everybody" if sampling == 1.0 else f"sampled {sampling:g}"


def correlated(
    name: str,
    aggregation: Aggregation,
    *,
    column: Scores,
    separation: int,
    noise_multiplier: float,
    epsilon: float,
    delta: float,
) -> Audited:
    """A matrix mechanism: Gaussian sums whose noise is C^-1 Z, with C lower triangular and Toeplitz.

    Args:
        name: for people.
        aggregation: the real one.
        column: the first one of C, one number for each round of the horizon, none of them negative.
        separation: a canary takes part in as many rounds as this lets it, with the same update.
        noise_multiplier: standard deviation of Z over the clip; > 0.
        epsilon: claimed, for the whole horizon.
        delta: likewise.
    """
    attendance = every(separation, len(column))
    taking = attendance(np.random.default_rng(0), 1)
    return Audited(
        name=name,
        aggregation=aggregation,
        rounds=len(column),
        attendance=attendance,
        score=lambda seen: correlated_likelihood(seen.sums, noise_multiplier, column, taking)[None],
        epsilon=epsilon,
        delta=delta,
    )


def planted(*, epsilon: float, delta: float, rounds: int, sampling: float) -> tuple[Audited, ...]:
    """Three mechanisms with a bug each that keep claiming epsilon: an audit that does not refute them is blind.

    Half the noise; updates weighed by the number of examples that each says it has, after the clip; and a sum
    over those who replied, scaled to the cohort that was planned, with noise for the latter: half of it did not reply.

    Args: those of `gaussian`.
    """
    sound = gaussian(epsilon=epsilon, delta=delta, rounds=rounds, sampling=sampling)
    noise_multiplier = noise_multiplier_for(epsilon, delta, sampling, rounds)
    half = gaussian_sum(clip_norm=1.0, noise_multiplier=noise_multiplier / 2.0, minimum=0)
    planned = 2.0 * (OTHERS + sampling * sound.canaries)
    return (
        replace(sound, name="bug: half the noise", aggregation=half),
        replace(sound, name="bug: weighed by examples", summing=_weighed),
        replace(sound, name="bug: divided by replies", aggregation=_divided(sound.aggregation, planned)),
    )


def _weighed(updates: NDArray[np.float64], counts: NDArray[np.float64], clip: float) -> ClippedSum:
    """A bug: the weight comes after the clip."""
    return replace(alike(updates, counts, clip), total=counts @ clip_rows(updates, clip))


def _divided(sound: Aggregation, planned: float) -> Aggregation:
    """A bug: the mean is over those who replied, and its noise that of the planned cohort."""

    def step(state: AggregationState, cohort: Cohort, noise: NoiseSource) -> tuple[AggregationState, Release]:
        def scaled(clip: float) -> ClippedSum:
            clipped = cohort(clip)
            return replace(clipped, total=clipped.total * planned / max(1, clipped.received))

        return sound.step(state, scaled, noise)

    return replace(sound, step=step)


def lower_bound(within: Scores, without: Scores, *, delta: float, confidence: float) -> Bound:
    """What guesses by a threshold on the scores prove, whatever the scores are.

    For any (epsilon, delta)-differentially private mechanism, P(guess | in) <= e^epsilon P(guess | out) + delta, and
    with in and out exchanged. A quarter of the trials chooses the look, which of the two is guessed, and the
    threshold; the others bound both probabilities by Clopper and Pearson, each with half of the error that is allowed.

    Args:
        within: of independent trials with the canary in, shape (looks, n).
        without: of trials with the canary zeroed out, shape (looks, m).
        delta: at which epsilon is bounded, in (0, 1).
        confidence: in (0, 1).

    Raises:
        ConfigError: confidence is outside its range, or there are too few trials to choose and count.

    Source:
        Jagielski, Ullman and Oprea, NeurIPS 2020, section 4, with delta. https://arxiv.org/abs/2006.07709
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be in (0, 1), got {confidence!r}")
    if min(within.shape[1], without.shape[1]) < CHOOSING:
        raise ConfigError(
            f"trials must be enough for {CHOOSING} canaries on either side, "
            f"got {within.shape[1]} and {without.shape[1]}"
        )
    assert np.isfinite(within).all()
    assert np.isfinite(without).all()
    chosen = _chosen(within[:, ::CHOOSING], without[:, ::CHOOSING], delta, confidence)
    rest, others = (np.delete(scores[chosen.look], np.s_[::CHOOSING]) for scores in (within, without))
    right, wrong, bounds = _bounds(
        chosen.guess, rest, others, np.array([chosen.threshold]), delta=delta, confidence=confidence
    )
    return Bound(float(bounds[0]), chosen.guess, float(right[0]), float(wrong[0]), len(rest) + len(others))


def each_of(confidence: float, bounds: int) -> float:
    """The confidence of each of some bounds with which all of them hold together (Bonferroni).

    Raises:
        ConfigError: confidence is outside (0, 1).

    >>> round(each_of(0.95, 5), 6)
    0.99
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be in (0, 1), got {confidence!r}")
    return 1.0 - (1.0 - confidence) / bounds


@dataclass(frozen=True)
class _Choice:
    look: int
    guess: Guess
    threshold: float


def _chosen(within: Scores, without: Scores, delta: float, confidence: float) -> _Choice:
    """What makes the bound the highest on these trials."""
    careful = 1.0 - (1.0 - confidence) / CAUTION
    tail = np.geomspace(1.0 / min(within.shape[1], without.shape[1]), 0.5, THRESHOLDS // 2)
    choices: list[tuple[float, _Choice]] = []
    for look, (here, there) in enumerate(zip(within, without, strict=True)):
        thresholds = np.quantile(np.concatenate([here, there]), np.concatenate([tail, 1.0 - tail]))
        for guess in GUESSES:
            bounds = _bounds(guess, here, there, thresholds, delta=delta, confidence=careful)[2]
            best = int(np.argmax(bounds))
            choices.append((float(bounds[best]), _Choice(look, guess, float(thresholds[best]))))
    return max(choices, key=lambda choice: choice[0])[1]


def _bounds(
    guess: Guess,
    within: Scores,
    without: Scores,
    thresholds: Scores,
    *,
    delta: float,
    confidence: float,
) -> tuple[Scores, Scores, Scores]:
    """For each threshold: the lower bound of right guesses, the upper of wrong ones, and that of epsilon."""
    asked, others = (within, without) if guess == "in" else (-without, -within)
    cuts = thresholds if guess == "in" else -thresholds
    error = (1.0 - confidence) / 2.0
    right = at_least(_exceed(asked, cuts), len(asked), error)
    wrong = at_most(_exceed(others, cuts), len(others), error)
    return right, wrong, np.log(np.maximum((right - delta) / wrong, 1.0))


def _exceed(scores: Scores, cuts: Scores) -> NDArray[np.int64]:
    """How many scores are at or above each cut."""
    return np.asarray(len(scores) - np.searchsorted(np.sort(scores), cuts, side="left"), np.int64)


def at_least(found: NDArray[np.int64], of: int, error: float) -> Scores:
    """Lower bound of a probability; it is too high with a probability of at most `error`.

    Args:
        found: successes.
        of: independent trials.
        error: in (0, 1).

    Source:
        Clopper and Pearson 1934, by the incomplete beta function.
    """
    from scipy.special import betaincinv

    return np.where(found > 0, betaincinv(np.maximum(found, 1), of - found + 1, error), 0.0)


def at_most(found: NDArray[np.int64], of: int, error: float) -> Scores:
    """Upper bound of a probability; it is too low with a probability of at most `error`. See `at_least`."""
    return 1.0 - at_least(of - found, of, error)
