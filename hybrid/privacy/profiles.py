"""What a device tower can be asked: profiles, each a choice of one value of every device feature.

An attacker who holds the tower knows the declaration too: vocabularies, edges,
constants. Which numbers a numeric feature takes, and how often people have which
value, it learns from people whom it knows. A profile is a row of *codes*, places
in the lists of values; a code's value is a slot (`hybrid.features`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid.features import Bucketize, Categorical, Features, Float32, Transform

TOLERANCE = 0.1  # of a number, in declared standard deviations: a guess that is nearer than this is right
DISTINCT = 64  # numbers of a feature that are listed one by one; more become a grid
CELLS = 256  # of a grid at most
FEW = 1 << 16  # profiles that are enumerated
UNSEEN = 1e-6  # share that stands for that of a value which no known person has

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Values:
    """The values that one feature can have.

    Attributes:
        name: of the feature.
        transform: its own.
        slots: (k,) float32, ascending and distinct; a missing number, NaN, is the last.
        grid: whether they stand for a range of numbers, rather than being all that there are.
    """

    name: str
    transform: Transform
    slots: Float32 = field(repr=False)
    grid: bool = False

    @classmethod
    def of(cls, name: str, transform: Transform, known: Float32) -> Values:
        """What is declared, and what is seen.

        Args:
            name: of the feature.
            transform: its own. Words of a vocabulary and buckets are values whether seen or not.
            known: (n,) slots of known people.
        """
        seen = np.unique(known)  # one NaN, the last
        if transform.cardinality:
            return cls(name, transform, np.union1d(np.arange(_declared(transform), dtype=np.float32), seen))
        numbers = seen[~np.isnan(seen)]
        if len(numbers) <= DISTINCT:
            return cls(name, transform, seen)
        low, high = float(numbers[0]), float(numbers[-1])
        cells = min(CELLS, int(np.ceil((high - low) / (2 * TOLERANCE))) + 1)  # no number is further than TOLERANCE
        grid = np.linspace(low, high, cells, dtype=np.float32)
        return cls(name, transform, np.concatenate([grid, seen[np.isnan(seen)]]), grid=True)

    def __len__(self) -> int:
        return len(self.slots)

    def codes(self, slots: Float32) -> Codes:
        """(n,) slots -> (n,) places of the nearest values; a missing number's, where there is none, is 0."""
        numbers = self.slots[~np.isnan(self.slots)]
        codes = np.zeros(len(slots), np.int64)
        if len(numbers) > 1:
            codes = np.searchsorted((numbers[1:] + numbers[:-1]) / 2, np.nan_to_num(slots), side="left")
        return np.where(np.isnan(slots) & (len(numbers) < len(self)), len(numbers), codes)

    def right(self, guess: Float32, truth: Float32) -> NDArray[np.bool_]:
        """Whether guessed slots are the true ones: the same index, a number within `TOLERANCE`, or both missing."""
        near = TOLERANCE * (1 + 1e-5) if not self.transform.cardinality else 0.0
        with np.errstate(invalid="ignore"):
            same: NDArray[np.bool_] = (np.abs(guess - truth) <= near) | (np.isnan(guess) & np.isnan(truth))
        return same


def _declared(transform: Transform) -> int:
    """Indices that are values by declaration: none of a hash, whose texts must be seen to be known."""
    if isinstance(transform, Categorical):
        return len(transform.vocabulary)
    return len(transform.edges) + 1 if isinstance(transform, Bucketize) else 0


@dataclass(frozen=True)
class Profiles:
    """All profiles that can be guessed.

    Attributes:
        features: of the device.
        values: of each feature, in the order of the slots.
        shares: of each feature, (k,) of the known people's rows that have each value; they add up to 1.
    """

    features: Features
    values: Sequence[Values]
    shares: Sequence[NDArray[np.float64]] = field(repr=False)

    @classmethod
    def of(cls, features: Features, known: Float32) -> Profiles:
        """From the declaration and the rows of known people.

        Args:
            features: of the device.
            known: (n, features) slots; at least one row.
        """
        every = zip(features.transforms.items(), known.T, strict=True)
        values = [Values.of(name, transform, column) for (name, transform), column in every]
        shares = [np.bincount(v.codes(c), minlength=len(v)) / len(c) for v, c in zip(values, known.T, strict=True)]
        return cls(features, values, shares)

    @property
    def sizes(self) -> list[int]:
        """How many values each feature has."""
        return [len(values) for values in self.values]

    @property
    def starts(self) -> list[int]:
        """Where each feature's values begin, were all features' values in one list."""
        return [int(end) for end in np.cumsum([0, *self.sizes[:-1]])]

    @property
    def few(self) -> bool:
        """Whether all of them can be enumerated."""
        return math.prod(self.sizes) <= FEW

    def codes(self, slots: Float32) -> Codes:
        """(n, features) slots -> codes of the nearest profiles."""
        return np.stack([v.codes(column) for v, column in zip(self.values, slots.T, strict=True)], axis=1)

    def slots(self, codes: Codes) -> Float32:
        """(n, features) codes -> the values themselves."""
        return np.stack([v.slots[column] for v, column in zip(self.values, codes.T, strict=True)], axis=1)

    def right(self, guess: Float32, truth: Float32) -> NDArray[np.bool_]:
        """(n, features): which guessed slots are the true ones."""
        parts = zip(self.values, guess.T, truth.T, strict=True)
        return np.stack([v.right(guessed, true) for v, guessed, true in parts], axis=1)

    def everything(self) -> Codes:
        """(product of sizes, features): every profile there is."""
        return np.stack(np.meshgrid(*map(np.arange, self.sizes), indexing="ij"), axis=-1).reshape(-1, len(self.values))

    def log_shares(self, codes: Codes) -> NDArray[np.float64]:
        """(..., features) codes -> (...) logarithm of how likely the profiles are, were features independent.

        A value that no known person has counts as `UNSEEN`.
        """
        each = [np.log(np.maximum(share, UNSEEN))[codes[..., f]] for f, share in enumerate(self.shares)]
        return np.asarray(np.sum(each, axis=0))

    def encoder(self) -> Encode:
        """What turns codes into the tower's input."""
        return Encode([torch.from_numpy(v.transform.encode(v.slots)) for v in self.values])

    def commonest(self, slots: Float32) -> Float32:
        """(features,) the best constant guess about the rows of `slots`: of each feature the value that most have.

        Of numbers: that most have within `TOLERANCE`.
        """
        guesses = []
        for values, column in zip(self.values, slots.T, strict=True):
            distinct, counts = np.unique(column, return_counts=True)
            hits = values.right(values.slots[:, None], distinct[None, :]) @ counts
            guesses.append(values.slots[hits.argmax()])
        return np.array(guesses, np.float32)


@dataclass(frozen=True)
class Encode:
    """Codes -> the tower's input, by a table for each feature.

    Attributes:
        tables: of each feature, (k, width) encoded values.
    """

    tables: Sequence[Tensor]

    def __call__(self, codes: Codes) -> Tensor:
        """(n, features) -> (n, width) float32."""
        columns = torch.from_numpy(np.ascontiguousarray(codes.T))
        return torch.cat([table[column] for table, column in zip(self.tables, columns, strict=True)], dim=1)


def slots_of(features: Features, encoded: Float32) -> Float32:
    """(n, width) as a tower reads it -> (n, features) slots: the inverse of `Features.encode`."""
    ends = np.cumsum([0, *(transform.width for transform in features.transforms.values())]).tolist()
    columns = []
    for transform, (begin, end) in zip(features.transforms.values(), pairwise(ends), strict=True):
        part = encoded[:, begin:end]
        if transform.cardinality:
            columns.append(part.argmax(axis=1).astype(np.float32))
        else:
            columns.append(np.where(part[:, 1] > 0, np.float32(np.nan), part[:, 0]))
    return np.stack(columns, axis=1)
