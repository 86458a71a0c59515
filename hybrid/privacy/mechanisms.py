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
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.array(updates, dtype=np.float64)
        norm = np.sqrt(np.einsum("kp,kp->k", rows, rows))
    unusable = ~np.isfinite(norm)
    rows[unusable], norm[unusable] = 0.0, 0.0
    rows *= (clip / np.maximum(norm, clip))[:, None]  # exactly 1 up to the clip
    return rows


@dataclass(frozen=True)
class AggregationState:
    """What an aggregation carries from one round to the next.

    Attributes:
        round: rounds released so far.
        size: p, the length of a flat update.
    """

    round: int
    size: int


@dataclass(frozen=True)
class Release:
    """What may leave the aggregator after one round.

    Attributes:
        sum: of the clipped updates, with noise, shape (p,). Divide it by the cohort that was
            planned: a denominator that follows the replies would change the noise with them.
        received: how many answered (public); misshapen and non-finite answers are among them.
    """

    sum: NDArray[np.float64]
    received: int


@dataclass(frozen=True)
class Aggregation:
    """How the updates of one round become one sum that may leave the aggregator.

    Attributes:
        init: length of a flat update -> state before round 1.
        step: (state, updates of one round, noise) -> (state after it, Release). The updates come
            in chunks of any number of rows, shape (k, p), so that a cohort need not fit in
            memory. Pure: no clock, no I/O, no other randomness.
    """

    init: Callable[[int], AggregationState]
    step: Callable[[AggregationState, Iterable[NDArray[Any]], NoiseSource], tuple[AggregationState, Release]]


def gaussian_sum(*, clip_norm: float, noise_multiplier: float, minimum: int) -> Aggregation:
    """Builds the user-level Gaussian mechanism on a sum of clipped updates.

    Every row weighs the same: a weight such as its number of examples would let
    one person move the sum by more than `clip_norm`. A chunk that does not hold
    rows of p real numbers took part and contributes zero (broadcast, it would
    pass the clip); where it holds no rows at all it counts as one reply.

    Args:
        clip_norm: largest L2 norm of one flat update, in parameter units; finite, > 0.
        noise_multiplier: standard deviation of the noise over `clip_norm`; finite, >= 0.
        minimum: fewest rows that may be released together; >= 0.

    Raises:
        ConfigError: a setting is outside the range above.
        CohortTooSmall: (from `step`) fewer than `minimum` answered. No noise was drawn.

    Source:
        McMahan et al., ICLR 2018, Algorithm 1, with the fixed denominator. https://arxiv.org/abs/1710.06963
    """
    if not 0 < clip_norm < math.inf:
        raise ConfigError(f"clip_norm must be finite and > 0, got {clip_norm!r}")
    if not 0 <= noise_multiplier < math.inf:
        raise ConfigError(f"noise_multiplier must be finite and >= 0, got {noise_multiplier!r}")
    if minimum < 0:
        raise ConfigError(f"minimum must be at least 0, got {minimum!r}")

    def step(
        state: AggregationState, updates: Iterable[NDArray[Any]], noise: NoiseSource
    ) -> tuple[AggregationState, Release]:
        total, received = np.zeros(state.size), 0
        for chunk in updates:
            received += len(chunk) if chunk.ndim == 2 else 1
            if _holds_rows(chunk, state.size):
                total += clip_rows(chunk, clip_norm).sum(axis=0)
        if received < minimum:
            raise CohortTooSmall(f"round {state.round + 1}: {received} answered, at least {minimum} must")
        noisy = total + noise.gaussian(state.size, sd=noise_multiplier * clip_norm)
        return replace(state, round=state.round + 1), Release(sum=noisy, received=received)

    return Aggregation(init=lambda size: AggregationState(round=0, size=size), step=step)


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
