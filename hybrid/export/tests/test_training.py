from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hybrid.errors import ConfigError
from hybrid.export import training
from hybrid.export.conformance import input_probes
from hybrid.export.tests.conftest import declared
from hybrid.export.training import DeviceLoss, training_program
from hybrid.federation.engine import DeviceSide
from hybrid.network import Network

COACH = Path(__file__).parents[3] / "examples" / "study_coach" / "model.py"


def normed():
    return nn.Sequential(nn.LazyLinear(6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2), nn.Softplus())


def gated():
    return nn.Sequential(nn.LazyLinear(8), nn.GLU(), nn.ELU(), nn.Dropout(0.4), nn.Linear(4, 2), nn.Softmax(dim=1))


def run(data, *inputs):
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(data)
    return [output.clone() for output in program.load_method("forward").execute(list(inputs))]


def batch(network, train, seed=0):
    """Random rows, some values missing; a third lack the server's side, a third the device's, the last is padding."""
    random, rows = torch.Generator().manual_seed(seed), train.rows
    probes = input_probes(network.model.device_features)
    columns = [
        torch.randn(rows, train.server, generator=random),
        probes[torch.randint(len(probes), (rows,), generator=random)],
        torch.randint(2, (rows,), generator=random).float(),
        torch.rand(rows, generator=random) * (torch.arange(rows) < rows - 1),
    ]
    if train.missing:
        columns.append((torch.arange(rows)[:, None] % 3 == torch.arange(2)).float())
    return columns


@pytest.mark.parametrize(
    ("server_tower", "missing"), [(False, False), (True, True)], ids=["server frozen", "federated, tower dropout"]
)
@pytest.mark.parametrize("tower", [None, normed, gated], ids=["tanh", "layer norm and GELU", "gated, softmax"])
def test_loss_and_gradient_are_torch_s(tower, server_tower, missing):
    """At random weights, over rows with missing and extreme values and padding: within 1e-5 of autograd's."""
    network = Network.build(declared(**{"device_tower": tower} if tower else {}), seed=1)
    for vector in network.missing.values():
        nn.init.normal_(vector.weight)
    data, train = training_program(network, server_tower=server_tower, missing=missing, rows=8)
    side = DeviceSide(network, server_tower=server_tower, missing=missing).eval()
    features, server_features = network.model.device_features, network.model.server_features
    for seed in range(5):
        columns = batch(network, train, seed)
        device = torch.from_numpy(features.encode(features.slots(columns[1].numpy())))
        server = torch.from_numpy(server_features.encode(columns[0].numpy())) if server_tower else columns[0]
        logits = side(server, device, *columns[4:])
        losses = nn.functional.binary_cross_entropy_with_logits(logits, columns[2], reduction="none")
        expected = (losses * columns[3]).sum()
        slopes = torch.autograd.grad(expected, list(side.parameters()), allow_unused=True, materialize_grads=True)
        loss, gradient = run(data, torch.from_numpy(side.flat()), *columns)
        np.testing.assert_allclose(float(loss), float(expected), atol=1e-5)
        np.testing.assert_allclose(gradient.numpy(), torch.cat([s.flatten() for s in slopes]).numpy(), atol=1e-5)


def test_parameters_are_in_the_order_of_the_flat_vector(every):
    """Names and shapes of `DeviceSide`: server tower, device tower, head, then the missing embeddings."""
    _, train = training_program(every.network, server_tower=True, missing=True)
    side = DeviceSide(every.network, server_tower=True, missing=True)
    assert [(p.name, p.shape) for p in train.parameters] == [(n, tuple(p.shape)) for n, p in side.named_parameters()]
    assert [name.partition(".")[0] for name in dict.fromkeys(p.name for p in train.parameters)] == (
        ["server_tower"] * 4 + ["device_tower"] * 4 + ["head"] * 2 + ["missing"] * 2
    )
    assert (train.rows, train.server, train.missing) == (16, 7, True)  # five features of Feast's and two of the request


def test_two_versions_of_a_model_have_the_same_program(every):
    """Weights are an input of it: whatever they are, its bytes are the same, and a device need not fetch it again."""
    other = Network.build(declared(), seed=9)
    assert not np.array_equal(DeviceSide(other).flat(), DeviceSide(every.network).flat())
    first, second = (training_program(n, server_tower=False, missing=True) for n in (every.network, other))
    assert first == second


def test_the_network_is_left_as_it_was(every):
    """Exporting and comparing work on a copy."""
    before = deepcopy(every.network.weights())
    training_program(every.network, server_tower=True, missing=True)
    for name, value in every.network.weights().items():
        np.testing.assert_array_equal(value, before[name])


def test_dropout_is_off(coupon):
    """As in a simulation: coupon's device tower drops 30 % in training mode, but its program gives the same twice."""
    data, train = training_program(coupon.network, server_tower=False, missing=False)
    columns = batch(coupon.network, train)
    flat = torch.from_numpy(DeviceSide(coupon.network).flat())
    assert torch.equal(run(data, flat, *columns)[1], run(data, flat, *columns)[1])


class _Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(2)

    def forward(self, rows):
        return torch.linalg.svd(self.linear(rows).unsqueeze(-1))[1] * self.linear(rows)


def test_a_model_whose_gradient_cannot_be_exported_is_refused_with_the_reason():
    """ExecuTorch has no operator for singular values: the message says what was missing."""
    network = Network.build(declared(device_tower=_Sorts))
    with pytest.raises(ConfigError, match=r"the gradient cannot be exported for devices: .*svd.U'"):
        training_program(network, server_tower=False, missing=False)


def test_a_program_that_gives_something_else_is_refused(every, monkeypatch):
    """A gradient that is off by 2e-5 of the largest does not pass."""
    real = training._loss_and_gradient

    def wrong(loss, flat, *batch):
        value, gradient = real(loss, flat, *batch)
        return value, gradient + 2e-4 * (torch.arange(len(gradient)) == 3)

    monkeypatch.setattr(training, "_loss_and_gradient", wrong)
    with pytest.raises(ConfigError, match="differs from torch's by more than 1e-05, so devices cannot train it"):
        training_program(every.network, server_tower=False, missing=False)


def test_a_loss_without_a_frozen_side_s_features_is_the_simulator_s(every):
    """The loss of one row is its cross-entropy: log(1 + e^-logit) for a label of 1."""
    loss = DeviceLoss(every.network, server_tower=False, missing=False).eval()
    server, inputs = torch.ones(1, 3), input_probes(every.network.model.device_features)[:1]
    logit = every.network.head(server, every.network.device_program()(inputs))
    found = loss(server, inputs, torch.ones(1), torch.ones(1))
    np.testing.assert_allclose(float(found), float(torch.log1p(torch.exp(-logit))), rtol=1e-5)
