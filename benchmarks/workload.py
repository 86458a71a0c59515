"""The training benchmark's workload: users x 32 examples, 4 local steps of 8, networks of four sizes; and its loops.

Every contestant starts from the same weights, sees the same examples of the same
cohort, everybody, and takes plain gradient steps.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hybrid import Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, View
from hybrid.federation.engine import DeviceSide, Engine
from hybrid.federation.population import Examples
from hybrid.local_training import LocalTraining
from hybrid.network import Network

EXAMPLES, BATCH, STEPS, LR, CLIP = 32, 8, 4, 0.1, 1.0
# Device features (each encoded as a number and a flag), hidden units, embedding, hidden units of the head.
SIZES = {"0.4k": (4, 12, 8, 8), "6.3k": (16, 64, 32, 32), "17k": (32, 64, 64, 64), "200k": (128, 256, 256, 128)}


def network(size: str) -> Network:
    """A split model with as many weights on the device side as `size` says."""
    features, hidden, embedding, head_hidden = SIZES[size]

    def device_tower() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, embedding))

    def head() -> nn.Module:
        return _Head(embedding, head_hidden)

    model = HybridModel(
        name="benchmark",
        server=Server(
            service="benchmark_service",
            entity=Entity(name="item", join_key="item_id"),
            views=(View(name="items", source="items.parquet", features={"a": Numeric()}),),
            max_feature_age=timedelta(days=1),
        ),
        device={f"x{number}": Numeric() for number in range(features)},
        server_tower=lambda: nn.LazyLinear(embedding),
        device_tower=device_tower,
        head=head,
        label=Label(column="y", visible_to="server"),
        privacy=Privacy(epsilon=8, delta=1e-6, clip=CLIP, unit="user"),
        merge="server",
        release=Clear(reason="a benchmark on numbers drawn at random"),
    )
    return Network.build(model)


class _Head(nn.Module):
    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * embedding, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, server: Tensor, device: Tensor) -> Tensor:
        return self.layers(torch.cat([device, server], dim=-1)).squeeze(-1)


def examples(size: str, users: int, seed: int = 0) -> Examples:
    """Numbers drawn at random: a benchmark of time only."""
    rng = np.random.default_rng(seed)
    rows = users * EXAMPLES
    return Examples(
        server=rng.standard_normal((rows, 2), dtype=np.float32),
        device=rng.standard_normal((rows, 2 * SIZES[size][0]), dtype=np.float32),
        labels=(rng.random(rows) > 0.5).astype(np.float32),
        offsets=np.arange(users + 1) * EXAMPLES,
        population="benchmark",
    )


@dataclass(frozen=True)
class Contest:
    """One workload, ready to be run by each of the loops below.

    Attributes:
        engine: ours, with local steps of `batch` rows.
        one_step: ours, with one step over all rows.
        start: (p,) the engine's weights.
        side: for the other loops, with the same weights, where the engine trains.
        server, device, labels: (users, 32, ...) the same examples, the server's side as its embedding; there too.
    """

    engine: Engine
    one_step: Engine
    start: NDArray[np.float32] = field(repr=False)
    side: DeviceSide
    server: Tensor = field(repr=False)
    device: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    @classmethod
    def of(cls, size: str, users: int, device: str = "cpu") -> Contest:
        """Builds it; all contestants on one device."""
        built, rows = network(size), examples(size, users)
        engine = Engine.build(built, rows, LocalTraining(steps=STEPS, lr=LR, batch=BATCH), device=device)
        tensors = [tensor.to(device) for tensor in (engine.embeddings, *_tensors(rows))]
        shaped = [tensor.view(users, EXAMPLES, *tensor.shape[1:]) for tensor in tensors]
        one_step = Engine.build(built, rows, LocalTraining(steps=1, lr=LR), device=device)
        return cls(engine, one_step, engine.side.flat(), deepcopy(engine.side).to(device), *shaped)

    @property
    def users(self) -> int:
        """How many."""
        return len(self.labels)

    def ours(self) -> NDArray[np.float64]:
        """A cohort's clipped sum; noise and server step are the same few vectors for everyone."""
        return self.engine.clipped_sum(self.start, np.arange(self.users), CLIP).total

    def ours_one_step(self) -> NDArray[np.float64]:
        """The same with one step over all rows."""
        return self.one_step.clipped_sum(self.start, np.arange(self.users), CLIP).total

    def central(self, batch: int = BATCH) -> None:
        """Plain mini-batches of the same examples, `batch` of each user, without privacy; the rate is 0, to repeat."""
        optimizer = torch.optim.SGD(self.side.parameters(), lr=0.0)
        for start in range(0, EXAMPLES, batch):
            server, device, labels = (
                part[:, start : start + batch].flatten(0, 1) for part in (self.server, self.device, self.labels)
            )
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(self.side(server, device), labels).backward()
            optimizer.step()
        if self.labels.is_cuda:  # which goes on working after it was told; ours waits for its sum
            torch.cuda.synchronize()

    def local_steps(self, user: int) -> None:
        """One user's steps on the resident model, in place: what a device would do, without an optimiser object."""
        parameters = list(self.side.parameters())
        for begin in range(0, EXAMPLES, BATCH):
            here = slice(begin, begin + BATCH)
            for parameter in parameters:
                parameter.grad = None
            logits = self.side(self.server[user, here], self.device[user, here])
            binary_cross_entropy_with_logits(logits, self.labels[user, here]).backward()
            with torch.no_grad():
                for parameter in parameters:
                    parameter.sub_(parameter.grad, alpha=LR)

    def sequential(self, users: int | None = None) -> NDArray[np.float32]:
        """One user after another, on one resident model, without optimiser objects; the clipped sum."""
        parameters = list(self.side.parameters())
        start = [parameter.detach().clone() for parameter in parameters]
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for user in range(users or self.users):
            self.local_steps(user)
            with torch.no_grad():
                moved = [parameter - first for parameter, first in zip(parameters, start, strict=True)]
                norm = torch.sqrt(sum(part.pow(2).sum() for part in moved))
                scale = (CLIP / norm).clamp(max=1)
                for whole, part in zip(total, moved, strict=True):
                    whole.add_(part * scale)
                for parameter, first in zip(parameters, start, strict=True):
                    parameter.copy_(first)
        return torch.cat([part.flatten() for part in total]).cpu().numpy()


def _tensors(rows: Examples) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(rows.device), torch.from_numpy(rows.labels)
