"""A cohort's local training as one batched tensor program: what each device would do, for many at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import binary_cross_entropy_with_logits

from hybrid.errors import ConfigError
from hybrid.features import Float32
from hybrid.federation.population import Examples
from hybrid.network import Network

CHUNK_BYTES = 64 << 20  # of one chunk's padded rows and updates; about ten times this is in use at the peak
ROWS_A_PASS = 1 << 16


class DeviceSide(nn.Module):
    """What is trained on devices: the device tower and the head, fed the server's embedding.

    Its parameters, in one fixed order, are the flat vector that travels.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.device_tower, self.head = network.device_tower, network.head

    def forward(self, server_embedding: Tensor, device: Tensor) -> Tensor:
        """(n, a), (n, device width) -> (n,) logits."""
        return self.head(server_embedding, self.device_tower(device))  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        """p, the length of the flat vector."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flat(self) -> Float32:
        """(p,) a copy of the parameters."""
        vector: Float32 = nn.utils.parameters_to_vector(self.parameters()).detach().cpu().numpy().copy()
        return vector

    def load_flat(self, flat: Float32) -> None:
        """Sets the parameters.

        Raises:
            ConfigError: `flat` is not (p,).
        """
        if flat.shape != (self.size,):
            raise ConfigError(f"flat weights must have shape ({self.size},), got {flat.shape}")
        nn.utils.vector_to_parameters(torch.tensor(flat, dtype=torch.float32), self.parameters())


@dataclass(frozen=True)
class LocalTraining:
    """What one user does in a round: `steps` steps of gradient descent on the mean loss of all its examples.

    Attributes:
        steps: at least 1; each takes all of the user's examples.
        lr: learning rate.
    """

    steps: int
    lr: float


@dataclass(frozen=True)
class Engine:
    """Computes the updates of any users of one set of examples.

    Dropout is off and the server tower is frozen: its embeddings are computed
    once, as a device would be given them.

    Attributes:
        module: the device side; its parameters' values are never read nor changed by `updates`.
        local: what each user does.
        server_embedding, device, labels: the rows, (n, a), (n, device width) and (n,).
        offsets: (users + 1,): user u has the rows offsets[u] to offsets[u + 1].
        chunk_bytes: bounds the memory of one chunk.
    """

    module: DeviceSide
    local: LocalTraining
    server_embedding: Tensor = field(repr=False)
    device: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    offsets: NDArray[np.int64] = field(repr=False)
    chunk_bytes: int = CHUNK_BYTES

    @classmethod
    def build(
        cls, network: Network, examples: Examples, local: LocalTraining, *, chunk_bytes: int = CHUNK_BYTES
    ) -> Engine:
        """Embeds every example's server side and keeps the rest as tensors."""
        return cls(
            module=DeviceSide(network).eval(),
            local=local,
            server_embedding=embed(network.server_tower, examples.server),
            device=torch.from_numpy(examples.device),
            labels=torch.from_numpy(examples.labels),
            offsets=examples.offsets,
            chunk_bytes=chunk_bytes,
        )

    @property
    def users(self) -> int:
        """How many people there are to choose from."""
        return len(self.offsets) - 1

    def updates(self, flat: Float32, users: NDArray[np.int64]) -> Iterator[Float32]:
        """Trains each of `users` from the same weights.

        Users go by their number of examples, so that little is padded: the order of
        the rows is not that of `users`. A user without examples gives zeros.

        Args:
            flat: (p,) the weights to start from.
            users: (k,) distinct, each in [0, self.users).

        Yields:
            (c, p) weights after local training minus `flat`, one row a user, not clipped.
        """
        counts = self.offsets[users + 1] - self.offsets[users]
        order = np.argsort(counts, kind="stable")
        ordered, counts = users[order], counts[order]
        start = 0
        while start < len(ordered):
            stop = self._chunk_end(counts, start)
            yield self._train(flat, ordered[start:stop], counts[start:stop])
            start = stop

    def _chunk_end(self, counts: NDArray[np.int64], start: int) -> int:
        """As many users as fit, counting each as padded to the longest; at least one."""
        row = self.server_embedding.shape[1] + self.device.shape[1] + 2
        sizes = 4 * (counts[start:] * row + self.module.size) * np.arange(1, len(counts) - start + 1)
        return start + max(1, int(np.searchsorted(sizes, self.chunk_bytes, side="right")))

    def _train(self, flat: Float32, users: NDArray[np.int64], counts: NDArray[np.int64]) -> Float32:
        batch = self._padded(users, counts)
        start = self._unflatten(torch.tensor(flat))
        gradient = grad(self._loss)
        shared = vmap(gradient, in_dims=(None, 0, 0, 0, 0))(start, *batch)
        moved = {name: -self.local.lr * value for name, value in shared.items()}
        for _ in range(self.local.steps - 1):
            here = {name: start[name] + value for name, value in moved.items()}
            moved = {n: moved[n] - self.local.lr * g for n, g in vmap(gradient)(here, *batch).items()}
        update: Float32 = torch.cat([value.flatten(1) for value in moved.values()], dim=1).numpy()
        update[counts == 0] = 0.0  # whatever row they were computed on
        return update

    def _padded(self, users: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c, m, ...) rows of each user, and the weight of each: 1 / count, 0 where it is padding.

        Padding repeats the user's own first row. Another's would reach the
        update where it overflows, as 0 x infinity; so would zeros, for as long
        as others have more rows.
        """
        place = np.arange(max(1, counts.max()))
        real = place < counts[:, None]
        first = np.where(counts > 0, self.offsets[users], 0)[:, None]
        rows = torch.from_numpy(first + np.where(real, place, 0))
        weight = torch.from_numpy((real / np.maximum(counts, 1)[:, None]).astype(np.float32))
        return self.server_embedding[rows], self.device[rows], self.labels[rows], weight

    def _loss(self, parameters: dict[str, Tensor], server: Tensor, device: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        logits = functional_call(self.module, parameters, (server, device))
        return (binary_cross_entropy_with_logits(logits, y, reduction="none") * weight).sum()

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        named = dict(self.module.named_parameters())
        parts = torch.split(flat, [parameter.numel() for parameter in named.values()])
        return {name: part.view(named[name].shape) for name, part in zip(named, parts, strict=True)}


def embed(tower: nn.Module, rows: Float32) -> Tensor:
    """Runs a tower over rows, some at a time, without gradients."""
    with torch.no_grad():
        return torch.cat([tower(part) for part in torch.split(torch.from_numpy(rows), ROWS_A_PASS)])


def predict(network: Network, examples: Examples, *, with_devices: bool = True) -> Float32:
    """(n,) probabilities by the network as it is; without devices, the head is given zeros for their embeddings."""
    parts = zip(
        torch.split(embed(network.server_tower, examples.server), ROWS_A_PASS),
        torch.split(torch.from_numpy(examples.device), ROWS_A_PASS),
        strict=True,
    )
    absent = torch.zeros(1, network.device_embedding)

    def probabilities(server: Tensor, device: Tensor) -> Tensor:
        embedding = network.device_tower(device) if with_devices else absent.expand(len(device), -1)
        return torch.sigmoid(network.head(server, embedding))

    with torch.no_grad():
        predictions: Float32 = torch.cat([probabilities(a, b) for a, b in parts]).numpy()
    return predictions
