"""An attack that is trained: a network learns the way back from releases, made of people whom the attacker knows."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from hybrid.features import Float32
from hybrid.federation.optimizers import step, without_compiler
from hybrid.privacy.attacks import Attack, Knowledge
from hybrid.privacy.profiles import UNSEEN, Profiles

LEAST = 1e-3  # by which the loss must fall at first, as a share of it: less is chance among the few people set aside


@dataclass(frozen=True)
class Fitting:
    """How the network learns.

    Attributes:
        hidden: units of each of its two layers.
        epochs: over the known people.
        batch, lr, weight_decay: of AdamW, whose rate falls to nothing.
    """

    hidden: int = 128
    epochs: int = 30
    batch: int = 1024
    lr: float = 1e-2
    weight_decay: float = 1e-4


def trained(knows: Knowledge, *, seed: int, fitting: Fitting | None = None) -> Attack:
    """A classifier of each feature that has few values, a regressor of each other, on one network.

    It learns with new noise in each epoch, and what it is after the epoch that
    does best on the people set aside is kept. It begins at the known people's
    shares, so that its guess is the prior's where a release tells nothing.

    Args:
        knows: the attacker.
        seed: of first weights, order and noise.
        fitting: how.
    """
    fitting = fitting or Fitting()
    way_back, generator = _WayBack.of(knows, fitting.hidden, seed), torch.Generator().manual_seed(seed)
    without_compiler()
    optimizer = torch.optim.AdamW(way_back.parameters(), lr=fitting.lr, weight_decay=fitting.weight_decay)
    rows, aside = _Rows.of(knows, knows.slots), _Rows.of(knows, knows.aside).noised(knows.sd, generator)
    steps, done = fitting.epochs * math.ceil(len(knows.slots) / fitting.batch), 0
    best, kept = (1 - LEAST) * way_back.loss_of(aside), deepcopy(way_back.state_dict())
    for _ in range(fitting.epochs):
        for batch in torch.split(torch.randperm(len(knows.slots), generator=generator), fitting.batch):
            optimizer.param_groups[0]["lr"] = fitting.lr * (1 - done / steps)
            optimizer.zero_grad()
            way_back.loss(rows.some(batch).noised(knows.sd, generator)).backward()  # type: ignore[no-untyped-call]
            step(optimizer)
            done += 1
        loss = way_back.loss_of(aside)
        if loss < best:
            best, kept = loss, deepcopy(way_back.state_dict())
    way_back.load_state_dict(kept)
    return way_back.guess


@dataclass(frozen=True)
class _Rows:
    """People the attacker knows.

    Attributes:
        released: (n, d).
        codes, slots: (n, features).
    """

    released: Tensor
    codes: Tensor
    slots: Tensor

    @classmethod
    def of(cls, knows: Knowledge, slots: Float32) -> _Rows:
        codes = torch.from_numpy(knows.profiles.codes(slots))
        return cls(knows.released(slots), codes, torch.from_numpy(slots))

    def some(self, rows: Tensor) -> _Rows:
        return _Rows(self.released[rows], self.codes[rows], self.slots[rows])

    def noised(self, sd: float, generator: torch.Generator) -> _Rows:
        noise = sd * torch.randn(self.released.shape, generator=generator)
        return _Rows(self.released + noise, self.codes, self.slots)


class _WayBack(nn.Module):
    """(n, d) releases -> (n, features, width): logits of a feature's values; of a grid, first the number itself."""

    absent: Tensor

    def __init__(self, profiles: Profiles, mean: Tensor, scale: Tensor, hidden: int) -> None:
        super().__init__()
        self.profiles, self.mean, self.scale = profiles, mean, scale
        shape = len(profiles.sizes), max(profiles.sizes)
        last = nn.Linear(hidden, math.prod(shape))
        self.layers = nn.Sequential(
            nn.Linear(len(mean), hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), last, nn.Unflatten(1, shape)
        )
        start, self.absent = torch.zeros(shape), torch.full(shape, -torch.inf)
        self.grid = torch.tensor([values.grid for values in profiles.values])
        for f, (size, share) in enumerate(zip(profiles.sizes, profiles.shares, strict=True)):
            self.absent[f, :size] = 0.0
            start[f, :size] = torch.from_numpy(np.log(np.maximum(share, UNSEEN)))
        start[self.grid, 0] = 0.0
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(start.reshape(-1))

    @classmethod
    def of(cls, knows: Knowledge, hidden: int, seed: int) -> _WayBack:
        """Not trained yet."""
        released = knows.released(knows.slots)
        scale = torch.sqrt(released.var(dim=0) + knows.sd**2).clamp(min=1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(knows.profiles, released.mean(dim=0), scale, hidden)

    def forward(self, released: Tensor) -> Tensor:
        """See the class."""
        outputs: Tensor = self.layers((released - self.mean) / self.scale)
        return outputs

    def loss(self, rows: _Rows) -> Tensor:
        """Cross-entropy and squared error, summed over features, mean over rows; of a missing number, nothing."""
        outputs, loss = self(rows.released), torch.zeros(())
        classes, number, truth = ~self.grid, outputs[:, self.grid, 0], rows.slots[:, self.grid]
        if classes.any():
            logits = (outputs + self.absent)[:, classes].flatten(0, 1)
            loss = loss + classes.sum() * cross_entropy(logits, rows.codes[:, classes].flatten())
        known = ~truth.isnan()
        if known.any():
            loss = loss + self.grid.sum() * mse_loss(number[known], truth[known])
        return loss

    def loss_of(self, rows: _Rows) -> float:
        """The same, without a gradient."""
        with torch.no_grad():
            return float(self.loss(rows))

    def guess(self, released: Tensor) -> Float32:
        """An attack."""
        with torch.no_grad():
            outputs = self(released)
        slots = self.profiles.slots((outputs + self.absent).argmax(dim=2).numpy())
        grid = self.grid.numpy()
        slots[:, grid] = outputs[:, :, 0].numpy()[:, grid]
        return slots
