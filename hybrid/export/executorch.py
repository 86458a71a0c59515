"""A network as device programs: `embed` and `predict` for ExecuTorch, checked against torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybrid.errors import ConfigError
from hybrid.export.conformance import check, quiet
from hybrid.export.programs import device_parts
from hybrid.network import Network

with quiet():
    from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig, MMConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

# Matrix products only: XNNPACK's minimum and maximum lose a NaN, which is how a missing value travels.
PRODUCTS = [AddmmConfig, LinearConfig, MMConfig]


def device_programs(network: Network) -> dict[str, bytes]:
    """The programs of a device bundle, for one row at a time.

    Returns:
        "embed.pte": (1, device features) inputs -> (1, device_embedding), and
        "predict.pte": (1, device features), (1, server_embedding) -> (1,) probability.

    Raises:
        ConfigError: a part cannot be exported, or its export does not give what
            torch gives to 1e-5, missing, infinite and extreme inputs included.
    """
    with quiet():
        return {
            f"{name}.pte": _pte(name, part.program, list(part.probes.values()))
            for name, part in device_parts(network).items()
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
