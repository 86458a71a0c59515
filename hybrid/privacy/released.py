"""What devices would release at a noise level, and how good predictions are with it. All of it is an oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid.features import Float32
from hybrid.federation.engine import embed, predict
from hybrid.federation.metrics import Compared, Difference, auc, compare
from hybrid.federation.population import Examples
from hybrid.network import Network
from hybrid.privacy.mechanisms import NoiseSource, clip_and_noise, clip_rows
from hybrid.spec import Noised

CLIP_QUANTILE = 0.9  # of the embeddings' norms: the clip where the model declares none
RESAMPLES = 1000


def clip_for(network: Network, known: Examples) -> float:
    """The largest L2 norm of a noised embedding: as declared, or `CLIP_QUANTILE` of those of known people."""
    if isinstance(network.model.release, Noised):
        return network.model.release.clip
    norms = embed(network.device_tower, known.device).norm(dim=1).numpy()
    return float(np.quantile(norms, CLIP_QUANTILE)) or 1.0  # a tower that says nothing has no norm to clip to


def released(embedding: Float32, clip: float, sigma: float, noise: NoiseSource) -> Float32:
    """(n, d) embeddings as devices release them; with sigma 0 as they are, not clipped either."""
    return clip_and_noise(embedding, clip=clip, sigma=sigma, noise=noise) if sigma else embedding


@dataclass(frozen=True)
class Served:
    """Rows as the head sees them.

    Attributes:
        network: whose head.
        examples: the rows.
        server: (n, a) embeddings of the server.
        device: (n, b) of the device, clear.
        mean, covariance: (b,) and (b, b) of known people's embeddings, clipped.
    """

    network: Network
    examples: Examples = field(repr=False)
    server: Tensor = field(repr=False)
    device: Float32 = field(repr=False)
    mean: NDArray[np.float64] = field(repr=False)
    covariance: NDArray[np.float64] = field(repr=False)

    @classmethod
    def of(cls, network: Network, examples: Examples, known: Examples, clip: float) -> Served:
        """Embeds both sides of `examples`, and the devices of `known`."""
        server = embed(network.server_tower, examples.server)
        device = embed(network.device_tower, examples.device).numpy()
        others = clip_rows(embed(network.device_tower, known.device).numpy(), clip)
        covariance = np.atleast_2d(np.cov(others, rowvar=False))
        return cls(network, examples, server, device, others.mean(axis=0), covariance)

    def auc(self, embedding: Float32) -> float:
        """With (n, b) embeddings in place of the device's."""
        return auc(self.examples.labels, self._predictions(embedding))

    def auc_without(self) -> float:
        """With the embedding that stands for a missing device."""
        return auc(self.examples.labels, predict(self.network, self.examples, without="device"))

    def cost(self, embedding: Float32) -> Difference:
        """AUC of the clear embeddings minus that of others, with a 95 % interval under resampled people."""
        clear, other = self._predictions(self.device), self._predictions(embedding)
        pair = Compared(self.examples.labels, clear, other, self.examples.user_of_row)
        return compare([pair], resamples=RESAMPLES)["auc"]

    def shrunk(self, embedding: Float32, sd: float) -> Float32:
        """The best linear guess at the embeddings under noise: drawn towards the mean, the more the less varies.

        It costs no privacy, but for the mean and covariance that it needs of a
        population, which a fleet would have to ask for under the ledger.

        Args:
            embedding: (n, b) as released.
            sd: of the noise in each coordinate; 0 leaves them as they are.
        """
        if not sd:
            return embedding
        kept = np.linalg.solve(self.covariance + sd**2 * np.eye(len(self.mean)), self.covariance)
        return np.asarray(self.mean + (embedding - self.mean) @ kept, np.float32)

    def _predictions(self, embedding: Float32) -> Float32:
        with torch.no_grad():
            logits = self.network.head(self.server, torch.from_numpy(embedding))
            scores: Float32 = self.network.correction(logits).numpy()
        return scores
