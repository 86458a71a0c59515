"""What Gaussian releases cost: the exact Gaussian, PRV and RDP; pure functions.

Adjacency is zero-out: one person's whole contribution becomes zero, while the
number of people and the planned cohort stay. `sampling` below 1 claims
amplification by Poisson sampling: each person takes part in each release by an
independent coin, and who took part is not seen by those the claim is made to.
The pair of distributions is then that of adding or removing one person, which
opacus analyses. Its GDP accountant is never used: a central limit is no bound.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.privacy.mechanisms import gaussian_epsilon

RDP_ORDERS = [1.2, 1.5, *range(2, 65), 80, 96, 128, 192, 256, 384, 512, 768, 1024]
_PRV_MAX_EPSILON = 300.0  # above it a tight bound helps nobody, and the grid grows with it
_MOST_NOISE = 1e9  # over the sensitivity: as good as releasing nothing
_PRV_MAX_GRID = 1 << 23  # points; about a second and half a gigabyte


@dataclass(frozen=True)
class GaussianEvent:
    """Releases of a sum with Gaussian noise.

    Attributes:
        noise_multiplier: standard deviation of the noise over the L2 sensitivity; finite, >= 0.
        sampling: probability with which each person takes part in one release; 1: everybody does.
        count: how many such releases; >= 1.

    Raises:
        ConfigError: an attribute is outside its range.
    """

    noise_multiplier: float
    sampling: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(f"noise_multiplier must be finite and >= 0, got {self.noise_multiplier!r}")
        if not 0 < self.sampling <= 1:
            raise ConfigError(f"sampling must be in (0, 1], got {self.sampling!r}")
        if self.count < 1:
            raise ConfigError(f"count must be at least 1, got {self.count!r}")


@dataclass(frozen=True)
class MatrixEvent:
    """All releases of one matrix mechanism: sums of a fixed number of rounds, with correlated noise.

    They cost together as much as one Gaussian release, whatever was sampled; see
    `hybrid.privacy.matrix`. It holds for people who take part at most once in any
    `separation` rounds one after another.

    Attributes:
        noise_multiplier: standard deviation of the independent noise, before it is correlated, over what
            one person moves one sum by at most; finite, >= 0.
        sensitivity: of all rounds together, in L2, where one person moves each sum by at most 1; finite, > 0.
        rounds: the horizon; >= 1.
        separation: >= 1.

    Raises:
        ConfigError: an attribute is outside its range.
    """

    noise_multiplier: float
    sensitivity: float
    rounds: int
    separation: int

    def __post_init__(self) -> None:
        for name in ("rounds", "separation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 < self.sensitivity < math.inf:
            raise ConfigError(f"sensitivity must be finite and > 0, got {self.sensitivity!r}")
        assert self.gaussian.count == 1  # and its checks

    @property
    def gaussian(self) -> GaussianEvent:
        """The one release that costs as much."""
        return GaussianEvent(self.noise_multiplier / self.sensitivity)

    @property
    def participations(self) -> int:
        """In how many rounds one person takes part, at most."""
        return -(-self.rounds // self.separation)


Event = GaussianEvent | MatrixEvent


@dataclass(frozen=True)
class Spent:
    """What releases cost together.

    Attributes:
        epsilon: an upper bound, at the delta that was asked for; infinite without noise.
        method: of the analysis that gave the least bound.
    """

    epsilon: float
    method: str


def epsilon(events: Iterable[Event], delta: float) -> Spent:
    """Composes releases on one person: the least of the bounds that apply.

    Args:
        events: in any order; equal ones are added up.
        delta: in (0, 1).

    Returns:
        Exact where nothing is sampled. Else the least of RDP, PRV and the exact
        Gaussian that ignores sampling.

    Raises:
        ConfigError: delta is outside (0, 1).
    """
    _check_delta(delta)
    return _epsilon(tuple(_compose(events)), delta)


@lru_cache(maxsize=256)  # pure, and up to a second's work: a run asks when it reserves, and again when it has ended
def _epsilon(composed: tuple[GaussianEvent, ...], delta: float) -> Spent:
    if not composed:
        return Spent(0.0, "nothing released")
    unsampled = gaussian_epsilon(_mu(composed), delta)
    if unsampled == math.inf or all(event.sampling == 1 for event in composed):
        return Spent(unsampled, "exact Gaussian")
    bounds = {rdp_epsilon(composed, delta): "RDP", unsampled: "exact Gaussian, sampling not counted"}
    if min(bounds) <= _PRV_MAX_EPSILON:
        least = min(bounds)
        bounds[_prv_epsilon(composed, delta, error=max(min(0.01, least / 100), least / 1000))] = "PRV"
    return Spent(min(bounds), bounds[min(bounds)])


def noise_multiplier_for(
    epsilon_target: float, delta: float, sampling: float, rounds: int, *, besides: Iterable[Event] = ()
) -> float:
    """The least noise multiplier with which `rounds` releases stay within a budget.

    Args:
        epsilon_target: finite, > 0.
        delta: in (0, 1).
        sampling: Poisson sampling probability of each round, in (0, 1].
        rounds: how many releases; >= 1.
        besides: other releases on the same people, which the budget pays for too.

    Returns:
        At most 0.1 % too much noise, never too little: `epsilon` of the rounds and `besides`
        together is within the target. By the exact Gaussian where nothing is sampled.

    Raises:
        ConfigError: an argument is outside its range.
        BudgetExceeded: `besides` leave nothing of the budget, however much noise the rounds have.
    """
    return _noise_multiplier_for(epsilon_target, delta, sampling, rounds, tuple(_compose(besides)))


@lru_cache(maxsize=64)  # pure, and a second's work
def _noise_multiplier_for(
    epsilon_target: float, delta: float, sampling: float, rounds: int, besides: tuple[GaussianEvent, ...]
) -> float:
    _check_delta(delta)
    if not 0 < epsilon_target < math.inf:
        raise ConfigError(f"epsilon must be finite and > 0, got {epsilon_target!r}")

    def events(noise_multiplier: float) -> list[GaussianEvent]:
        return [GaussianEvent(noise_multiplier, sampling, rounds), *besides]

    def within(bound: float) -> bool:
        return bound <= epsilon_target

    def unsampled(noise_multiplier: float) -> float:
        return gaussian_epsilon(_mu(events(noise_multiplier)), delta)

    def total(noise_multiplier: float) -> float:
        return epsilon(events(noise_multiplier), delta).epsilon

    if besides and not within(total(_MOST_NOISE)):
        raise BudgetExceeded(
            f"epsilon is {epsilon_target:g} at delta {delta:g}; what is released besides the {rounds} rounds "
            f"costs {epsilon(besides, delta).epsilon:.4g} and leaves nothing for them"
        )
    # From the quickest bound to the tightest; each starts where the one before ended.
    enough = 1.0
    if within(unsampled(_MOST_NOISE)):
        enough = _least(lambda z: within(unsampled(z)), start=enough)
    if sampling < 1 or any(event.sampling < 1 for event in besides):
        if within(min(unsampled(_MOST_NOISE), rdp_epsilon(events(_MOST_NOISE), delta))):
            enough = _least(lambda z: within(min(unsampled(z), rdp_epsilon(events(z), delta))), start=enough)
        enough = _least(lambda z: within(total(z)), start=enough, factor=1.1)
    return enough


def rdp_epsilon(events: Iterable[GaussianEvent], delta: float) -> float:
    """The bound by Renyi differential privacy, the one that composes with any other mechanism's curve.

    Source:
        Mironov, Talwar and Zhang 2019, section 3.3, https://arxiv.org/abs/1908.10530; to (epsilon,
        delta) by Balle et al. 2020, theorem 21, https://arxiv.org/abs/1905.09982. Both by opacus.
    """
    from opacus.accountants.analysis.rdp import get_privacy_spent

    curve = sum(event.count * _rdp_curve(event.noise_multiplier, event.sampling) for event in events)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the first or last: the bound holds at any
        bound, _ = get_privacy_spent(orders=RDP_ORDERS, rdp=curve, delta=delta)
    return max(0.0, float(bound))


@lru_cache(maxsize=64)
def _rdp_curve(noise_multiplier: float, sampling: float) -> NDArray[np.float64]:
    """What one release costs at each of RDP_ORDERS."""
    from opacus.accountants.analysis.rdp import compute_rdp

    curve: NDArray[np.float64] = compute_rdp(q=sampling, noise_multiplier=noise_multiplier, steps=1, orders=RDP_ORDERS)
    return curve


def _prv_epsilon(events: Sequence[GaussianEvent], delta: float, error: float) -> float:
    """The upper bound by numerical composition of privacy loss; infinite where the grid would not hold it.

    As opacus's PRVAccountant, with its safe domain (remark 5.6) from our RDP
    orders, and one percent of delta set aside for the rounding of the FFT. A plain
    release among sampled ones is one with sampling 1: the analysis holds for
    any privacy loss.

    Source:
        Gopi, Lee and Wutschitz, NeurIPS 2021. https://arxiv.org/abs/2106.02848
    """
    from opacus.accountants.analysis import prv

    releases = sum(event.count for event in events)
    delta_error = delta / 1000
    reach = 3 + max(
        error,
        rdp_epsilon(events, delta_error / 4),
        *(rdp_epsilon([replace(event, count=1)], delta_error / (8 * releases)) for event in events),
    )
    mesh = error / math.sqrt(releases * math.log(12 / delta_error) / 2)
    points = 2 * reach / mesh
    if points > _PRV_MAX_GRID or points * 2**-53 > delta / 100:
        return math.inf
    try:
        with np.errstate(all="ignore"):  # the grid's ends overflow and carry no mass
            upper = _prv_upper(events, prv.Domain.create_aligned(-reach, reach, mesh), delta, delta_error, error)
    except (RuntimeError, ValueError):  # how opacus says that the grid is too coarse after all
        return math.inf
    return max(0.0, upper)


def _prv_upper(
    events: Sequence[GaussianEvent], domain: Any, delta: float, delta_error: float, epsilon_error: float
) -> float:
    from opacus.accountants.analysis import prv

    losses = [prv.PoissonSubsampledGaussianPRV(event.sampling, event.noise_multiplier) for event in events]
    discrete = [
        prv.discretize(prv.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max), domain) for loss in losses
    ]
    composed = prv.compose_heterogeneous(dprvs=discrete, num_self_compositions=[event.count for event in events])
    _, _, upper = composed.compute_epsilon(0.99 * delta, delta_error, epsilon_error)
    return float(upper) if math.isfinite(upper) else math.inf


def _compose(events: Iterable[Event]) -> list[GaussianEvent]:
    """Adds equal releases up, in one order: the same releases cost the same to the last bit."""
    counts: Counter[tuple[float, float]] = Counter()
    for each in events:
        event = each.gaussian if isinstance(each, MatrixEvent) else each
        counts[event.noise_multiplier, event.sampling] += event.count
    return [GaussianEvent(*kind, count) for kind, count in sorted(counts.items())]


def _mu(events: Sequence[GaussianEvent]) -> float:
    """Of the one Gaussian release that costs as much as all events, were nothing sampled."""
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    return math.hypot(*(math.sqrt(event.count) / event.noise_multiplier for event in events))


def _least(enough: Callable[[float], bool], start: float, factor: float = 2.0) -> float:
    """The least z > 0 that is enough, 0.1 % above it at most; `enough` holds from some z on."""
    high = start
    while not enough(high):
        high *= factor
    low = high / factor
    while enough(low):
        low, high = low / factor, low
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be in (0, 1), got {delta!r}")
