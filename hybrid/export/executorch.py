"""A network as a device program: methods `embed` and `predict` for ExecuTorch, checked against torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.export.conformance import check, quiet
from hybrid.export.programs import Part, device_parts
from hybrid.network import Network

with quiet():
    from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig, MMConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

# Matrix products only: XNNPACK's minimum and maximum lose a NaN, which is how a missing value travels.
PRODUCTS = [AddmmConfig, LinearConfig, MMConfig]


def device_programs(network: Network) -> dict[str, bytes]:
    """The program of a device bundle, for one row at a time.

    Returns:
        "device.pte" with its methods, which share the tower's weights:
        "embed": (1, device features) inputs -> (1, device_embedding), and
        "predict": (1, device features), (1, server_embedding) -> (1,) probability.

    Raises:
        ConfigError: a part cannot be exported, or its export does not give what
            torch gives to 1e-5, missing, infinite and extreme inputs included.
    """
    with quiet():
        return {"device.pte": _pte(device_parts(network))}


def _pte(parts: Mapping[str, Part]) -> bytes:
    """Matrix products on XNNPACK where that works and conforms, else ExecuTorch's portable operators alone."""
    try:
        return _lowered(parts, [XnnpackPartitioner(configs=PRODUCTS)])
    except Exception:  # whatever the delegate raises, the portable operators decide
        return _portable(parts)


def _portable(parts: Mapping[str, Part]) -> bytes:
    try:
        return _lowered(parts, [])
    except ConfigError:
        raise
    except Exception as error:
        names = " and ".join(parts)
        raise ConfigError(f"{names} cannot be exported for devices: {type(error).__name__}: {error}") from error


def _lowered(parts: Mapping[str, Part], partitioners: list[object]) -> bytes:
    with torch.no_grad():
        exported = {
            name: torch.export.export(part.program, tuple(probe[:1] for probe in part.probes.values()))
            for name, part in parts.items()
        }
        lowered = to_edge_transform_and_lower(exported, partitioner=dict.fromkeys(parts, partitioners))
        data = bytes(lowered.to_executorch().buffer)
    for name, part in parts.items():
        check(name, part.program, _by_row(data, name), list(part.probes.values()))
    return data


def _by_row(data: bytes, name: str) -> Callable[..., NDArray[np.float32]]:
    """Runs a method of batch 1 on (n, width) arrays, row by row."""
    # The program owns the bytes that its methods read: it must outlive them.
    program = Runtime.get().load_program(data)

    def run(*arrays: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = zip(*(np.split(array, len(array)) for array in arrays), strict=True)
        method = program.load_method(name)
        outputs = [method.execute([torch.from_numpy(part) for part in row])[0].numpy().copy() for row in rows]
        return np.concatenate(outputs)

    return run
