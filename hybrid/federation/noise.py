"""How much noise a training needs, before it runs: its mechanism, the least that a budget allows, a buffer's size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrid.errors import ConfigError
from hybrid.federation.aggregator import Round
from hybrid.privacy.accountant import Event, noise_multiplier_for
from hybrid.privacy.matrix import Banded, Matrix, optimised, prefix_error, sensitivity
from hybrid.spec import HybridModel, Training


def check_delta(model: HybridModel, users: int) -> None:
    """Raises: ConfigError: the declared delta is too large for so many users."""
    if not users:
        raise ConfigError("there must be at least one user, got none")
    most, declared = users**-1.1, model.privacy.delta
    if declared > most:
        raise ConfigError(f"privacy.delta must be at most {most:.2g}, users^-1.1 at {users}, got {declared:g}")


def least_noise(
    settings: Training, epsilon: float, delta: float, *, sampling: float, besides: Sequence[Event] = ()
) -> float:
    """The least noise multiplier with which all rounds of a training, and what is besides, stay within a budget.

    Args:
        settings: of the training.
        epsilon: of the budget; finite, > 0.
        delta: in (0, 1).
        sampling: probability that a user is asked, where it is by coins.
        besides: other releases on the same people, which the budget pays for too.

    Raises:
        ConfigError, BudgetExceeded: as `noise_multiplier_for`.
    """
    matrix = matrix_of(settings)
    if matrix is None:
        return noise_multiplier_for(epsilon, delta, sampling, settings.rounds, besides=besides)
    return matrix.sensitivity * noise_multiplier_for(epsilon, delta, 1.0, 1, besides=besides)


def matrix_of(settings: Training) -> Matrix | None:
    """The matrix mechanism of a training whose users take part by a schedule; None: they do by coins."""
    if settings.separation is None:
        return None
    momentum = settings.server_options.get("momentum", 0.0)
    return optimised(
        settings.noise,
        settings.rounds,
        settings.separation,
        memory=settings.noise_memory,
        momentum=float(momentum) if isinstance(momentum, int | float) else 0.0,
    )


def planned_cohort(settings: Training, users: int) -> float:
    """Expected number of participants of a round: what sums are divided by."""
    if settings.buffer is not None:
        return settings.buffer
    return users * settings.sampling if settings.separation is None else users / settings.separation


def round_settings(
    model: HybridModel, settings: Training, noise_multiplier: float, *, sampling: float, planned: float
) -> Round:
    """How each round of a federated training is sampled, clipped and noised.

    No minimum: amplification by Poisson sampling is claimed for rounds that are
    released whoever came. A round withheld because few came would make it
    likelier that one who is in a released round took part.

    Args:
        model: whose clip.
        settings: of the training.
        noise_multiplier: standard deviation of the noise over the clip.
        sampling: probability that a user is asked.
        planned: expected number of participants.
    """
    return Round(
        sampling=sampling if settings.separation is None else 1.0,
        clip=model.privacy.clip,
        noise_multiplier=noise_multiplier,
        minimum=0,
        quantile=settings.clip_quantile,
        planned_cohort=planned,
        matrix=matrix_of(settings),
    )


def step_noise(settings: Training, users: int, epsilon: float, delta: float) -> float:
    """What noise does to a step: its standard deviation in a coordinate of the mean update, in clips.

    Correlated noise is taken back by later steps: it counts as independent noise
    that would take the weights as far from where they were to be, in the root of
    the mean square over all rounds.

    Args:
        settings: of the training.
        users: of the population; >= 1.
        epsilon: of all its rounds.
        delta: likewise.
    """
    matrix, planned = matrix_of(settings), planned_cohort(settings, users)
    if matrix is None:
        return noise_multiplier_for(epsilon, delta, settings.sampling, settings.rounds) / planned
    people, alone = matrix.participation, Banded((1.0,))
    better = prefix_error(matrix.factor, people).mean / prefix_error(alone, people).mean
    return better * sensitivity(alone, people) * noise_multiplier_for(epsilon, delta, 1.0, 1) / planned


@dataclass(frozen=True)
class BufferSize:
    """A buffer, and what it comes to.

    Attributes:
        updates: K.
        separation: flushes from one participation of a user to the next, at least.
        participations: of a user in all flushes, at most.
        noise_multiplier: standard deviation of the noise over the clip.
        step_noise: see `step_noise`.
    """

    updates: int
    separation: int
    participations: int
    noise_multiplier: float
    step_noise: float

    @classmethod
    def of(
        cls, settings: Training, updates: int, users: int, *, coming: float, epsilon: float, delta: float
    ) -> BufferSize:
        """A buffer for so many updates.

        Args:
            settings: of the training, but for buffer and separation.
            updates: K; at least 1, and few enough that so many users come, for each flush of the staleness too.
            users: of the population.
            coming: share of them who come in the time from one participation to the next, in (0, 1].
            epsilon: of all flushes.
            delta: likewise.
        """
        between = math.floor(coming * users / updates)  # flushes, of which the last ones may be those of a stale update
        separation = max(1, min(settings.rounds, between - settings.max_staleness))
        chosen = settings.model_copy(update={"buffer": updates, "separation": separation})
        noise = least_noise(chosen, epsilon, delta, sampling=1.0)
        most = -(-settings.rounds // separation)
        return cls(updates, separation, most, noise, step_noise(chosen, users, epsilon, delta))


def most_updates(settings: Training, users: int, coming: float) -> int:
    """The largest buffer: one that all who come fill while an update of each may still be on its way."""
    return math.floor(coming * users / (1 + settings.max_staleness))


def _quietest(settings: Training, users: int, coming: float) -> int:
    """The smallest buffer with the quietest steps of all; 0 where none can be.

    Noise of a mean falls with K, and grows by the root of the participations. Near
    `most_updates` the staleness leaves hardly a separation, and the second wins.
    With correlated noise this is nearly so, without it exactly.
    """
    updates = np.arange(1, most_updates(settings, users, coming) + 1)
    if not len(updates):
        return 0
    between = np.floor(coming * users / updates) - settings.max_staleness
    participations = np.ceil(settings.rounds / np.clip(between, 1, settings.rounds))
    return int(updates[np.argmin(np.sqrt(participations) / updates)])


def buffer_for(
    settings: Training, users: int, *, most_noise: float, coming: float, epsilon: float, delta: float
) -> BufferSize | None:
    """A buffer whose steps are as quiet as is asked for, and with one update fewer are not: the K an epsilon needs.

    With a larger K people take part oftener, so that the noise of a sum grows by
    about its root, and that of the mean falls by it. Where one participation more
    comes in, noise jumps up by a little: another, smaller K may do as well there.

    Args:
        settings: of the training, but for buffer and separation: so many flushes, with such noise.
        users: of the population; >= 1.
        most_noise: of a step, as `step_noise` has it; > 0.
        coming: share of the users who come in the time from one participation to the next, in (0, 1].
        epsilon: of all flushes.
        delta: likewise.

    Returns:
        None: too few people come, even for the buffer with the quietest steps.
    """

    def of(updates: int) -> BufferSize:
        return BufferSize.of(settings, updates, users, coming=coming, epsilon=epsilon, delta=delta)

    low, high = 0, _quietest(settings, users, coming)
    if high < 1:
        return None
    if of(high).step_noise > most_noise:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if of(middle).step_noise <= most_noise else (middle, high)
    return of(high)
