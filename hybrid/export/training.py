"""What devices train, as a program: a loss and its gradient, for ExecuTorch, checked against torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import binary_cross_entropy_with_logits

from hybrid.bundle import Parameter, TrainProgram
from hybrid.errors import ConfigError
from hybrid.export.conformance import TOLERANCE, embedding_probes, input_probes, quiet, slot_probes
from hybrid.federation.engine import DeviceSide
from hybrid.network import Encoder, Network, Transforms

with quiet():
    from executorch.exir import EdgeCompileConfig, to_edge
    from executorch.runtime import Runtime
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

ROWS = 16


class DeviceLoss(DeviceSide):
    """What a device descends: what users train in a simulation, behind the transforms and encoders of its features.

    Args: those of `DeviceSide`.
    """

    def __init__(self, network: Network, *, server_tower: bool, missing: bool) -> None:
        super().__init__(network, server_tower=server_tower, missing=missing)
        model = network.model
        self.transforms, self.encoder = Transforms(model.device_features), Encoder(model.device_features)
        self.server_encoder = Encoder(model.server_features) if server_tower else nn.Identity()

    def forward(  # type: ignore[override]
        self, server: Tensor, inputs: Tensor, labels: Tensor, weight: Tensor, absent: Tensor | None = None
    ) -> Tensor:
        """The sum of the rows' cross-entropies, each times its weight; see `hybrid.bundle.TrainProgram`."""
        logits = super().forward(self.server_encoder(server), self.encoder(self.transforms(inputs)), absent)
        return binary_cross_entropy_with_logits(logits, labels, weight, reduction="sum")


def training_program(
    network: Network, *, server_tower: bool, missing: bool, rows: int = ROWS
) -> tuple[bytes, TrainProgram]:
    """The program "train.pte" of a device bundle, and how it is fed.

    Weights are an input: the program has none, so that its bytes are the same for every
    version of a model, and what a plan brings is all that is trained.

    Args:
        network: with the weights at which the program is compared with torch.
        server_tower: whether devices train the server tower too.
        missing: whether they train the embeddings that stand for a missing side.
        rows: of each call.

    Raises:
        ConfigError: the model's gradient cannot be exported, or its export does not give what
            torch gives to 1e-5, missing and extreme values and padding included. The message says why.
    """
    loss = DeviceLoss(deepcopy(network), server_tower=server_tower, missing=missing).eval()
    train = TrainProgram(
        rows=rows,
        server=len(network.model.server_features) if server_tower else network.server_embedding,
        missing=missing,
        parameters=tuple(Parameter(name=name, shape=tuple(p.shape)) for name, p in loss.named_parameters()),
    )
    try:
        with quiet():
            batches = _probes(network, train, slots=server_tower)
            data = _exported(loss, batches[0])
            _check(data, loss, batches)
    except ConfigError:
        raise
    except Exception as error:  # whatever torch and ExecuTorch raise at what they cannot trace, lower or run
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the gradient cannot be exported for devices: {type(error).__name__}: {reason}") from error
    return data, train


def _exported(loss: DeviceLoss, batch: tuple[Tensor, ...]) -> bytes:
    """The joint program of loss and gradient, for rows as in `batch`.

    Traced by torch's function transforms rather than ExecuTorch's own export of a backward pass, which keeps
    weights in the program and returns each of them, and each gradient, as an output of its own: slower, and tied to
    names that an exporter gives.
    """
    flat = torch.from_numpy(loss.flat())
    with torch.no_grad():
        graph = make_fx(partial(_loss_and_gradient, loss), decomposition_table=_operators())(flat, *batch)
    exported = torch.export.export(graph, (flat, *batch))
    # Operators outside of the core set may do: what counts is that the runtime has them.
    program = to_edge(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False)).to_executorch()
    plans = program.executorch_program.execution_plan
    needed = {f"{operator.name}.{operator.overload}" for plan in plans for operator in plan.operators}
    absent = sorted(needed - set(Runtime.get().operator_registry.operator_names))
    if absent:
        raise ConfigError(f"the gradient cannot be exported for devices: ExecuTorch has no operator {absent[0]!r}")
    return bytes(program.buffer)


def _operators() -> dict[Any, Callable[..., Any]]:
    """How operators are made of ExecuTorch's; it has none for memory that is not set, which is set right after."""

    def zeros(size: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
        return torch.full(size, 0.0, dtype=dtype)

    return {**core_aten_decompositions(), torch.ops.aten.empty_permuted.default: zeros}


def _loss_and_gradient(loss: DeviceLoss, flat: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
    """() and (p,)."""
    named = dict(loss.named_parameters())

    def at(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [parameter.numel() for parameter in named.values()])
        weights = {name: part.view(named[name].shape) for name, part in zip(named, parts, strict=True)}
        return functional_call(loss, weights, batch)  # type: ignore[no-any-return]

    gradient, value = grad_and_value(at)(flat)
    return value, gradient


def _probes(network: Network, train: TrainProgram, *, slots: bool) -> list[tuple[Tensor, ...]]:
    """Batches with ordinary values, then missing and extreme ones; rows that lack a side, and padding, in each."""
    model, random = network.model, np.random.default_rng(0)
    inputs = input_probes(model.device_features)
    server = slot_probes(model.server_features) if slots else embedding_probes(network.server_embedding)[0]
    batches = -(-len(inputs) // train.rows)
    places = np.arange(batches * train.rows)
    columns = [part[torch.from_numpy(places % len(part))] for part in (server, inputs)]
    columns.append(torch.from_numpy(random.integers(0, 2, len(places)).astype(np.float32)))
    columns.append(torch.from_numpy((random.random(len(places)) * (places % 5 > 0) / train.rows).astype(np.float32)))
    if train.missing:
        columns.append(torch.from_numpy((places[:, None] % 3 == np.arange(2)).astype(np.float32)))
    return [tuple(part) for part in zip(*(torch.split(column, train.rows) for column in columns), strict=True)]


def _check(data: bytes, loss: DeviceLoss, batches: list[tuple[Tensor, ...]]) -> None:
    """Raises: ConfigError: loss or gradient differ from torch's, relative to the largest of the batch."""
    program = Runtime.get().load_program(data)  # owns the bytes that its method reads
    method = program.load_method("forward")
    own = torch.from_numpy(loss.flat())
    parameters = list(loss.parameters())
    for flat in (own, own + 0.1 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))):
        loss.load_flat(flat.numpy())
        for batch in batches:
            value = loss(*batch)
            slopes = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            expected = np.r_[float(value), torch.cat([slope.flatten() for slope in slopes]).numpy()]
            outputs = method.execute([flat, *batch])
            got = np.r_[float(outputs[0]), outputs[1].numpy()]
            allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
            if got.shape != expected.shape or not np.allclose(got, expected, rtol=0, atol=allowed, equal_nan=True):
                raise ConfigError(
                    f"the exported gradient differs from torch's by more than {TOLERANCE}, so devices cannot train it"
                )
