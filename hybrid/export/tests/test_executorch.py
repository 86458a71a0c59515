import numpy as np
import pytest
import torch

from hybrid import Numeric
from hybrid.errors import ConfigError
from hybrid.export import executorch
from hybrid.export.conformance import input_probes
from hybrid.export.programs import Part
from hybrid.export.tests.conftest import declared
from hybrid.features import Features
from hybrid.network import Network, Transforms


def load(data: bytes, name: str):
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(data)
    return lambda *inputs: program.load_method(name).execute(list(inputs))[0].numpy().copy()


def part(program: torch.nn.Module, probe: torch.Tensor) -> dict[str, Part]:
    return {"part": Part(program.eval(), {"inputs": probe}, "outputs")}


def test_embed_is_the_device_tower(either):
    """ExecuTorch gives torch's embedding to 1e-5 for missing, infinite, extreme and ordinary inputs."""
    embed = load(either.bundle.programs["device.pte"], "embed")
    for row in input_probes(either.network.model.device_features).split(1):
        expected = either.network.device_program()(row).detach().numpy()
        np.testing.assert_allclose(embed(row), expected, rtol=1e-5, atol=1e-5)


def test_embed_is_the_numpy_reference(either):
    """Transforms and encoding inside the program give what `Features` gives outside it."""
    features = either.network.model.device_features
    inputs = input_probes(features)
    encoded = features.encode(features.slots(inputs.numpy()))
    expected = either.network.device_tower(torch.from_numpy(encoded)).detach().numpy()
    embed = load(either.bundle.programs["device.pte"], "embed")
    got = np.concatenate([embed(row) for row in inputs.split(1)])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_predict_merges_on_the_device(either):
    """Inputs and the server's embedding give the head's probability, corrected by the version's shift; shape (1,)."""
    network, shift = either.network, {"coupon": 0.0, "every": -1.5}[either.network.model.name]
    inputs = input_probes(network.model.device_features)[:1]
    server = torch.linspace(-1, 1, network.server_embedding)[None]
    expected = torch.sigmoid(network.head(server, network.device_program()(inputs)) + shift).detach().numpy()
    got = load(either.bundle.programs["device.pte"], "predict")(inputs, server)
    assert got.shape == (1,)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_two_methods_share_the_tower_s_weights():
    """A tower of 256 x 256 numbers of 4 bytes is in the file once: it is smaller than two of them."""
    model = declared(
        device_tower=lambda: torch.nn.Sequential(torch.nn.LazyLinear(256), torch.nn.Linear(256, 256)),
        head=Beside,
    )
    (data,) = executorch.device_programs(Network.build(model)).values()
    assert 256 * 256 * 4 < len(data) < 2 * 256 * 256 * 4


class Beside(torch.nn.Module):
    """One logit of both embeddings; (n,)."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 + 256, 1)

    def forward(self, server, device):
        return self.linear(torch.cat([server, device], 1)).squeeze(-1)


def test_where_the_delegate_does_not_conform_portable_operators_are_used(monkeypatch: pytest.MonkeyPatch):
    """XNNPACK's bounds of NaN are a number, torch's NaN: given such a program it fails the check and is not used."""
    monkeypatch.setattr(executorch, "PRODUCTS", None)
    missing = torch.full((1, 5), torch.nan)
    bounded = Transforms(Features.of({name: Numeric() for name in "abcde"})).eval()
    data = executorch._pte(part(bounded, missing))
    assert b"XnnpackBackend" not in data
    assert np.isnan(load(data, "part")(missing)).all()


def test_matrix_products_run_on_the_delegate():
    """A linear layer is XNNPACK's; without that a device with a large tower would wait."""
    data = executorch._pte(part(torch.nn.Linear(3, 2), torch.randn(4, 3)))
    assert b"XnnpackBackend" in data


def test_a_tower_that_cannot_be_exported_is_refused():
    """A tower that branches on values has no device program, and the message says which program."""
    with pytest.raises(ConfigError, match="part cannot be exported for devices"):
        executorch._pte(part(Branching(), torch.randn(5, 4)))


class Branching(torch.nn.Module):
    """Takes another path for some values: nothing that a traced program can do."""

    def forward(self, columns):
        return columns if columns.sum() > 1 else -columns
