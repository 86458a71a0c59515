"""A program in ONNX, checked against torch: what Triton serves, and what browsers and devices without torch run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybrid.errors import ConfigError
from hybrid.export.conformance import check, quiet
from hybrid.export.programs import device_parts
from hybrid.network import Network

MAX_BATCH = 4096
OPSET = 18  # read by every ONNX Runtime since 1.14


def device_programs(network: Network) -> dict[str, bytes]:
    """The programs of a device bundle that ONNX Runtime runs, in browsers too; of any number of rows.

    Returns:
        "embed.onnx": (n, device features) `inputs` -> (n, device_embedding) `embedding`, and
        "predict.onnx": `inputs`, (n, server_embedding) `server` -> (n,) `prediction`, a probability.

    Raises:
        ConfigError: a part cannot be exported, or its export does not give what
            torch gives to 1e-5, missing, infinite and extreme inputs included.
    """
    return {
        f"{name}.onnx": onnx_bytes(name, part.program, part.probes, part.output)
        for name, part in device_parts(network).items()
    }


def onnx_bytes(name: str, program: nn.Module, probes: Mapping[str, Tensor], output: str) -> bytes:
    """A program in ONNX with a dynamic batch, checked against torch on `probes`.

    Args:
        name: for messages.
        program: in evaluation mode; takes the probes in their order.
        probes: by the name that the input gets; (n, width) float32 each.
        output: the name that the output gets.

    Raises:
        ConfigError: it cannot be exported, or does not conform.
    """
    rows = torch.export.Dim("n", min=1, max=MAX_BATCH)
    given = tuple(probes.values())
    try:
        with quiet(), torch.no_grad():
            traced = torch.export.export(program, given, dynamic_shapes=tuple({0: rows} for _ in given))
            exported = torch.onnx.export(
                traced, input_names=list(probes), output_names=[output], opset_version=OPSET, dynamo=True, verbose=False
            )
    except Exception as error:  # the exporters have no class of their own for what they cannot trace
        raise ConfigError(f"{name} cannot be exported to ONNX: {type(error).__name__}: {error}") from error
    assert exported is not None
    data: bytes = _bare(exported.model_proto).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(*arrays: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = session.run(None, dict(zip(probes, arrays, strict=True)))[0]
        return result

    check(name, program, run, given)
    check(name, program, run, [probe[-1:] for probe in given])
    return data


def _bare(model: Any) -> Any:
    """Without what the exporter notes beside each operation: most of a small program, and this machine's paths."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")  # shapes in between, which ONNX Runtime finds itself
    return model
