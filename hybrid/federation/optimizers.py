"""Server optimisers: any of `torch.optim`, Yogi beside them, and the average of the last iterates."""

from __future__ import annotations

import inspect
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


def without_compiler() -> None:
    """Lets an optimiser be made without torch's compiler, which takes 3 s to import and which nothing here uses."""
    of = torch.optim.Optimizer
    for method in (of.add_param_group, of.zero_grad, of.state_dict, of.load_state_dict):
        plain = inspect.unwrap(method)
        plain.__dynamo_disable = plain  # where torch keeps what the compiler makes of it


def step(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` without its wrapper, which imports the compiler too."""
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


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

    @property
    def weights(self) -> Float32:
        """(p,) a copy of the weights that the next step starts from."""
        flat: Float32 = self._weights.detach().numpy().copy()
        return flat

    def state(self) -> dict[str, Any]:
        """See `hybrid.federation.checkpoint.Stateful`."""
        return {"weights": self.weights, "optimizer": self._optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        with torch.no_grad():
            self._weights.copy_(torch.from_numpy(state["weights"]))
        self._optimizer.load_state_dict(state["optimizer"])


class TailAverage:
    """A mean of the weights after the last rounds: post-processing, so it costs no privacy, and noise averages out.

    The weights of round t count in proportion to t^k, so that at any time, without
    keeping them, the mean is as old and as smooth as that of the last `share` of
    the rounds so far.

    Args:
        share: in [0, 1]; 0: the last weights alone.

    Raises:
        ConfigError: share is outside its range.

    Source:
        Shamir and Zhang, ICML 2013, section 4 (polynomial-decay averaging, k = 2 / share - 2: then the mean is
        share / 2 of the rounds old). https://proceedings.mlr.press/v28/shamir13.html

    >>> average = TailAverage(1.0)
    >>> [average(np.array([weight])).tolist() for weight in (1.0, 2.0, 6.0)]
    [[1.0], [1.5], [3.0]]
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"average_last must be in [0, 1], got {share!r}")
        self._decay = 2 / share - 2 if share else None
        self._mean: NDArray[np.float64] | None = None
        self._rounds = 0

    def __call__(self, flat: NDArray[np.floating]) -> Float32:
        """What the model is after one more round, whose weights are `flat`, (p,)."""
        self._rounds += 1
        if self._mean is None or self._decay is None:
            self._mean = flat.astype(np.float64)
        else:
            self._mean += (self._decay + 1) / (self._decay + self._rounds) * (flat - self._mean)
        return self._mean.astype(np.float32)

    def state(self) -> tuple[NDArray[np.float64] | None, int]:
        """See `hybrid.federation.checkpoint.Stateful`."""
        return self._mean, self._rounds

    def restore(self, state: tuple[NDArray[np.float64] | None, int]) -> None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        self._mean, self._rounds = state


def _optimizer(
    kind: type[torch.optim.Optimizer], settings: Mapping[str, Any], flat: Float32
) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    weights = torch.nn.Parameter(torch.tensor(flat, dtype=torch.float32))
    without_compiler()
    return kind([weights], **settings), weights


def _step(optimizer: torch.optim.Optimizer, weights: torch.nn.Parameter, mean_update: NDArray[np.floating]) -> Float32:
    weights.grad = torch.tensor(-mean_update, dtype=torch.float32)
    step(optimizer)
    moved: Float32 = weights.detach().numpy().copy()
    return moved
