"""What a device runs, as torch modules, and the inputs on which every export of them is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybrid.export.conformance import embedding_probes, input_probes
from hybrid.network import Correction, DeviceProgram, Network


class PredictProgram(nn.Module):
    """The merge on the device: its inputs and the server's embedding -> a probability."""

    def __init__(self, embed: DeviceProgram, head: nn.Module, correction: Correction) -> None:
        super().__init__()
        self.embed, self.head, self.correction = embed, head, correction

    def forward(self, inputs: Tensor, server: Tensor) -> Tensor:
        """(n, device features), (n, server_embedding) -> (n,) in [0, 1]."""
        return self.correction(self.head(server, self.embed(inputs)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Part:
    """One program of a device bundle, before it is exported.

    Attributes:
        program: in evaluation mode.
        probes: what it is checked on, by the names of its inputs: (n, width) each.
        output: name of its output.
    """

    program: nn.Module
    probes: Mapping[str, Tensor]
    output: str


def device_parts(network: Network) -> dict[str, Part]:
    """The device's programs by name.

    Returns:
        "embed": (n, device features) `inputs` -> (n, device_embedding) `embedding`, and
        "predict": `inputs`, (n, server_embedding) `server` -> (n,) `prediction`, a probability.
    """
    inputs = input_probes(network.model.device_features)
    (server,) = embedding_probes(network.server_embedding)
    server = server[torch.arange(len(inputs)) % len(server)]
    embed = network.device_program()
    predict = PredictProgram(embed, network.head, network.correction).eval()
    return {
        "embed": Part(embed, {"inputs": inputs}, "embedding"),
        "predict": Part(predict, {"inputs": inputs, "server": server}, "prediction"),
    }
