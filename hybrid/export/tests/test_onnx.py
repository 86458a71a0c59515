from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hybrid.errors import ConfigError
from hybrid.export.onnx import onnx_bytes
from hybrid.export.programs import device_parts


def session(program: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["embed", "predict"])
def test_a_device_program_in_onnx_is_torch_s_at_any_number_of_rows(either, name: str):
    """Same inputs by name, 1e-5 for missing, infinite and extreme ones, for one row and for many."""
    part = device_parts(either.network)[name]
    run = session(either.bundle.programs[f"{name}.onnx"])
    for rows in (1, 5, len(part.probes["inputs"])):
        given = {key: probe[-rows:] for key, probe in part.probes.items()}
        expected = part.program(*given.values()).detach().numpy()
        (got,) = run.run([part.output], {key: probe.numpy() for key, probe in given.items()})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_tensors_of_a_device_program_are_float32_and_named(every):
    """5 device features, a server's embedding of 3 and a device's of 2; rows are free."""
    for name, inputs, output in (
        ("embed", {"inputs": 5}, ("embedding", [2])),
        ("predict", {"inputs": 5, "server": 3}, ("prediction", [])),
    ):
        run = session(every.bundle.programs[f"{name}.onnx"])
        assert {tensor.name: tensor.shape[1] for tensor in run.get_inputs()} == inputs
        assert [(tensor.name, tensor.shape[1:]) for tensor in run.get_outputs()] == [output]
        assert {tensor.type for tensor in (*run.get_inputs(), *run.get_outputs())} == {"tensor(float)"}


def test_an_export_says_nothing_of_where_it_was_made(every):
    """The exporter notes stack traces with paths beside each operation: none of them leaves this machine."""
    here = str(Path(__file__).parents[3]).encode()
    for program in (data for name, data in every.bundle.programs.items() if name.endswith(".onnx")):
        assert here not in program
        assert b"stack_trace" not in program
        onnx.checker.check_model(onnx.load_from_string(program))


def test_a_program_that_cannot_be_exported_is_refused():
    """One that branches on values has no ONNX form, and the message says whose."""
    with pytest.raises(ConfigError, match="every_server_tower cannot be exported to ONNX"):
        onnx_bytes("every_server_tower", Branching(), {"slots": torch.randn(5, 4)}, "embedding")


class Branching(torch.nn.Module):
    """Takes another path for some values: nothing that a traced program can do."""

    def forward(self, columns):
        return columns if columns.sum() > 1 else -columns
