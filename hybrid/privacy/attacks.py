"""Attacks that enumerate: what would the tower have released for this profile, and how well does that fit?

An attack guesses a person's features from one released embedding. It knows the
device tower, the clip and the noise's standard deviation, and the features of
some other people, never of those whom it attacks. `trained_attack` has one that
learns the way back instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid.features import Float32
from hybrid.privacy.profiles import FEW, UNSEEN, Codes, Encode, Profiles

Attack = Callable[[Tensor], Float32]
"""(n, d) released embeddings -> (n, features) guessed slots."""

INDEPENDENT = 0.1  # share of the prior that takes features for independent, where all profiles are enumerated
ROWS_A_BLOCK = 128  # of releases that are compared with all candidates at once
CELLS_A_SEARCH = 1 << 22  # of encoded profiles at once, 16 MiB
BEAM, SWEEPS = 16, 12
WIDER = 4  # times the beam, for clear embeddings that no profile found so far has
EXACT = 1e-9  # squared distance of embeddings that are the same but for rounding


@dataclass(frozen=True)
class Knowledge:
    """What an attacker knows.

    Attributes:
        tower: (n, width) encoded -> (n, d) embedding, in evaluation mode.
        profiles: what can be guessed.
        slots: (n, features) of people it knows; it holds none of those whom it attacks.
        aside: (m, features) of other people it knows, by whom it judges what it learns.
        clip: largest L2 norm of a released embedding before noise; None: not clipped.
        sd: standard deviation of the noise in each coordinate; 0: none.
    """

    tower: Callable[[Tensor], Tensor]
    profiles: Profiles
    slots: Float32 = field(repr=False)
    aside: Float32 = field(repr=False)
    clip: float | None
    sd: float

    def released(self, slots: Float32) -> Tensor:
        """(n, features) slots -> (n, d), as released but for the noise."""
        return self.embeddings(torch.from_numpy(self.profiles.features.encode(slots)))

    def embeddings(self, encoded: Tensor) -> Tensor:
        """(n, width) encoded -> (n, d), as released but for the noise."""
        with torch.no_grad():
            embedding = self.tower(encoded)
            if self.clip is None:
                return embedding
            return embedding * torch.clamp(self.clip / embedding.norm(dim=1, keepdim=True).clamp(min=1e-30), max=1.0)


def enumeration(knows: Knowledge) -> Attack:
    """Guesses each feature's most likely value, given all candidate profiles.

    Of a release z the posterior weight of a profile x with embedding e(x) is
    proportional to prior(x) exp(-|z - e(x)|^2 / 2 sd^2), and that of a feature's
    value the sum over the profiles that have it. Without noise the nearest
    embedding has all the weight. Candidates are all profiles, if they are few
    (`Profiles.few`), else the ones that known people have,
    the commonest if those are more.
    """
    candidates = _Candidates.of(knows)

    def attack(released: Tensor) -> Float32:
        parts = [candidates.marginals(part, knows.sd) for part in torch.split(released, ROWS_A_BLOCK)]
        return _likeliest(knows.profiles, torch.cat(parts).numpy())

    return attack


def posterior(distances: Tensor, log_prior: Tensor, sd: float) -> Tensor:
    """(n, m) how likely each of m candidates is, given n releases.

    Args:
        distances: (n, m) squared, between releases and the candidates' embeddings.
        log_prior: (m,) or (n, m).
        sd: of the noise in each coordinate; 0: the nearest has all the weight, the likeliest of equally near ones.
    """
    if sd > 0:
        return torch.softmax(log_prior - distances / (2 * sd**2), dim=1)
    near = distances <= distances.amin(dim=1, keepdim=True) + EXACT
    return torch.softmax(torch.where(near, log_prior, -torch.inf), dim=1)


@dataclass(frozen=True)
class _Candidates:
    """Profiles with a prior, embedded once.

    Attributes:
        codes: (m, features).
        log_prior: (m,).
        embeddings: (m, d).
        members: (m, all features' values) 1 where the profile has the value.
    """

    codes: Codes
    log_prior: Tensor
    embeddings: Tensor
    members: Tensor

    @classmethod
    def of(cls, knows: Knowledge) -> _Candidates:
        profiles = knows.profiles
        seen, counts = np.unique(profiles.codes(knows.slots), axis=0, return_counts=True)
        commonest = np.argsort(-counts, kind="stable")[:FEW]
        seen, prior = seen[commonest], counts[commonest] / counts[commonest].sum()
        if profiles.few:
            place = np.ravel_multi_index(tuple(seen.T), profiles.sizes)
            seen = profiles.everything()
            independent = np.exp(profiles.log_shares(seen))
            empirical = np.bincount(place, weights=prior, minlength=len(seen))
            prior = INDEPENDENT * independent / independent.sum() + (1 - INDEPENDENT) * empirical
        members = np.concatenate(
            [np.eye(k, dtype=np.float32)[seen[:, f]] for f, k in enumerate(profiles.sizes)], axis=1
        )
        embeddings = knows.embeddings(profiles.encoder()(seen))
        return cls(seen, torch.from_numpy(np.log(prior)).float(), embeddings, torch.from_numpy(members))

    def distances(self, released: Tensor) -> Tensor:
        """(n, m) squared."""
        return torch.cdist(released, self.embeddings, compute_mode="donot_use_mm_for_euclid_dist").square()

    def marginals(self, released: Tensor, sd: float) -> Tensor:
        """(n, all features' values)."""
        return posterior(self.distances(released), self.log_prior, sd) @ self.members


def _likeliest(profiles: Profiles, marginals: Float32) -> Float32:
    """(n, all features' values) how likely each is -> (n, features) slots of the likeliest."""
    parts = np.split(marginals, profiles.starts[1:], axis=1)
    return profiles.slots(np.stack([part.argmax(axis=1) for part in parts], axis=1))


def search(knows: Knowledge, *, beam: int = BEAM, sweeps: int = SWEEPS) -> Attack:
    """Enumerates profiles that nobody known has: from the likeliest known ones, changing one value at a time.

    A beam of profiles is kept for each release. A sweep tries every change of
    one value in each and keeps the likeliest, until none is better. Features
    are taken for independent. The guess is each feature's most likely value
    among all profiles of the last sweep; without noise, that of the nearest,
    and where that does not have the very embedding, a wider beam tries again.
    """
    candidates, steps = _Candidates.of(knows), _Steps.of(knows)

    def climbed(released: Tensor, beam: int) -> Float32:
        parts = []
        for part in torch.split(released, max(1, CELLS_A_SEARCH // (beam * steps.put.numel()))):
            fit = candidates.log_prior * (knows.sd > 0) - candidates.distances(part) / (2 * steps.sd**2)
            first = fit.topk(min(beam, len(candidates.codes)), dim=1).indices
            parts.append(steps.climb(part, candidates.codes[first.numpy()], beam, sweeps))
        return _likeliest(knows.profiles, np.concatenate(parts))

    def attack(released: Tensor) -> Float32:
        guess = climbed(released, beam)
        if knows.sd == 0:
            stuck = (knows.released(guess) - released).square().sum(dim=1) > EXACT
            if stuck.any():
                guess[stuck.numpy()] = climbed(released[stuck], WIDER * beam)
        return guess

    return attack


@dataclass(frozen=True)
class _Steps:
    """Every change of one value, j in all, and what a beam of b profiles becomes by them.

    Attributes:
        knows: the attacker.
        encode: its profiles' encoder.
        feature, value: (j,) of each change.
        marks: (j,) random; a profile's is the sum of its values', by which repeats are told.
        logs: (j,) logarithm of the value's share; 0 without noise, where the prior has no say.
        kept: (j, width) 1 in the columns that a change leaves.
        put: (j, width) what it puts in the others.
        sd: of the noise, or of as good as none.
    """

    knows: Knowledge
    encode: Encode
    feature: Codes
    value: Codes
    marks: Codes
    logs: Float32
    kept: Tensor
    put: Tensor
    sd: float

    @classmethod
    def of(cls, knows: Knowledge) -> _Steps:
        sizes, encode = knows.profiles.sizes, knows.profiles.encoder()
        feature = np.repeat(np.arange(len(sizes)), sizes)
        value = np.concatenate([np.arange(size) for size in sizes])
        marks = np.random.default_rng(0).integers(-(2**62), 2**62, size=len(feature))  # sums may wrap
        logs = np.log(np.maximum(np.concatenate(knows.profiles.shares), UNSEEN)) * (knows.sd > 0)
        put, changed = (
            _block_diagonal(tables) for tables in (encode.tables, list(map(torch.ones_like, encode.tables)))
        )
        return cls(knows, encode, feature, value, marks, logs.astype(np.float32), 1 - changed, put, knows.sd or 1e-5)

    def climb(self, released: Tensor, beams: Codes, beam: int, sweeps: int) -> Float32:
        """(n, d) and (n, b, features) beams to start from -> (n, j) how likely each value is."""
        found = np.zeros((len(released), len(self.feature)), np.float32)
        going, before = np.arange(len(released)), np.full(len(released), -np.inf)
        for _ in range(sweeps):
            fit = self._fit(released[torch.from_numpy(going)], beams)
            found[going] = self._marginals(beams, fit)
            flat = fit.reshape(len(fit), -1)
            best = np.argpartition(-flat, min(beam, flat.shape[1]) - 1, axis=1)[:, :beam]
            beams = self._changed(beams, best)
            kept = np.take_along_axis(flat, best, axis=1)
            total = np.where(np.isfinite(kept), kept, 0.0).sum(axis=1)
            solved = (kept.max(axis=1) >= -EXACT / (2 * self.sd**2)) & (self.knows.sd == 0)
            on = (total != before) & ~solved
            if not on.any():
                break
            going, beams, before = going[on], beams[on], total[on]
        return found

    def _fit(self, released: Tensor, beams: Codes) -> Float32:
        """(n, b, j) log-posterior of every change of every profile; -inf where it was there before."""
        at = beams + np.array(self.knows.profiles.starts)
        marks = self.marks[at].sum(axis=2)[:, :, None] - self.marks[at][:, :, self.feature] + self.marks
        fit: Float32 = self.logs[at].sum(axis=2)[:, :, None] - self.logs[at][:, :, self.feature] + self.logs
        fresh = _first_of_each(marks.reshape(len(beams), -1)).reshape(marks.shape)
        row, profile, change = map(torch.from_numpy, np.nonzero(fresh))
        encoded = self.encode(beams.reshape(-1, beams.shape[2]))[row * beams.shape[1] + profile]
        embedded = self.knows.embeddings(torch.addcmul(self.put[change], encoded, self.kept[change]))
        fit[fresh] -= (embedded - released[row]).square().sum(dim=1).numpy() / (2 * self.sd**2)
        fit[~fresh] = -np.inf
        return fit

    def _changed(self, beams: Codes, best: Codes) -> Codes:
        """(n, b, features) and (n, k) places of changes in (b, j) -> (n, k, features)."""
        profile, change = np.divmod(best, len(self.feature))
        changed = np.take_along_axis(beams, profile[:, :, None], axis=1)
        np.put_along_axis(changed, self.feature[change][:, :, None], self.value[change][:, :, None], axis=2)
        return changed

    def _marginals(self, beams: Codes, fit: Float32) -> Float32:
        """(n, b, features), and (n, b, j) log-posterior of all changes -> (n, j) how likely each value is.

        A change of feature f has the value it puts there, and all others of its profile.
        """
        weight = np.exp(fit - fit.max(axis=(1, 2), keepdims=True))
        starts = np.array(self.knows.profiles.starts)
        others = weight.sum(axis=2, keepdims=True) - np.add.reduceat(weight, starts, axis=2)
        place = beams + starts + len(self.feature) * np.arange(len(beams))[:, None, None]
        size = len(beams) * len(self.feature)
        left = np.bincount(place.ravel(), weights=others.ravel(), minlength=size).reshape(len(beams), -1)
        return np.asarray(weight.sum(axis=1) + left, np.float32)


def _block_diagonal(parts: Sequence[Tensor]) -> Tensor:
    whole: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return whole


def _first_of_each(marks: Codes) -> NDArray[np.bool_]:
    """(n, m) -> where a row holds a number for the first time."""
    order = np.argsort(marks, axis=1, kind="stable")
    ordered = np.take_along_axis(marks, order, axis=1)
    fresh = np.concatenate([np.ones((len(marks), 1), np.bool_), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    first = np.empty_like(fresh)
    np.put_along_axis(first, order, fresh, axis=1)
    return first
