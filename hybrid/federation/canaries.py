"""Canaries among the people of a real training, for `hybrid.privacy.audit`: its cohorts, engine and paid mechanism.

Several trainings with the same cohorts go as one batch; each has mechanism,
noise, ledger, server optimiser and canaries of its own. The adversary knows
everybody else's data, so what they add up to in each round, and takes it away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid.features import Float32
from hybrid.federation.aggregator import PaidMechanism, Round, local_stream, takes_part
from hybrid.federation.central import fit_server_side
from hybrid.federation.engine import Engine
from hybrid.federation.noise import check_delta, least_noise, planned_cohort, round_settings
from hybrid.federation.population import Examples
from hybrid.federation.strategy import NoisedSum
from hybrid.federation.training import Progress, check_allowed, engine_for, optimizer_for, threads_for
from hybrid.network import Network
from hybrid.privacy.audit import (
    LONG,
    Finding,
    Scores,
    canary_updates,
    correlated_likelihood,
    every,
    likelihood,
    lower_bound,
    poisson,
    sampled,
)
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import ClippedSum, clip_and_sum, quantile_noise_for, update_noise_multiplier
from hybrid.spec import HybridModel, Training

CANARIES = 4096  # of one training, at most: a sum of so many is still short beside its noise
TOGETHER = 64  # trainings in one batch: each has a ledger open
AT_ONCE = 64  # canaries that are clipped together, so that their rows stay in the cache
CANARY = 16  # a stream of one seed, beside those of `hybrid.federation.aggregator`


@dataclass
class _Training:
    """One training between rounds.

    Attributes:
        mechanism, strategy: its own.
        flat: (p,) the weights that its next round starts from.
        members: (canaries,) who of them is not zeroed out.
        attends: (rounds, canaries) in which rounds each takes part.
        sums: along the canaries' directions, over the clip, of each round so far, without those of the people.
    """

    mechanism: PaidMechanism
    strategy: NoisedSum
    flat: Float32
    members: NDArray[np.bool_]
    attends: NDArray[np.bool_]
    sums: list[Scores] = field(default_factory=list)

    def step(self, number: int, attempt: int, people: ClippedSum) -> None:
        """Pays for, noises and applies a round's sum of people and canaries."""
        release = self.mechanism.release(number, attempt, lambda clip: self._joined(number, people, clip))
        canaries = (release.sum - people.total)[: len(self.members)]
        self.sums.append(canaries / release.clip)
        self.flat = self.strategy.step(release.sum)

    def _joined(self, number: int, people: ClippedSum, clip: float) -> ClippedSum:
        canaries = clip_and_sum(self._updates(number, clip), len(self.flat), clip)
        return ClippedSum(
            people.total + canaries.total,
            people.received + canaries.received,
            people.below + canaries.below,
            people.above + canaries.above,
        )

    def _updates(self, number: int, clip: float) -> Iterator[NDArray[np.float64]]:
        """Of the canaries that take part in a round; those that are zeroed out reply with nothing."""
        here = self.attends[number - 1]
        yield np.empty((np.count_nonzero(here & ~self.members), 0))
        members = np.flatnonzero(here & self.members)
        for begin in range(0, len(members), AT_ONCE):
            yield canary_updates(members[begin : begin + AT_ONCE], len(self.flat), norm=LONG * clip)


def audit_training(
    model: HybridModel,
    examples: Examples,
    *,
    epsilon: float,
    trials: int,
    seed: int,
    confidence: float,
    folder: Path,
    progress: Progress | None = None,
) -> Finding:
    """Trains as the model declares, with canaries in the cohorts, and guesses which of them were in.

    Only the sums are looked at. Where the clip adapts, all canaries move it
    together; over the clip, which is released, their sums still do not depend on each other.
    Examples are taken as they come: what a label balance asks is released beside the rounds.

    Args:
        model: with its `training` and `privacy`; no more than its epsilon can be claimed.
        examples: of the people to learn from.
        epsilon: claimed, for all rounds, at the model's delta.
        trials: canaries, in all; rounded up to whole trainings.
        seed: of the first training; of each further one, one more.
        confidence: with which the bound holds, in (0, 1).
        folder: where the trainings' ledgers are written. They account for nothing that is kept.
        progress: called with how many rounds of all trainings are done, of how many.

    Raises:
        ConfigError: delta, epsilon or the label does not allow such a training, or trials are too few.
    """
    settings, delta = model.training, model.privacy.delta
    check_allowed(model, "federated", epsilon, settings)
    check_delta(model, examples.users)
    noise_multiplier = least_noise(settings, epsilon, delta, sampling=settings.sampling)
    planned = planned_cohort(settings, examples.users)
    rounds = round_settings(model, settings, noise_multiplier, sampling=settings.sampling, planned=planned)
    network = Network.build(model, seed=seed)
    trainings: list[_Training] = []
    with threads_for(network):
        if settings.server_tower == "central":
            fit_server_side(network, examples, seed=seed)
        engine = engine_for(network, examples, settings)
        canaries = min(CANARIES, engine.size)
        total = math.ceil(trials / canaries)
        for first in range(0, total, TOGETHER):
            with ExitStack() as stack:
                batch = []
                for number in range(first, min(first + TOGETHER, total)):
                    ledger = stack.enter_context(Ledger.open(folder / str(number), budget_epsilon=epsilon, delta=delta))
                    ledger.reserve([rounds.of(settings.rounds)])
                    batch.append(_start(engine, rounds, ledger, settings, seed=seed + number, canaries=canaries))
                for number in range(1, settings.rounds + 1):
                    _round(number, engine, batch, rounds, lr=settings.local_lr, seed=seed + first)
                    if progress:
                        progress(len(trainings) * settings.rounds + len(batch) * number, total * settings.rounds)
            trainings += batch
    scores = np.concatenate([_score(one, rounds) for one in trainings])
    members = np.concatenate([one.members for one in trainings])
    bound = lower_bound(scores[None, members], scores[None, ~members], delta=delta, confidence=confidence)
    return Finding(f"a training on {examples.population}: {_named(settings)}", epsilon, delta, settings.rounds, bound)


def _start(engine: Engine, rounds: Round, ledger: Ledger, settings: Training, *, seed: int, canaries: int) -> _Training:
    rng = np.random.default_rng([seed, CANARY])
    flat = engine.side.flat()
    attendance = poisson(rounds.sampling, settings.rounds)
    if rounds.matrix is not None:
        attendance = every(rounds.matrix.participation.separation, settings.rounds)
    return _Training(
        mechanism=PaidMechanism(rounds, ledger, seed=seed, size=engine.size),
        strategy=NoisedSum(planned_cohort(settings, engine.users), optimizer_for(settings, flat)),
        flat=flat,
        members=rng.random(canaries) < 0.5,
        attends=attendance(rng, canaries),
    )


def _round(number: int, engine: Engine, trainings: Sequence[_Training], rounds: Round, *, lr: float, seed: int) -> None:
    """The same people for all, who train from the weights of each; the canaries of each beside them."""
    attempt = trainings[0].mechanism.next_attempt(number)
    step = trainings[0].mechanism.released
    users = takes_part(rounds, engine.users, seed=seed, number=number, attempt=attempt, step=step)
    sums = engine.clipped_sums(
        np.stack([training.flat for training in trainings]),
        users,
        [training.mechanism.clip for training in trainings],
        [lr] * len(trainings),
        stream=local_stream(seed, number, attempt),
    )
    for training, people in zip(trainings, sums, strict=True):
        training.step(number, attempt, people)


def _score(training: _Training, rounds: Round) -> Scores:
    sums = np.array(training.sums)
    if rounds.matrix is not None:
        column = rounds.matrix.factor.column(len(sums))
        return correlated_likelihood(sums, rounds.noise_multiplier, column, training.attends)
    return likelihood(sums, _noise_of_sums(rounds), rounds.sampling)


def _named(settings: Training) -> str:
    if settings.separation is not None:
        return f"{settings.noise} noise, separation {settings.separation}"
    return f"Gaussian, {'' if settings.clip_quantile is None else 'adaptive clip, '}{sampled(settings.sampling)}"


def _noise_of_sums(rounds: Round) -> float:
    """Standard deviation of the sums' noise over the clip."""
    if rounds.quantile is None or rounds.planned_cohort is None:
        return rounds.noise_multiplier
    return update_noise_multiplier(
        rounds.noise_multiplier, quantile_noise_for(rounds.noise_multiplier, rounds.planned_cohort)
    )
