"""Clipping, noise and bounds; NumPy only, so that a device can carry it.

Adjacency is zero-out: two neighbouring data sets differ in that one person's
whole contribution becomes zero. How many take part is public.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import CohortTooSmall, ConfigError


class NoiseSource(Protocol):
    """Where noise comes from."""

    def gaussian(self, size: int, sd: float) -> NDArray[np.float64]:
        """Fresh independent N(0, sd^2) draws, shape (size,); zeros where sd = 0."""
        ...


class SeededNoise:
    """Bit-reproducible noise, for simulation only: who knows the seed can take the noise away.

    Args:
        seed: of the run; >= 0.
        stream: tells apart the sums of one run, e.g. (round, attempt): different
            streams are independent, so no two sums share their noise.

    >>> SeededNoise(7, 1).gaussian(3, sd=2.0).tolist() == SeededNoise(7, 1).gaussian(3, sd=2.0).tolist()
    True
    """

    def __init__(self, seed: int, *stream: int) -> None:
        self._generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))

    def gaussian(self, size: int, sd: float) -> NDArray[np.float64]:
        """See `NoiseSource`."""
        return self._generator.normal(0.0, sd, size)


class SystemNoise:
    """Noise from the operating system's CSPRNG, for devices and fleets.

    Each value is the sum of four Box-Muller draws, halved: which floating-point
    numbers a single draw can take would tell apart neighbouring sums.

    Source:
        Holohan and Braghin, ESORICS 2021, section 5.1. https://arxiv.org/abs/2107.10138
    """

    def gaussian(self, size: int, sd: float) -> NDArray[np.float64]:
        """See `NoiseSource`."""
        bits = np.frombuffer(os.urandom(8 * 4 * size), dtype=np.uint64).reshape(2, 2 * size)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53  # in (0, 1]: its logarithm is finite
        radius, angle = np.sqrt(-2.0 * np.log(uniform[0])), 2.0 * math.pi * uniform[1]
        normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(4, size)
        return np.asarray(normals.sum(axis=0) * (sd / 2.0))


@dataclass(frozen=True)
class PaidNoise:
    """Noise that is paid for before it is drawn: what leaves with it is in the ledger, or was never released.

    >>> from hybrid.errors import BudgetExceeded
    >>> def refuse() -> None:
    ...     raise BudgetExceeded("no budget left")
    >>> PaidNoise(SeededNoise(7), pay=refuse).gaussian(3, sd=2.0)
    Traceback (most recent call last):
    hybrid.errors.BudgetExceeded: no budget left

    Attributes:
        source: of the noise.
        pay: writes the spend; raises where it is refused. Called before each draw.
    """

    source: NoiseSource
    pay: Callable[[], None]

    def gaussian(self, size: int, sd: float) -> NDArray[np.float64]:
        """See `NoiseSource`."""
        self.pay()
        return self.source.gaussian(size, sd)


def clip_rows(updates: NDArray[Any], clip: float) -> NDArray[np.float64]:
    """Scales each row down to an L2 norm of at most `clip`; a shorter row stays as it is.

    A row that is not finite, or too long for its norm to be a float64 (1e154),
    becomes zero: like a person who contributes nothing.

    Args:
        updates: real numbers, shape (k, p); each row is one person's whole flat contribution.
        clip: in the unit of `updates`; finite, > 0.

    Returns:
        A new array, shape (k, p).

    >>> clip_rows(np.array([[30.0, 40.0], [0.3, 0.4], [np.nan, 1.0]]), clip=5.0).tolist()
    [[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]
    """
    return _clip_rows(updates, clip)[0]


def _clip_rows(updates: NDArray[Any], clip: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The clipped rows, (k, p), and the norms they had before, (k,); 0 for rows that became zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.array(updates, dtype=np.float64)
        norm = np.sqrt(np.einsum("kp,kp->k", rows, rows))
    unusable = ~np.isfinite(norm)
    rows[unusable], norm[unusable] = 0.0, 0.0
    rows *= (clip / np.maximum(norm, clip))[:, None]  # exactly 1 up to the clip
    return rows, norm


@dataclass(frozen=True)
class ClippedSum:
    """What one cohort adds up to, before noise. Private, but for `received`: only a mechanism may have it.

    A person whose update is zero, not finite or misshapen is in `received` only:
    whichever way a person is zeroed out, nothing private counts it.

    Attributes:
        total: sum of the clipped updates, shape (p,), finite.
        received: how many answered (public).
        below, above: how many of the usable updates had a norm > 0 and at most the clip, or
            above it, before they were clipped. One person adds 1 to one of the two, or to neither.
    """

    total: NDArray[np.float64]
    received: int
    below: int
    above: int


def clip_and_sum(updates: Iterable[NDArray[Any]], size: int, clip: float) -> ClippedSum:
    """Clips each update and sums them: what a fleet's aggregator does, and the reference for who does it faster.

    Every row weighs the same: a weight such as its number of examples would let
    one person move the sum by more than `clip`. A chunk that does not hold rows
    of p real numbers took part and contributes zero (broadcast, it would pass
    the clip); where it holds no rows at all it counts as one reply.

    Args:
        updates: chunks of any number of rows, shape (k, p), so that a cohort need not fit in memory.
        size: p, the length of a flat update.
        clip: largest L2 norm of one flat update, in parameter units; finite, > 0.

    >>> clip_and_sum([np.array([[30.0, 40.0], [0.3, 0.4], [np.nan, 1.0]])], size=2, clip=5.0)
    ClippedSum(total=array([3.3, 4.4]), received=3, below=1, above=1)
    """
    total, received, below, above = np.zeros(size), 0, 0, 0
    for chunk in updates:
        received += len(chunk) if chunk.ndim == 2 else 1
        if _holds_rows(chunk, size):
            rows, norm = _clip_rows(chunk, clip)
            total += rows.sum(axis=0)
            below += int(np.count_nonzero((norm > 0) & (norm <= clip)))
            above += int(np.count_nonzero(norm > clip))
    return ClippedSum(total, received, below, above)


@dataclass(frozen=True)
class AggregationState:
    """What an aggregation carries from one round to the next. Nothing in it is private.

    Attributes:
        round: rounds released so far.
        size: p, the length of a flat update.
        clip: L2 norm to which the next round clips, in parameter units; finite, > 0.
    """

    round: int
    size: int
    clip: float


@dataclass(frozen=True)
class Release:
    """What may leave the aggregator after one round.

    Attributes:
        sum: of the clipped updates, with noise, shape (p,). Divide it by the cohort that was
            planned: a denominator that follows the replies would change the noise with them.
        received: how many answered (public); misshapen and non-finite answers are among them.
        clip: the L2 norm that clipped them, in parameter units.
    """

    sum: NDArray[np.float64]
    received: int
    clip: float


Cohort = Callable[[float], ClippedSum]
"""A round's people, who clip to the norm they are given and are summed: clip -> ClippedSum."""


@dataclass(frozen=True)
class Aggregation:
    """How the updates of one round become one sum that may leave the aggregator.

    Attributes:
        init: length of a flat update -> state before round 1.
        step: (state, cohort of one round, noise) -> (state after it, Release). It calls the
            cohort once, with the state's clip norm, and draws noise once. Pure but for these
            two: no clock, no I/O, no other randomness.
    """

    init: Callable[[int], AggregationState]
    step: Callable[[AggregationState, Cohort, NoiseSource], tuple[AggregationState, Release]]


def gaussian_sum(*, clip_norm: float, noise_multiplier: float, minimum: int) -> Aggregation:
    """Builds the user-level Gaussian mechanism on a sum of clipped updates.

    Args:
        clip_norm: largest L2 norm of one flat update, in parameter units; finite, > 0.
        noise_multiplier: standard deviation of the noise over `clip_norm`; finite, >= 0.
        minimum: fewest people whose updates may be released together; >= 0.

    Raises:
        ConfigError: a setting is outside the range above.
        CohortTooSmall: (from `step`) fewer than `minimum` answered. No noise was drawn.

    Source:
        McMahan et al., ICLR 2018, Algorithm 1, with the fixed denominator. https://arxiv.org/abs/1710.06963
    """
    if not 0 < clip_norm < math.inf:
        raise ConfigError(f"clip_norm must be finite and > 0, got {clip_norm!r}")
    check_release(noise_multiplier, minimum)

    def step(state: AggregationState, cohort: Cohort, noise: NoiseSource) -> tuple[AggregationState, Release]:
        clipped = answered(state, cohort, minimum)
        noisy = clipped.total + noise.gaussian(state.size, sd=noise_multiplier * state.clip)
        return replace(state, round=state.round + 1), Release(noisy, clipped.received, state.clip)

    return Aggregation(init=lambda size: AggregationState(round=0, size=size, clip=clip_norm), step=step)


CLIP_REACH = 1e6
"""An adaptive clip stays within this factor of the one it started from, either way."""


def adaptive_gaussian_sum(
    *,
    initial_clip: float,
    quantile: float,
    lr: float,
    noise_multiplier: float,
    quantile_noise: float,
    planned_cohort: float,
    minimum: int,
) -> Aggregation:
    """Builds the Gaussian mechanism whose clip norm follows a quantile of the updates' norms.

    A round releases its sum, noised in proportion to the norm that clipped it,
    and, to the mechanism only, how much too large or small that norm was. Both
    are one Gaussian release of `noise_multiplier`: a person moves the sum, over
    its noise, by at most 1 / z_update and the quantile, over its noise, by at
    most 1 / (2 quantile_noise), and z^-2 = z_update^-2 + (2 quantile_noise)^-2.

    With below and above as in `ClippedSum`, the clip C becomes

        C exp(-lr (fraction - quantile)),
        fraction - quantile = ((1 - quantile) below - quantile above + noise) / planned_cohort:

    too many below, and it shrinks. It rests where below / (below + above) is
    the quantile, however many of the planned cohort answered; counting each
    person's bit from 1/2 instead, as in the paper, would let those who are
    missing pull it away. For quantile = 1/2 the two are the same; for another
    one, one person moves this sum by up to max(quantile, 1 - quantile), and its
    noise is as much larger.

    Args:
        initial_clip: the first round's L2 norm, in parameter units; in [1e-100, 1e100].
            Never left by more than a factor of `CLIP_REACH`.
        quantile: of the norms of usable, non-zero updates, that the clip seeks; gamma, in (0, 1).
        lr: of the clip's logarithm, per round; finite, > 0. The paper's is 0.2.
        noise_multiplier: z, of the two releases together: what is to be accounted; finite, >= 0.
        quantile_noise: sigma_b, standard deviation of the noise on the count, for quantile = 1/2;
            finite, > noise_multiplier / 2. See `quantile_noise_for`.
        planned_cohort: expected number of participants of a round; finite, > 0.
        minimum: fewest people whose updates may be released together; >= 0.

    Raises:
        ConfigError: a setting is outside the range above.
        CohortTooSmall: (from `step`) fewer than `minimum` answered. No noise was drawn.

    Source:
        Andrew et al., NeurIPS 2021, Algorithm 1 and theorem 1. https://arxiv.org/abs/1905.03871
    """
    if not 1e-100 <= initial_clip <= 1e100:
        raise ConfigError(f"initial_clip must be in [1e-100, 1e100], got {initial_clip!r}")
    if not 0 < quantile < 1:
        raise ConfigError(f"quantile must be in (0, 1), got {quantile!r}")
    if not 0 < lr < math.inf:
        raise ConfigError(f"lr must be finite and > 0, got {lr!r}")
    if not 0 < planned_cohort < math.inf:
        raise ConfigError(f"planned_cohort must be finite and > 0, got {planned_cohort!r}")
    check_release(noise_multiplier, minimum)
    z_update = update_noise_multiplier(noise_multiplier, quantile_noise)
    count_noise = 2.0 * max(quantile, 1.0 - quantile) * quantile_noise

    def step(state: AggregationState, cohort: Cohort, noise: NoiseSource) -> tuple[AggregationState, Release]:
        clipped = answered(state, cohort, minimum)
        draw = noise.gaussian(state.size + 1, sd=1.0)  # one draw: the two are paid for as one release
        noisy = clipped.total + z_update * state.clip * draw[:-1]
        count = (1.0 - quantile) * clipped.below - quantile * clipped.above
        excess = (count + count_noise * float(draw[-1])) / planned_cohort
        clip = _moved(state.clip, -lr * excess, around=initial_clip)
        return replace(state, round=state.round + 1, clip=clip), Release(noisy, clipped.received, state.clip)

    return Aggregation(init=lambda size: AggregationState(round=0, size=size, clip=initial_clip), step=step)


def update_noise_multiplier(noise_multiplier: float, quantile_noise: float) -> float:
    """z_update: what is left for the sum where z is spent on it and on the quantile together.

    Args:
        noise_multiplier: z, of both; >= 0.
        quantile_noise: sigma_b, standard deviation of the noise on a count of bits in {-1/2, 1/2};
            finite, > z / 2.

    Returns:
        Standard deviation of the sum's noise over the clip norm; z at least.

    Raises:
        ConfigError: with so little noise the quantile alone would cost more than z.

    >>> round(update_noise_multiplier(3.0, quantile_noise=2.5), 6)
    3.75
    """
    if not noise_multiplier / 2.0 < quantile_noise < math.inf:
        raise ConfigError(
            f"quantile_noise must be finite and > {noise_multiplier / 2.0:g}, half the noise multiplier, "
            f"got {quantile_noise!r}"
        )
    return noise_multiplier / math.sqrt(1.0 - (noise_multiplier / (2.0 * quantile_noise)) ** 2)


def quantile_noise_for(noise_multiplier: float, planned_cohort: float) -> float:
    """A quantile noise that is enough: a twentieth of the cohort, as in the paper, or what costs the sum 3.3 %.

    Args:
        noise_multiplier: z, of sum and quantile together; >= 0.
        planned_cohort: expected number of participants of a round; > 0.
    """
    return max(planned_cohort / 20.0, 2.0 * noise_multiplier)


def answered(state: AggregationState, cohort: Cohort, minimum: int) -> ClippedSum:
    """The round's sum at the state's clip norm.

    Raises:
        CohortTooSmall: fewer than `minimum` answered.
    """
    clipped = cohort(state.clip)
    if clipped.received < minimum:
        raise CohortTooSmall(f"round {state.round + 1}: {clipped.received} answered, at least {minimum} must")
    assert clipped.total.shape == (state.size,)  # another would broadcast
    assert np.isfinite(clipped.total).all()
    return clipped


def _moved(clip: float, by: float, *, around: float) -> float:
    """`clip` exp(`by`), within `CLIP_REACH` of `around`; `by` may be large, never NaN."""
    low, high = math.log(around / CLIP_REACH), math.log(around * CLIP_REACH)
    return math.exp(min(max(math.log(clip) + by, low), high))


def check_release(noise_multiplier: float, minimum: int) -> None:
    """Raises: ConfigError: a setting of a mechanism is outside its range."""
    if not 0 <= noise_multiplier < math.inf:
        raise ConfigError(f"noise_multiplier must be finite and >= 0, got {noise_multiplier!r}")
    if minimum < 0:
        raise ConfigError(f"minimum must be at least 0, got {minimum!r}")


def clip_and_noise(
    embedding: NDArray[np.float32], *, clip: float, sigma: float, noise: NoiseSource
) -> NDArray[np.float32]:
    """Releases device embeddings as `release=Noised(clip, sigma)` declares, on the device.

    Args:
        embedding: one row per release, shape (n, d).
        clip: largest L2 norm of a row before noise.
        sigma: standard deviation of the noise, in units of `clip`.
        noise: `SystemNoise()` on a device.

    Returns:
        Shape (n, d). What one row costs: `local_epsilon`.
    """
    clipped = clip_rows(embedding, clip)
    return (clipped + noise.gaussian(clipped.size, sigma * clip).reshape(clipped.shape)).astype(np.float32)


def local_epsilon(sigma: float, delta: float) -> float:
    """What one release by `clip_and_noise` costs, whatever the two embeddings are.

    Two clipped embeddings differ by at most 2 * clip. Releases compose: m of
    one person's cost as much as one with sigma / sqrt(m).

    Args:
        sigma: standard deviation of the noise, in units of the clip; > 0.
        delta: in (0, 1).
    """
    return gaussian_epsilon(2.0 / sigma, delta)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon of the Gaussian mechanism.

    Args:
        mu: L2 sensitivity over the noise's standard deviation; >= 0. Mechanisms
            on one person compose to the root of the sum of their mu^2.
        delta: in (0, 1).

    Returns:
        The least epsilon to ten digits, rounded up; infinite where mu > 1e6: no privacy.

    Source:
        Balle and Wang, ICML 2018, theorem 8. https://arxiv.org/abs/1805.06530

    >>> round(gaussian_epsilon(mu=math.sqrt(0.3), delta=1e-10), 4)
    3.4157
    """
    if mu > 1e6:
        return math.inf
    if mu == 0 or _gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _gaussian_delta(mu, high) > delta:
        low, high = high, 2.0 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if _gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def _gaussian_delta(mu: float, epsilon: float) -> float:
    """Theorem 8's left side, the terms in log space: e^epsilon alone would overflow."""
    return math.exp(_log_phi(mu / 2 - epsilon / mu)) - math.exp(epsilon + _log_phi(-mu / 2 - epsilon / mu))


def _log_phi(x: float) -> float:
    """Logarithm of the standard normal's distribution function."""
    if x > -30.0:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2.0)))
    tail = 1.0 / (x * x)  # Abramowitz and Stegun 26.2.12; the first term left out is below 2e-10
    return -x * x / 2 - math.log(-x * math.sqrt(2.0 * math.pi)) + math.log1p(-tail + 3 * tail**2 - 15 * tail**3)


def _holds_rows(chunk: NDArray[Any], size: int) -> bool:
    return chunk.ndim == 2 and chunk.shape[1] == size and chunk.dtype.kind in "fiu"
