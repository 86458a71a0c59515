"""Matrix mechanisms (DP-FTRL): Gaussian noise that is correlated between the rounds of a fixed horizon.

A training's weights follow prefix sums of what its rounds release. The matrix A
of prefix sums is factored, A = B C, and round t releases its clipped sum plus
row t of C^-1 Z, where Z has independent Gaussian rows: later rounds take back
part of the noise of earlier ones, so the prefix sums have B Z, less than with
independent noise at the same cost. All releases together are one Gaussian
release of C G + Z, G being the sums, and cost what its sensitivity over its
noise says: no sampling is assumed, only how often and how soon again one person
takes part. That the sums depend on earlier releases changes nothing.

C is lower triangular and Toeplitz, so it is its first column, which here never
ascends, is never negative, and begins with 1. `Banded` gives the first numbers
of it, `Buffered` (BLT) a sum of decays; either remembers few vectors.

Sources:
    Denisov et al., NeurIPS 2022 (theorem 2.1: adaptive sums), https://arxiv.org/abs/2202.08312;
    Choquette-Choo et al., NeurIPS 2023 (banded C, minimum separation), https://arxiv.org/abs/2306.08153;
    Dvijotham et al. 2024 (BLT), https://arxiv.org/abs/2404.16706; McMahan, Xu and Zhang 2024 (BLT with minimum
    separation), https://arxiv.org/abs/2408.08868.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.privacy.accountant import MatrixEvent
from hybrid.privacy.mechanisms import (
    Aggregation,
    AggregationState,
    Cohort,
    NoiseSource,
    Release,
    answered,
    check_release,
)

Vector = NDArray[np.float64]
Kind = Literal["independent", "banded", "blt"]

BANDS = 32  # at most, where nobody says how many
BUFFERS = 4


@dataclass(frozen=True)
class Participation:
    """How often one person takes part, at most.

    Attributes:
        rounds: n, the horizon; >= 1.
        separation: b: in any b rounds one after another a person takes part once at most; >= 1.

    Raises:
        ConfigError: an attribute is outside its range.
    """

    rounds: int
    separation: int

    def __post_init__(self) -> None:
        for name in ("rounds", "separation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")

    @property
    def most(self) -> int:
        """k: rounds in which one person takes part, at most: ceil(n / b)."""
        return -(-self.rounds // self.separation)


class Factor(Protocol):
    """C, and how rows of C^-1 Z are drawn one after another in bounded memory."""

    def column(self, rounds: int) -> Vector:
        """(rounds,) the first column of C: 1 at first, never ascending, never negative."""
        ...

    def buffers(self, size: int) -> Vector:
        """(memory, size) what the rows remember, before the first."""
        ...

    def draw(self, buffers: Vector, fresh: Vector) -> tuple[Vector, Vector]:
        """From a row of Z, (size,): the row of C^-1 Z, (size,), and the buffers after it."""
        ...


@dataclass(frozen=True)
class Banded:
    """A lower-triangular Toeplitz C with few diagonals.

    Attributes:
        coefficients: of the diagonals, the main one first: 1 at first, never ascending, never negative.

    Raises:
        ConfigError: the coefficients are not so.

    >>> halves = Banded((1.0, 0.5))
    >>> row, buffers = halves.draw(halves.buffers(1), np.array([8.0]))
    >>> halves.draw(buffers, np.array([0.0]))[0].tolist()
    [-4.0]
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        c = np.asarray(self.coefficients, dtype=np.float64)
        if c.ndim != 1 or not len(c) or c[0] != 1 or not (np.diff(c) <= 0).all() or not c[-1] >= 0:
            raise ConfigError(f"coefficients must begin with 1, never ascend and never be negative, got {c.tolist()}")

    def column(self, rounds: int) -> Vector:
        """See `Factor`."""
        column = np.zeros(rounds)
        used = min(rounds, len(self.coefficients))
        column[:used] = self.coefficients[:used]
        return column

    def buffers(self, size: int) -> Vector:
        """The last rows, the latest first."""
        return np.zeros((len(self.coefficients) - 1, size))

    def draw(self, buffers: Vector, fresh: Vector) -> tuple[Vector, Vector]:
        """See `Factor`: C times the rows is Z, so this row is Z's less the earlier rows' part."""
        row = fresh - np.asarray(self.coefficients[1:]) @ buffers
        return row, np.concatenate([row[None], buffers])[: len(buffers)]


@dataclass(frozen=True)
class Buffered:
    """A buffered linear Toeplitz C: its first column is 1, then sum_d scales[d] decays[d]^(t-1).

    Attributes:
        scales: omega, each >= 0, together at most 1.
        decays: theta, as many, each in [0, 1).

    Raises:
        ConfigError: scales or decays are not so.
    """

    scales: tuple[float, ...]
    decays: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = len(self.scales) == len(self.decays) and all(scale >= 0 for scale in self.scales)
        if not (fits and sum(self.scales) <= 1 and all(0 <= decay < 1 for decay in self.decays)):
            raise ConfigError(
                "scales must be >= 0 and at most 1 together, decays as many and in [0, 1), "
                f"got {self.scales!r} and {self.decays!r}"
            )

    def column(self, rounds: int) -> Vector:
        """See `Factor`."""
        return np.concatenate([[1.0], np.asarray(self.scales) @ self._powers(rounds - 1)])

    def buffers(self, size: int) -> Vector:
        """Decayed sums of the rows so far."""
        return np.zeros((len(self.scales), size))

    def draw(self, buffers: Vector, fresh: Vector) -> tuple[Vector, Vector]:
        """See `Factor`.

        Source:
            Dvijotham et al. 2024 (multiplication by a BLT in a stream), solved for the row.
        """
        row = fresh - np.asarray(self.scales) @ buffers
        return row, np.asarray(self.decays)[:, None] * buffers + row

    def _powers(self, count: int) -> Vector:
        """(buffers, count): decays to the power of 0, 1, ..."""
        return np.asarray(self.decays)[:, None] ** np.arange(count)


def sensitivity(factor: Factor, participation: Participation) -> float:
    """What one person moves C G by at most, in L2, where they move each of their sums by at most 1.

    The worst is to take part in rounds 1, 1 + b, 1 + 2b, ... with the same vector
    each time: then it is the norm of the sum of those columns. For a C with
    at most b diagonals these do not overlap, and it is sqrt(k) times one column's norm.

    Source:
        Kalinin and Lampert, NeurIPS 2024, theorem 2, whose condition (Toeplitz, never ascending, never
        negative) every `Factor` meets. https://arxiv.org/abs/2405.13763. That the same vector is worst, since
        no two columns have a negative product: Choquette-Choo et al., ICML 2023, section 2.
        https://arxiv.org/abs/2211.06530

    >>> sensitivity(Banded((1.0, 0.75)), Participation(rounds=8, separation=2))
    2.5
    """
    return float(np.linalg.norm(_participated(factor.column(participation.rounds), participation)))


class PrefixError(NamedTuple):
    """How far noise takes a coordinate of the prefix sums, at sensitivity 1 over noise 1 and clip 1.

    Attributes:
        mean: root of the mean over rounds of the expected square.
        worst: root of the largest, that of the last round.
    """

    mean: float
    worst: float


def prefix_error(factor: Factor, participation: Participation, momentum: float = 0.0) -> PrefixError:
    """What a factor leaves, at equal cost: less is better.

    Args:
        factor: C.
        participation: of people, and the horizon.
        momentum: of the server's SGD, in [0, 1): the sums are then of its steps.

    >>> independent = Banded((1.0,))
    >>> [round(error**2, 6) for error in prefix_error(independent, Participation(rounds=9, separation=3))]
    [15.0, 27.0]
    """
    rounds = participation.rounds
    left = _filtered(factor, _steps(rounds, momentum)) ** 2
    sens = sensitivity(factor, participation)
    return PrefixError(
        mean=sens * math.sqrt(float(left @ np.arange(rounds, 0, -1)) / rounds),
        worst=sens * math.sqrt(float(left.sum())),
    )


def banded(participation: Participation, bands: int, momentum: float = 0.0) -> Banded:
    """The C of so many diagonals whose mean `prefix_error` is least, from the square root of A on.

    Args:
        participation: of people, and the horizon.
        bands: diagonals, the main one among them; >= 1. More than the separation bring nothing.
        momentum: of the server's SGD, in [0, 1).

    Raises:
        ConfigError: an argument is outside its range.

    Source:
        Choquette-Choo et al., NeurIPS 2023 (banded, optimised), https://arxiv.org/abs/2306.08153; McKenna 2024
        (Toeplitz), https://arxiv.org/abs/2405.15913; Kalinin and Lampert, NeurIPS 2024 (the square root with
        momentum), https://arxiv.org/abs/2405.13763. Found by L-BFGS on the ratios of one coefficient to the last.
    """
    _check(momentum, bands=bands)
    bands = min(bands, participation.rounds)
    if bands == 1:
        return Banded((1.0,))
    start = np.clip(_root(bands, momentum)[1:] / _root(bands, momentum)[:-1], 0.0, 1.0)
    floor = 1e-6  # of the ratio of one coefficient to the one before: at 0 all later ones would have no slope

    def loss(ratios: Vector) -> tuple[float, Vector]:
        tail = np.cumprod(ratios)
        value, slope = _loss(Banded((1.0, *tail)), participation, momentum)
        return value, np.cumsum((slope[1:bands] * tail)[::-1])[::-1] / ratios

    found = _least(loss, np.maximum(start, floor), [(floor, 1.0)] * (bands - 1))
    return Banded((1.0, *np.cumprod(found).tolist()))


def buffered(participation: Participation, buffers: int, momentum: float = 0.0) -> Buffered:
    """The BLT of so many buffers whose mean `prefix_error` is least.

    Args:
        participation: of people, and the horizon.
        buffers: d, vectors that it remembers; >= 1. Four are nearly as good as any number.
        momentum: of the server's SGD, in [0, 1).

    Raises:
        ConfigError: an argument is outside its range.

    Source:
        McMahan, Xu and Zhang 2024, https://arxiv.org/abs/2408.08868. Found by L-BFGS on the logits of the decays
        and of the scales' shares of 1, so that every step meets the conditions.
    """
    _check(momentum, buffers=buffers)
    rounds = participation.rounds
    # Spread evenly between a memory of one round and one of the horizon, in the logarithm.
    reach = (rounds + 1.0) ** ((np.arange(buffers) + 0.5) / buffers)

    def of(parameters: Vector) -> tuple[Vector, Vector]:
        share = np.exp(parameters[:buffers] - parameters[:buffers].max(initial=0.0))
        rest = math.exp(-parameters[:buffers].max(initial=0.0))
        return share / (share.sum() + rest), 1.0 / (1.0 + np.exp(-parameters[buffers:]))

    def loss(parameters: Vector) -> tuple[float, Vector]:
        scales, decays = of(parameters)
        factor = _buffered(scales, decays)
        value, slope = _loss(factor, participation, momentum)
        later, powers = slope[1:], factor._powers(rounds - 1)
        by_scale = powers @ later
        by_decay = scales * (powers[:, : max(0, rounds - 2)] @ (np.arange(1, rounds - 1) * later[1:]))
        by_share = scales * (by_scale - scales @ by_scale)
        return value, np.concatenate([by_share, by_decay * decays * (1 - decays)])

    start = np.concatenate([np.full(buffers, -math.log(buffers)), np.log(np.maximum(reach - 1, 0.1))])
    found = _least(loss, start, [(-30.0, 30.0)] * buffers + [(-30.0, math.log(1e6 * rounds))] * buffers)
    return _buffered(*of(found))


@dataclass(frozen=True)
class Matrix:
    """A factor for a horizon and how people take part in it.

    Attributes:
        factor: C.
        participation: n and b.
        sensitivity: see `sensitivity`.
    """

    factor: Factor
    participation: Participation
    sensitivity: float

    def event(self, noise_multiplier: float) -> MatrixEvent:
        """What all its releases cost together; `noise_multiplier` as in `matrix_sum`."""
        people = self.participation
        return MatrixEvent(noise_multiplier, self.sensitivity, people.rounds, people.separation)


@lru_cache(maxsize=64)  # pure, and up to seconds of work
def optimised(kind: Kind, rounds: int, separation: int, *, memory: int | None = None, momentum: float = 0.0) -> Matrix:
    """The matrix mechanism that a training asks for.

    Args:
        kind: "independent": C is the identity: each round's noise is its own; "banded"; or "blt", `Buffered`.
        rounds: n.
        separation: b.
        memory: vectors between rounds: diagonals less 1, or buffers; None: separation - 1, or
            `BANDS` - 1 where that is less, and `BUFFERS`.
        momentum: of the server's SGD, in [0, 1).

    Raises:
        ConfigError: an argument is outside its range.
    """
    people = Participation(rounds, separation)
    factor: Factor
    if kind == "blt":
        factor = buffered(people, BUFFERS if memory is None else memory, momentum)
    else:
        bands = min(separation, BANDS) if memory is None else memory + 1
        factor = banded(people, 1 if kind == "independent" else bands, momentum)
    return Matrix(factor, people, sensitivity(factor, people))


@dataclass(frozen=True)
class MatrixState(AggregationState):
    """What a matrix mechanism carries from one round to the next.

    `round` counts the steps of the horizon that are used up. Unlike other states
    it is secret: who has the buffers can take noise out of what was released.

    Attributes:
        buffers: (memory, p) of the factor.
    """

    buffers: Vector


def matrix_sum(*, clip_norm: float, noise_multiplier: float, minimum: int, matrix: Matrix) -> Aggregation:
    """Builds the user-level matrix mechanism on sums of clipped updates.

    Each step of the horizon is released once. A round that is tried again is the
    next step, with noise of its own, and for those who took part in the attempt
    it was a participation. After the last step nothing more is released.

    Args:
        clip_norm: largest L2 norm of one flat update, in parameter units; finite, > 0.
        noise_multiplier: standard deviation of Z over `clip_norm`; finite, >= 0. What the releases cost
            together: `matrix.event(noise_multiplier)`.
        minimum: fewest people whose updates may be released together; >= 0.
        matrix: C, and the horizon. That people take part no oftener is for the caller to see to.

    Raises:
        ConfigError: a setting is outside the range above.
        BudgetExceeded: (from `step`) the horizon is used up. No noise was drawn.
        CohortTooSmall: (from `step`) fewer than `minimum` answered. No noise was drawn: the step is still to be used.
    """
    if not 0 < clip_norm < math.inf:
        raise ConfigError(f"clip_norm must be finite and > 0, got {clip_norm!r}")
    check_release(noise_multiplier, minimum)

    def init(size: int) -> MatrixState:
        return MatrixState(0, size, clip_norm, matrix.factor.buffers(size))

    def step(state: AggregationState, cohort: Cohort, noise: NoiseSource) -> tuple[AggregationState, Release]:
        assert isinstance(state, MatrixState)
        if state.round >= matrix.participation.rounds:
            raise BudgetExceeded(f"rounds must be at most the {state.round} that were reserved: no more is released")
        clipped = answered(state, cohort, minimum)
        fresh = noise.gaussian(state.size, sd=noise_multiplier * clip_norm)
        row, buffers = matrix.factor.draw(state.buffers, fresh)
        return replace(state, round=state.round + 1, buffers=buffers), Release(
            clipped.total + row, clipped.received, clip_norm
        )

    return Aggregation(init=init, step=step)


def _participated(column: Vector, participation: Participation) -> Vector:
    """(n,) the sum of the columns 1, 1 + b, 1 + 2b, ... of the matrix whose first column is given."""
    padded = np.pad(column, (0, participation.most * participation.separation - len(column)))
    summed = padded.reshape(participation.most, participation.separation).cumsum(axis=0)
    return np.asarray(summed.ravel()[: len(column)])


def _steps(rounds: int, momentum: float) -> Vector:
    """(rounds,) the first column of A: 1 + momentum + momentum^2 + ..."""
    return np.cumsum(momentum ** np.arange(rounds))


def _root(rounds: int, momentum: float) -> Vector:
    """(rounds,) the first column of A^(1/2): of 1 / sqrt((1 - x)(1 - momentum x)), as a power series."""
    odd = np.arange(1, rounds)
    series = np.cumprod(np.concatenate([[1.0], (2 * odd - 1) / (2 * odd)]))
    return np.convolve(series, series * momentum ** np.arange(rounds))[:rounds]


def _filtered(factor: Factor, column: Vector) -> Vector:
    """(n,) the first column of the Toeplitz matrix of `column` times C^-1."""
    from scipy.signal import lfilter

    if isinstance(factor, Buffered):  # C is P(x) / Q(x): Q = prod (1 - decay x), P = Q + x sum scale prod of the others
        others = [np.atleast_1d(np.poly(np.delete(factor.decays, place))) for place in range(len(factor.decays))]
        q = np.poly(factor.decays)
        p = q + np.concatenate([[0.0], np.asarray(factor.scales) @ np.stack(others)])
        return np.asarray(lfilter(q, p, column))
    assert isinstance(factor, Banded)
    return np.asarray(lfilter([1.0], factor.coefficients, column))


def _loss(factor: Factor, participation: Participation, momentum: float) -> tuple[float, Vector]:
    """The logarithm of the mean `prefix_error` squared, and its slope in each number of C's first column, (n,)."""
    from scipy.signal import correlate

    rounds, column = participation.rounds, factor.column(participation.rounds)
    left = _filtered(factor, _steps(rounds, momentum))
    weighted = left * np.arange(rounds, 0, -1)
    # left = A C^-1, so moving C's t-th number by h moves it by -h x^t A C^-2.
    by_error = -2.0 * correlate(weighted, _filtered(factor, left), method="fft")[rounds - 1 :]
    summed = _participated(column, participation)
    by_sensitivity = 2.0 * _participated_transposed(summed, participation)
    error, sens = float(left @ weighted), float(summed @ summed)
    return math.log(error / rounds) + math.log(sens), by_error / error + by_sensitivity / sens


def _participated_transposed(summed: Vector, participation: Participation) -> Vector:
    """(n,) the transpose of `_participated`."""
    padded = np.pad(summed, (0, participation.most * participation.separation - len(summed)))
    rows = padded.reshape(participation.most, participation.separation)
    return np.asarray(rows[::-1].cumsum(axis=0)[::-1].ravel()[: len(summed)])


def _least(loss: Callable[[Vector], tuple[float, Vector]], start: Vector, bounds: list[tuple[float, float]]) -> Vector:
    from scipy.optimize import minimize

    found: Any = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500})
    return np.asarray(found.x)


def _buffered(scales: Vector, decays: Vector) -> Buffered:
    """Rounding may have taken a sum or a decay to just above 1."""
    largest = np.nextafter(1.0, 0.0)
    return Buffered(
        tuple((scales / max(1.0, scales.sum() / largest)).tolist()), tuple(np.minimum(decays, largest).tolist())
    )


def _check(momentum: float, **counts: int) -> None:
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum must be in [0, 1) with matrix noise, got {momentum!r}")
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be at least 1, got {count!r}")
