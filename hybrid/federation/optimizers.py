"""Server optimisers: any of `torch.optim`, Yogi beside them, and the average of the last iterates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid.errors import ConfigError
from hybrid.features import Float32


class Yogi(torch.optim.Optimizer):
    """FedYogi's server step: Adam whose second moment moves by a bounded amount, so that it forgets slowly.

    Args:
        params: as of every optimiser.
        lr: server learning rate.
        betas: of the first and the second moment.
        tau: keeps the denominator from zero; larger is nearer to SGD with momentum.

    Source:
        Reddi et al., ICLR 2021, Algorithm 2 (no bias correction; v starts at tau^2). https://arxiv.org/abs/2003.00295
    """

    def __init__(
        self, params: Any, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if tau <= 0:
            raise ValueError(f"tau must be > 0, got {tau}")
        super().__init__(params, {"lr": lr, "betas": betas, "tau": tau})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients that are there."""
        for group in self.param_groups:
            for weights in (p for p in group["params"] if p.grad is not None):
                self._step(weights, weights.grad, group)

    def _step(self, weights: Tensor, slope: Tensor, group: Mapping[str, Any]) -> None:
        state, (first, second) = self.state[weights], group["betas"]
        if not state:
            state.update(m=torch.zeros_like(weights), v=torch.full_like(weights, group["tau"] ** 2))
        square = slope.square()
        state["m"].lerp_(slope, 1 - first)
        state["v"].sub_((1 - second) * square * torch.sign(state["v"] - square))
        weights.sub_(group["lr"] * state["m"] / (state["v"].sqrt() + group["tau"]))


class ServerOptimizer:
    """A server optimiser over one flat vector of weights, fed pseudo-gradients.

    FedAvg is SGD with learning rate 1, FedAdam is Adam, FedYogi is Yogi.

    Args:
        name: "Yogi", or a class of `torch.optim` that can step from a gradient alone.
        lr: its learning rate.
        flat: (p,) the weights to start from.
        options: its other settings, e.g. {"betas": (0.9, 0.99)} or {"momentum": 0.9}.

    Raises:
        ConfigError: there is no such optimiser, it has no such option, or it cannot train a flat vector.
    """

    def __init__(self, name: str, lr: float, flat: Float32, options: Mapping[str, Any] | None = None) -> None:
        kind = Yogi if name == "Yogi" else getattr(torch.optim, name, None)
        if not (
            isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
        ):
            raise ConfigError(f"server_optimizer must name a class of torch.optim, or Yogi, got {name!r}")
        settings = {"lr": lr, **(options or {})}
        try:
            _step(*_optimizer(kind, settings, np.zeros(2, np.float32)), np.zeros(2))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"server_optimizer must step from a gradient of one flat vector; {name} with {settings} "
                f"does not: {error}"
            ) from None
        self._optimizer, self._weights = _optimizer(kind, settings, flat)

    def step(self, mean_update: NDArray[np.floating]) -> Float32:
        """Takes one step against -`mean_update`, (p,); returns the new weights, (p,)."""
        return _step(self._optimizer, self._weights, mean_update)


class TailAverage:
    """The mean of the weights after the last rounds: post-processing, so it costs no privacy, and noise averages out.

    Args:
        share: of the rounds that are averaged, in [0, 1]; 0: the last weights alone.
        rounds: how many there will be.

    Raises:
        ConfigError: share is outside its range.

    Source:
        Polyak and Juditsky, SIAM J. Control Optim. 30 (1992); for private training: Shamir and Zhang, ICML 2013.

    >>> average = TailAverage(0.5, rounds=4)
    >>> [average(number, np.array([float(number)])).tolist() for number in range(1, 5)]
    [[1.0], [2.0], [3.0], [3.5]]
    """

    def __init__(self, share: float, rounds: int) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"average_last must be in [0, 1], got {share!r}")
        self._begins = rounds - int(share * rounds)
        self._sum: NDArray[np.float64] | None = None
        self._count = 0

    def __call__(self, number: int, flat: NDArray[np.floating]) -> Float32:
        """What the model is after round `number`, whose weights are `flat`, (p,); called once a round, in order."""
        if number <= self._begins:
            return flat.astype(np.float32)
        self._sum = flat.astype(np.float64) + (0.0 if self._sum is None else self._sum)
        self._count += 1
        return (self._sum / self._count).astype(np.float32)


def _optimizer(
    kind: type[torch.optim.Optimizer], settings: Mapping[str, Any], flat: Float32
) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    weights = torch.nn.Parameter(torch.tensor(flat, dtype=torch.float32))
    return kind([weights], **settings), weights


def _step(optimizer: torch.optim.Optimizer, weights: torch.nn.Parameter, mean_update: NDArray[np.floating]) -> Float32:
    weights.grad = torch.tensor(-mean_update, dtype=torch.float32)
    optimizer.step()
    moved: Float32 = weights.detach().numpy().copy()
    return moved
