"""A network as device programs: `embed` and `predict` for ExecuTorch, checked against torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybrid.errors import ConfigError
from hybrid.export.conformance import check, embedding_probes, input_probes, quiet
from hybrid.network import DeviceProgram, Network

with quiet():
    from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig, MMConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

# Matrix products only: XNNPACK's minimum and maximum lose a NaN, which is how a missing value travels.
PRODUCTS = [AddmmConfig, LinearConfig, MMConfig]


class PredictProgram(nn.Module):
    """The merge on the device: its inputs and the server's embedding -> a probability."""

    def __init__(self, embed: DeviceProgram, head: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = embed, head

    def forward(self, inputs: Tensor, server: Tensor) -> Tensor:
        """(n, device features), (n, server_embedding) -> (n,) in [0, 1]."""
        return torch.sigmoid(self.head(server, self.embed(inputs)))


def device_programs(network: Network) -> dict[str, bytes]:
    """The programs of a device bundle, for one row at a time.

    Returns:
        "embed.pte": (1, device features) inputs -> (1, device_embedding), and
        "predict.pte": (1, device features), (1, server_embedding) -> (1,) probability.

    Raises:
        ConfigError: a part cannot be exported, or its export does not give what
            torch gives to 1e-5, missing, infinite and extreme inputs included.
    """
    inputs = input_probes(network.model.device_features)
    (server,) = embedding_probes(network.server_embedding)
    server = server[torch.arange(len(inputs)) % len(server)]
    embed = network.device_program()
    predict = PredictProgram(embed, network.head).eval()
    with quiet():
        return {
            "embed.pte": _pte("embed", embed, [inputs]),
            "predict.pte": _pte("predict", predict, [inputs, server]),
        }


def _pte(name: str, program: nn.Module, probes: Sequence[Tensor]) -> bytes:
    """Matrix products on XNNPACK where that works and conforms, else ExecuTorch's portable operators alone."""
    try:
        return _lowered(name, program, probes, [XnnpackPartitioner(configs=PRODUCTS)])
    except Exception:  # whatever the delegate raises, the portable operators decide
        return _portable(name, program, probes)


def _portable(name: str, program: nn.Module, probes: Sequence[Tensor]) -> bytes:
    try:
        return _lowered(name, program, probes, [])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{name} cannot be exported for devices: {type(error).__name__}: {error}") from error


def _lowered(name: str, program: nn.Module, probes: Sequence[Tensor], partitioners: list[object]) -> bytes:
    with torch.no_grad():
        exported = torch.export.export(program, tuple(probe[:1] for probe in probes))
        data = bytes(to_edge_transform_and_lower(exported, partitioner=partitioners).to_executorch().buffer)
    check(name, program, _by_row(data), probes)
    return data


def _by_row(data: bytes) -> Callable[..., NDArray[np.float32]]:
    """Runs a program of batch 1 on (n, width) arrays, row by row."""
    # The program owns the bytes that its methods read: it must outlive them.
    program = Runtime.get().load_program(data)

    def run(*arrays: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = zip(*(np.split(array, len(array)) for array in arrays), strict=True)
        method = program.load_method("forward")
        outputs = [method.execute([torch.from_numpy(part) for part in row])[0].numpy().copy() for row in rows]
        return np.concatenate(outputs)

    return run
