"""What one user does in a round, and which of its rows it takes in each step: as columns, for many users at once.

A simulation and a device go through the same schedule: with the same generator, one user's is the same on both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.spec import Training


@dataclass(frozen=True)
class LocalTraining:
    """Gradient descent on the mean loss of a user's examples, from the weights of the round.

    A user's rows are put in an order drawn anew each round and cut into batches,
    the last of which may be shorter; steps take them in turn, again and again.

    Attributes:
        steps: of every user; None where `epochs` says how often each row is taken.
        lr: learning rate.
        epochs: so many times all batches, so that users with more rows take more steps.
        batch: rows of a step; None: all of the user's.
        proximal: mu of a term mu / 2 |w - w0|^2 that holds each user near where it started; >= 0.
        keep: probabilities with which an example with the label 0, and one with the label 1, is taken in a
            participation, by a coin of its own that is tossed anew each time; each in (0, 1]. None: all are.

    Raises:
        ConfigError: an attribute is outside its range.

    Source:
        McMahan et al., AISTATS 2017, Algorithm 1, https://arxiv.org/abs/1602.05629; the proximal term:
        Li et al., MLSys 2020, section 3, https://arxiv.org/abs/1812.06127.
    """

    steps: int | None
    lr: float
    epochs: int | None = None
    batch: int | None = None
    proximal: float = 0.0
    keep: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"one of steps and epochs must be given, got {self.steps!r} and {self.epochs!r}")
        for name in ("steps", "epochs", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr must be finite and > 0, got {self.lr!r}")
        if not 0 <= self.proximal < math.inf:
            raise ConfigError(f"proximal must be finite and >= 0, got {self.proximal!r}")
        if self.lr * self.proximal > 1:
            raise ConfigError(f"lr x proximal must be at most 1, else it overshoots, got {self.lr * self.proximal!r}")
        if self.keep is not None and not all(0 < share <= 1 for share in self.keep):
            raise ConfigError(f"keep must be two probabilities in (0, 1], got {self.keep!r}")

    @classmethod
    def of(cls, settings: Training, keep: tuple[float, float] | None = None) -> LocalTraining:
        """What a training's settings say of it, with what was made of its label balance."""
        epochs = settings.local_epochs
        return cls(
            steps=settings.local_steps if epochs is None else None,
            lr=settings.local_lr,
            epochs=epochs,
            batch=settings.local_batch,
            proximal=settings.proximal,
            keep=keep,
        )

    def kept(self, labels: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Which examples are taken in this participation: drawn before anything else.

        Args:
            labels: (n,) 0 or 1, one user's after another's.
            rng: draws once a row, where there is something to draw.
        """
        if self.keep is None:
            return np.ones(len(labels), np.bool_)
        return rng.random(len(labels)) < np.where(labels > 0, self.keep[1], self.keep[0])

    def steps_of(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """(k,) rows of each user -> (k,) steps it takes; none without rows."""
        if self.epochs is None:
            return np.where(counts > 0, self.steps or 0, 0)
        batch = self.batch or max(1, int(counts.max(initial=1)))
        return self.epochs * -(-counts // batch)

    def schedule(self, counts: NDArray[np.int64], rng: np.random.Generator) -> Schedule:
        """Which rows each user takes in each step.

        Args:
            counts: (k,) rows of each user, each at least 1; the caller groups alike users, since all are padded.
            rng: draws the order of rows, where there is more than one batch.
        """
        most, steps = int(counts.max()), self.steps_of(counts)
        if self.batch is None or self.batch >= most:
            every = np.arange(most)
            real = every < counts[:, None]
            weight = real / counts[:, None].astype(np.float32)
            return Schedule(np.where(real, every, 0)[:, None], weight.astype(np.float32)[:, None], steps)
        order = np.argsort(np.where(np.arange(most) < counts[:, None], rng.random((len(counts), most)), np.inf), axis=1)
        batches = -(-counts // self.batch)
        begin = self.batch * (np.arange(steps.max()) % batches[:, None])
        within = begin[:, :, None] + np.arange(self.batch)
        real = (within < counts[:, None, None]) & (np.arange(steps.max()) < steps[:, None])[:, :, None]
        rows = np.where(real, np.take_along_axis(order[:, None], np.minimum(within, most - 1), axis=2), 0)
        return Schedule(rows, (real / np.maximum(1, real.sum(2, keepdims=True))).astype(np.float32), steps)


@dataclass(frozen=True)
class Schedule:
    """The rows of every step of some users.

    Attributes:
        place: (k, s, m) of a user's own rows, from 0; s is 1 where every step takes the same ones. Padding
            repeats the user's own first row: another's would reach the update where it overflows, as 0 x infinity.
        weight: (k, s, m) float32 of each row in its step's loss: 1 / rows, 0 where it is padding.
        steps: (k,) that each user takes.
    """

    place: NDArray[np.int64] = field(repr=False)
    weight: NDArray[np.float32] = field(repr=False)
    steps: NDArray[np.int64] = field(repr=False)


def missing_sides(shape: tuple[int, ...], share: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Which side each row of each step trains without: the server's, the device's, or neither; never both.

    Args:
        shape: (users, steps, rows of a step).
        share: of rows that lack the server's side, and of those that lack the device's; in [0, 0.5).
        rng: draws once a row and step.

    Returns:
        (*shape, 2), 1 where the side is missing.
    """
    draw = rng.random(shape)
    return np.stack([draw < share, draw > 1 - share], axis=-1).astype(np.float32)
