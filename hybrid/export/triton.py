"""A network as Triton models: server tower and head in ONNX, checked against torch, in a model repository."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from hybrid.export.conformance import embedding_probes, slot_probes
from hybrid.export.onnx import MAX_BATCH, onnx_bytes
from hybrid.network import Correction, Network

Backend = Literal["python", "onnxruntime"]
QUEUE_DELAY_US = 200  # how long the dynamic batcher may wait for company


@dataclass(frozen=True)
class Tensors:
    """Names and widths of one Triton model's tensors, each (n, width) float32."""

    inputs: Mapping[str, int]
    output: str
    output_width: int


class HeadProgram(nn.Module):
    """The head as it is served: a probability, in a column of its own since Triton has no (n,) tensors."""

    def __init__(self, head: nn.Module, correction: Correction) -> None:
        super().__init__()
        self.head, self.correction = head, correction

    def forward(self, server: Tensor, device: Tensor) -> Tensor:
        """(n, a), (n, b) -> (n, 1) in [0, 1]."""
        return self.correction(self.head(server, device)).unsqueeze(-1)  # type: ignore[no-any-return]


def export(network: Network, version: int, repository: Path, *, backend: Backend = "python") -> tuple[str, str]:
    """Writes both Triton models of one version, beside the versions already there.

    Each is complete before it appears in the repository, since Triton may be
    polling it. Tensors are as `hybrid.deployment.Deployment` documents them.

    Args:
        network: with the version's weights.
        version: the Triton version; >= 1. One that exists is replaced.
        repository: Triton's model repository.
        backend: "python" for the server of the local stack (ONNX Runtime inside
            Triton's Python backend), "onnxruntime" for Triton's own image.

    Returns:
        Names of the server tower's and of the head's model.

    Raises:
        ConfigError: a part cannot be exported, or its export does not give what
            torch gives to 1e-5. The repository is then as it was.
    """
    a, b = network.server_embedding, network.device_embedding
    slots = network.model.server_features
    tower, head = f"{network.model.name}_server_tower", f"{network.model.name}_head"
    tensors = {
        tower: Tensors({"slots": len(slots)}, "embedding", a),
        head: Tensors({"server": a, "device": b}, "prediction", 1),
    }
    files = {
        tower: _onnx(tower, network.server_program(), tensors[tower], slot_probes(slots)),
        head: _onnx(head, HeadProgram(network.head, network.correction).eval(), tensors[head], *embedding_probes(a, b)),
    }
    repository.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        _publish(repository / name, version, data, config(name, tensors[name], backend), backend)
    return tower, head


def _onnx(name: str, program: nn.Module, tensors: Tensors, *probes: Tensor) -> bytes:
    return onnx_bytes(name, program, dict(zip(tensors.inputs, probes, strict=True)), tensors.output)


def config(name: str, tensors: Tensors, backend: Backend) -> str:
    """Triton's `config.pbtxt`: batches up to `MAX_BATCH`, gathered for a short time; every version served."""
    inputs = ", ".join(_tensor(*tensor) for tensor in tensors.inputs.items())
    return f"""\
name: "{name}"
backend: "{backend}"
max_batch_size: {MAX_BATCH}
input [ {inputs} ]
output [ {_tensor(tensors.output, tensors.output_width)} ]
dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY_US} }}
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
version_policy: {{ all: {{}} }}
"""


def _tensor(name: str, width: int) -> str:
    return f'{{ name: "{name}", data_type: TYPE_FP32, dims: [ {width} ] }}'


def _publish(target: Path, version: int, data: bytes, text: str, backend: Backend) -> None:
    """Builds the model beside the repository, where Triton does not look, then renames it into place."""
    repository = target.parent
    with tempfile.TemporaryDirectory(dir=repository.parent, prefix=f".{repository.name}-") as folder:
        draft = Path(folder) / target.name
        (draft / str(version)).mkdir(parents=True)
        (draft / str(version) / "model.onnx").write_bytes(data)
        if backend == "python":
            shutil.copy(Path(__file__).with_name("triton_onnx_model.py"), draft / str(version) / "model.py")
        (draft / "config.pbtxt").write_text(text)
        if not target.exists():
            draft.rename(target)
            return
        (draft / "config.pbtxt").replace(target / "config.pbtxt")
        if (target / str(version)).exists():
            (target / str(version)).rename(Path(folder) / "replaced")
        (draft / str(version)).rename(target / str(version))
