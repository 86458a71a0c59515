"""What a released device embedding gives away of each device feature, measured by attacks that know the tower.

`inversion` attacks people whom the attacker does not know with what it learned
from others, at a ladder of noise levels, and sets how often it is right against
always guessing the commonest value. Beside it stands what the noise costs in
AUC. All of it is an oracle: it needs people's true features, as only a
simulation has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.features import Float32
from hybrid.federation.engine import embed
from hybrid.federation.metrics import Difference
from hybrid.federation.population import Examples
from hybrid.network import Network
from hybrid.privacy.attacks import Knowledge, enumeration, search
from hybrid.privacy.mechanisms import SeededNoise, local_epsilon
from hybrid.privacy.profiles import Profiles, slots_of
from hybrid.privacy.released import RESAMPLES, Served, clip_for, released
from hybrid.privacy.trained_attack import trained
from hybrid.spec import Clear, Noised

SIGMAS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SEARCHED = 0.05  # sigma: where noise is larger, too many profiles fit for one to be climbed to
ASIDE = 0.2  # share of the people the attacker knows by whom it chooses its attack
FEWEST = 10  # people that the attacker must know
LEARNED = 1 << 16  # of their rows, at most so many
NEAR = 0.05  # of the prior: a gain that counts as none in `Report.hidden_from`
PRIOR, ENUMERATION, SEARCH, TRAINED = "prior", "enumeration", "search", "trained"
_ATTACKED, _CHOSEN, _RELEASED, _JUDGED = range(4)  # streams of the seed

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Recovered:
    """How well one feature is recovered at one noise level.

    Attributes:
        feature: its name.
        attack: the one that did best on the people set aside; `PRIOR` where none was better.
        recovery: share of the attacked rows in which it is right.
        prior: the same, of always guessing the commonest value among the people the attacker knows.
        gain: recovery - prior, with a 95 % interval under resampled people.
        by_attack: recovery of each attack, whether chosen or not.
    """

    feature: str
    attack: str
    recovery: float
    prior: float
    gain: Difference
    by_attack: Mapping[str, float]


@dataclass(frozen=True)
class Level:
    """One noise level.

    Attributes:
        sigma: standard deviation of the noise over the clip; 0: clear, and not clipped.
        epsilon: local, of one release at the model's delta; infinite where clear.
        declared: whether it is what the model declares.
        auc: on the attacked people, oracle.
        auc_cost: clear AUC minus this one, with a 95 % interval under resampled people.
        auc_shrunk: what it would be if the server drew what it is sent towards the mean first (`Served.shrunk`).
        recovered: by feature.
        whole: share of rows of which every feature is recovered.
    """

    sigma: float
    epsilon: float
    declared: bool
    auc: float
    auc_cost: Difference
    auc_shrunk: float
    recovered: Sequence[Recovered]
    whole: float

    @property
    def most(self) -> Recovered:
        """The feature that gains most over its prior."""
        return max(self.recovered, key=lambda found: found.gain.mean)

    def figures(self) -> dict[str, Any]:
        """See `Report.figures`."""
        return {
            "sigma": self.sigma,
            "epsilon": self.epsilon if self.sigma else None,
            "declared": self.declared,
            "auc": self.auc,
            "auc_cost": asdict(self.auc_cost),
            "auc_shrunk": self.auc_shrunk,
            "whole": self.whole,
            "largest_gain": self.most.gain.mean,
            "features": {found.feature: asdict(found) for found in self.recovered},
        }


@dataclass(frozen=True)
class Report:
    """What `inversion` found. Oracle, all of it.

    Attributes:
        clip: largest L2 norm of a noised embedding, see `hybrid.privacy.released.clip_for`.
        delta: of the local epsilons.
        known, attacked: how many people.
        rows: how many of the attacked people's rows were attacked.
        auc_without: AUC where nothing of the device is sent.
        levels: by ascending sigma.
    """

    clip: float
    delta: float
    known: int
    attacked: int
    rows: int
    auc_without: float
    levels: Sequence[Level] = field(repr=False)

    @property
    def clear(self) -> Level | None:
        """The level without noise, if it was asked for."""
        return next((level for level in self.levels if level.sigma == 0), None)

    @property
    def hidden_from(self) -> Level | None:
        """The least noise at which, and beyond which, no feature gains more than `NEAR`."""
        found = None
        for level in reversed(self.levels):
            if level.most.gain.mean > NEAR:
                break
            found = level
        return found

    def figures(self) -> dict[str, Any]:
        """All of it as JSON values; an epsilon is null where there is no noise."""
        hidden = self.hidden_from
        return {
            "oracle": True,
            **{name: getattr(self, name) for name in ("clip", "delta", "known", "attacked", "rows", "auc_without")},
            "hidden_from": hidden and hidden.sigma,
            "levels": [level.figures() for level in self.levels],
        }


def inversion(
    network: Network,
    attacked: Examples,
    known: Examples,
    *,
    sigmas: Sequence[float] = SIGMAS,
    rows: int = 1000,
    seed: int = 0,
    progress: Progress = lambda done, of: None,
) -> Report:
    """Attacks a version's device embeddings.

    Args:
        network: with the version's weights; put in evaluation mode.
        attacked: people whose embeddings are released; none of them is among `known`.
        known: people whose features the attacker has.
        sigmas: noise levels in units of the clip, >= 0; 0 is clear. What the model declares is added.
        rows: of the attacked people's, at most so many, drawn at random, are attacked. AUC is of all.
        seed: of all draws: the same gives the same.
        progress: called after each level with (levels done, of how many).

    Raises:
        ConfigError: a sigma is negative or not finite, or there are too few people.
    """
    from hybrid.federation.training import threads_for

    ladder, declared = _ladder(network.model.release, sigmas)
    _check(attacked, known)
    for part in network.parts.values():
        part.eval()
    clip = clip_for(network, known)
    people, served = _People.of(network, attacked, known, rows, seed), Served.of(network, attacked, known, clip)
    levels = []
    for number, sigma in enumerate(ladder):
        with threads_for(network):
            recovered, whole = _attack(network, people, clip, sigma, seed + number)
        noised = released(served.device, clip, sigma, SeededNoise(seed, _RELEASED, number))
        level = Level(
            sigma=sigma,
            epsilon=local_epsilon(sigma, network.model.privacy.delta) if sigma else math.inf,
            declared=sigma == declared,
            auc=served.auc(noised),
            auc_cost=served.cost(noised),
            auc_shrunk=served.auc(served.shrunk(noised, sigma * clip)),
            recovered=recovered,
            whole=whole,
        )
        levels.append(level)
        progress(number + 1, len(ladder))
    return Report(
        clip=clip,
        delta=network.model.privacy.delta,
        known=known.users,
        attacked=attacked.users,
        rows=len(people.user),
        auc_without=served.auc_without(),
        levels=tuple(levels),
    )


def _ladder(release: Clear | Noised | None, sigmas: Sequence[float]) -> tuple[list[float], float | None]:
    """All noise levels, ascending, and which of them is declared: none where the device merges."""
    for sigma in sigmas:
        if not 0 <= sigma < math.inf:
            raise ConfigError(f"sigma must be finite and >= 0 (0: clear), got {sigma!r}")
    declared = release.sigma if isinstance(release, Noised) else 0.0 if release else None
    return sorted({*map(float, sigmas), *([] if declared is None else [declared])}), declared


def _check(attacked: Examples, known: Examples) -> None:
    if known.users < FEWEST:
        raise ConfigError(f"the attacker must know at least {FEWEST} people, got {known.users}")
    if len(np.unique(attacked.labels)) < 2:
        raise ConfigError(f"attacked people must have rows of both labels, for an AUC; got {len(attacked)} rows of one")


@dataclass(frozen=True)
class _People:
    """Whose features are known, and whose are guessed.

    Attributes:
        profiles: what can be guessed, from what the attacker knows.
        learned: (n, features) slots that attacks learn from.
        aside: (m, features) of other known people, by whom the attack is chosen.
        truth, user: (k, features) of the attacked, and (k,) whose row it is.
    """

    profiles: Profiles
    learned: Float32
    aside: Float32
    truth: Float32
    user: NDArray[np.int64]

    @classmethod
    def of(cls, network: Network, attacked: Examples, known: Examples, rows: int, seed: int) -> _People:
        features = network.model.device_features
        rng = np.random.default_rng([seed, _CHOSEN])
        chosen = rng.permutation(known.users) < max(1, round(ASIDE * known.users))
        aside = chosen[known.user_of_row]
        some = np.sort(rng.permutation(len(attacked))[:rows])
        learned = slots_of(features, known.device[rng.permutation(np.flatnonzero(~aside))[:LEARNED]])
        judged = rng.permutation(np.flatnonzero(aside))[: rows // 2]
        return cls(
            profiles=Profiles.of(features, learned),
            learned=learned,
            aside=slots_of(features, known.device[judged]),
            truth=slots_of(features, attacked.device[some]),
            user=attacked.user_of_row[some],
        )


def _attack(
    network: Network, people: _People, clip: float, sigma: float, seed: int
) -> tuple[tuple[Recovered, ...], float]:
    """Every feature at one noise level, and the share of rows of which all are right."""
    profiles, tower = people.profiles, network.device_tower
    knows = Knowledge(tower, profiles, people.learned, people.aside, clip if sigma else None, sigma * clip)
    attacks = {ENUMERATION: enumeration(knows), TRAINED: trained(knows, seed=seed)}
    if sigma <= SEARCHED and not profiles.few:
        attacks[SEARCH] = search(knows)
    common = profiles.commonest(people.learned)

    def right(slots: Float32, stream: int) -> dict[str, NDArray[np.bool_]]:
        embedding = embed(tower, profiles.features.encode(slots)).numpy()
        seen = torch.from_numpy(released(embedding, clip, sigma, SeededNoise(seed, stream)))
        found = {name: profiles.right(attack(seen), slots) for name, attack in attacks.items()}
        return {PRIOR: profiles.right(np.broadcast_to(common, slots.shape), slots), **found}

    chosen = _chosen(right(people.aside, _JUDGED))
    found = right(people.truth, _ATTACKED)
    hits = np.stack([found[name][:, f] for f, name in enumerate(chosen)], axis=1)
    gains = _gains(hits, found[PRIOR], people.user, seed)
    recovered = tuple(
        Recovered(
            feature=values.name,
            attack=chosen[f],
            recovery=float(hits[:, f].mean()),
            prior=float(found[PRIOR][:, f].mean()),
            gain=gains[f],
            by_attack={name: float(found[name][:, f].mean()) for name in attacks},
        )
        for f, values in enumerate(profiles.values)
    )
    return recovered, float(hits.all(axis=1).mean())


def _chosen(judged: Mapping[str, NDArray[np.bool_]]) -> list[str]:
    """For each feature the attack that is right most often; `PRIOR` where none is oftener than it."""
    return [max(judged, key=lambda name: judged[name][:, f].sum()) for f in range(judged[PRIOR].shape[1])]


def _gains(hits: NDArray[np.bool_], prior: NDArray[np.bool_], user: NDArray[np.int64], seed: int) -> list[Difference]:
    """Of each feature, hits minus the prior's, with a percentile interval: people are drawn with their rows."""
    better = hits.astype(np.float64) - prior
    _, person = np.unique(user, return_inverse=True)
    people = int(person.max()) + 1
    sums = np.zeros((people, better.shape[1]))
    np.add.at(sums, person, better)
    times = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), size=RESAMPLES)
    drawn = (times @ sums) / (times @ np.bincount(person))[:, None]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [Difference(*map(float, one)) for one in zip(better.mean(axis=0), low, high, strict=True)]
