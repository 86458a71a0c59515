"""The check of the cut, and that NumPy and torch compute the same from the same inputs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hybrid import (
    Bucketize,
    Categorical,
    Clear,
    Entity,
    Hash,
    HybridModel,
    Label,
    Log1p,
    Numeric,
    Privacy,
    Server,
    View,
)
from hybrid.errors import ConfigError
from hybrid.features import Features
from hybrid.network import DeviceProgram, Encoder, Network, Transforms
from hybrid.version import Learned, TrainingRecord, Version

EVERY_KIND = Features.of(
    {
        "temperature": Numeric(mean=60, std=20),
        "tiny": Numeric(mean=0, std=1e-30, clip=3),
        "count": Log1p(mean=1, std=0.5),
        "hours": Bucketize(edges=(1.0, 24.0, 168.0)),
        "sign": Bucketize(edges=(0.0,)),
        "habit": Categorical(vocabulary=("never", "often")),
        "place": Hash(buckets=5),
    }
)
EDGES = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -1e-45, 1e-38, 0.0, -0.0, 1.0, 24.0, 168.0]
NEAR = [float(np.nextafter(np.float32(e), np.float32(to))) for e in (1.0, 24.0, 168.0) for to in (-np.inf, np.inf)]
numbers = st.sampled_from(EDGES + NEAR) | st.floats(width=32)
texts = st.none() | st.text(max_size=3) | st.sampled_from(["Cafe\u0301", "Caf\u00e9"])
inputs_of_a_row = st.tuples(*[numbers] * 5, st.sampled_from([0, 1, 2, 3]), st.sampled_from([0, 1, 5]))


class Join(nn.Module):
    """Scores two embeddings of size 4 each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, server: torch.Tensor, device: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([server, device], dim=1)).squeeze(-1)


class Across(nn.Module):
    """Adds the mean of all rows to each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.linear(rows + rows.mean(dim=0))


class Column(Join):
    """Forgets to squeeze."""

    def forward(self, server: torch.Tensor, device: torch.Tensor) -> torch.Tensor:
        return super().forward(server, device).unsqueeze(-1)


HEARD: list[Any] = []


class Tells(nn.Linear):
    """Keeps what it hears where another part can find it."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        HEARD.append(rows)
        return super().forward(rows)


class Listens(nn.Linear):
    """Adds what another part was given."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) + (HEARD[-1].sum() if HEARD else 0)


class TellsWhenTold(Tells):
    """Keeps a number where export sees none."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return nn.Linear.forward(self, rows)
        HEARD.append(rows)
        return nn.Linear.forward(self, rows)


class Branches(nn.Linear):
    """Another operation for some inputs."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) if rows.sum() > -1e9 else rows


class Conditional(nn.Linear):
    """The same in an operation of its own."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cond(super().forward(rows).sum() > 1e9, torch.sin, torch.cos, (rows,))


class Scales(nn.Linear):
    """By a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) * self.scale


class Forgets(Scales):
    """By a buffer that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        del self.scale
        self.register_buffer("scale", torch.ones(4), persistent=False)


class Counts(nn.Linear):
    """Its runs, in a buffer."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return super().forward(rows)


def model(**changes: Any) -> HybridModel:
    fields: dict[str, Any] = {
        "name": "taxi",
        "server": Server(
            service="zones",
            entity=Entity(name="zone", join_key="zone_id"),
            views=(View(name="zones", source="zones.parquet", features={"demand": Numeric()}),),
            max_feature_age=timedelta(hours=1),
        ),
        "device": {"habit": Categorical(vocabulary=("never", "often"))},
        "server_tower": lambda: nn.Linear(2, 4),  # a number is two columns
        "device_tower": lambda: nn.Linear(4, 4),  # a vocabulary of two is four: unseen, missing
        "head": Join,
        "label": Label(column="rode", visible_to="server"),
        "privacy": Privacy(epsilon=4, delta=1e-5, clip=1.0, unit="user"),
        "merge": "server",
        "release": Clear(reason="for a test of the network"),
    }
    return HybridModel(**fields | changes)


def refused(message: str, **changes: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        Network.build(model(**changes))


def test_a_network_knows_its_sizes():
    """Linear(2, 4) has 12 parameters, Linear(4, 4) 20, Linear(8, 1) 9."""
    description = Network.build(model()).description()
    assert (description["server_embedding"], description["device_embedding"]) == (4, 4)
    assert description["parameters"] == {"server_tower": 12, "device_tower": 20, "head": 9}


def test_embeddings_that_do_not_fit_the_head_are_refused():
    """The head takes 4 and 4, the device tower gives 3: both sizes are in the message."""
    refused(
        r"head must take a \(3, 4\) server and a \(3, 3\) device embedding, but: RuntimeError",
        device_tower=lambda: nn.Linear(4, 3),
    )


def test_a_tower_takes_its_own_side_alone():
    """Server and device columns are 6 together; a tower that wants them all does not get them."""
    refused(r"server_tower must take \(3, 2\) float32, but", server_tower=lambda: nn.Linear(6, 4))
    refused(r"device_tower must take \(3, 4\) float32, but", device_tower=lambda: nn.Linear(6, 4))


def test_batch_norm_is_refused():
    """It mixes people's rows, in training at least."""
    refused(
        "device_tower must not hold BatchNorm: it mixes people's rows; use LayerNorm or GroupNorm",
        device_tower=lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    )


def test_a_tower_of_one_batch_size_is_refused():
    """It takes the three rows of the probe, and not one."""
    refused(
        r"device_tower must take \(1, 4\) float32 too, but: RuntimeError",
        device_tower=lambda: nn.Sequential(nn.Linear(4, 4), nn.Unflatten(0, (3, 1)), nn.Flatten(1)),
    )


def test_rows_that_mix_are_refused():
    """A row's embedding must be the same alone and among others."""
    refused("device_tower must compute each row by itself", device_tower=Across)


def test_shared_tensors_are_refused():
    """One layer in both towers would carry gradients across the cut, and device data with them."""
    shared = nn.Linear(2, 4)
    refused(
        "device_tower shares a tensor with server_tower: the towers may meet only in the head",
        server_tower=lambda: shared,
        device_tower=lambda: nn.Sequential(nn.Linear(4, 2), shared),
    )


def test_a_shared_weight_in_another_layer_is_refused():
    """Two layers, one tensor: still shared."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    refused(
        "device_tower shares a tensor",
        server_tower=lambda: nn.Sequential(nn.Linear(2, 4), first),
        device_tower=lambda: second,
    )


@pytest.mark.parametrize("teller", [Tells, TellsWhenTold])
def test_what_a_tower_keeps_of_its_input_reaches_no_other(teller: type[nn.Module]):
    """A tower that adds what the other was given before is seen, though no tensor is shared."""
    HEARD.clear()
    refused(
        "device_tower must give the same for the same input, whatever the parts were given before",
        server_tower=lambda: teller(2, 4),
        device_tower=lambda: Listens(4, 4),
    )


@pytest.mark.parametrize("tower", [Counts, lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))])
def test_a_tower_that_changes_its_input_or_its_state_is_refused(tower: Any):
    """Rows would no more be what they were, or predictions depend on those before."""
    refused("device_tower must not change its input, a parameter or a buffer", device_tower=tower)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (lambda: Branches(4, 4), "device_tower must run the same operations on every input, of any number of rows"),
        (lambda: Conditional(4, 4), "device_tower must compute each row by itself, but it branches"),
        (Scales, "device_tower reads the tensor '.*', which is neither a parameter nor a persistent buffer"),
        (Forgets, "device_tower reads the tensor 'scale', which is neither a parameter nor a persistent buffer"),
    ],
)
def test_a_tower_that_no_export_can_hold_is_refused_before_it_is_trained(
    tower: Any, message: str, capfd: pytest.CaptureFixture[str]
):
    """The description that is registered is of its exported graph; the message is all that is printed."""
    with pytest.raises(ConfigError, match=message):
        Network.build(model(device_tower=tower)).description()
    assert capfd.readouterr() == ("", "")


def test_the_description_covers_what_a_part_computes():
    """Twice a head's logits: the same modules, parameters and shapes, and another description of the head alone."""
    doubled = type("Join", (Join,), {"forward": lambda self, a, b: 2 * Join.forward(self, a, b)})
    one, other = (Network.build(model(head=head)) for head in (Join, doubled))
    first, second = one.description(), other.description()
    assert {**first, "graphs": None} == {**second, "graphs": None}
    assert {part for part in first["graphs"] if first["graphs"][part] != second["graphs"][part]} == {"head"}
    with pytest.raises(ConfigError, match="changed since it was registered"):
        other.check_registered(first)


def test_the_description_is_the_same_for_every_seed_and_process():
    """Dropout in a tower included: what is described is evaluation."""
    here = Network.build(_with_dropout(), seed=3).description()
    code = (
        "import json, sys; from hybrid.network import Network; import runpy; "
        f"m = runpy.run_path({__file__!r}); print(json.dumps(Network.build(m['_with_dropout']()).description()))"
    )
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        there = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout
        assert json.loads(there) == here


def _with_dropout() -> HybridModel:
    return model(device_tower=lambda: nn.Sequential(nn.Dropout(0.5), nn.LazyLinear(4), nn.Tanh()))


def test_a_head_gives_one_logit_a_row():
    """(n, 1) would broadcast against (n,) labels."""
    refused(r"head must return \(n,\) logits, got shape \(3, 1\) for n = 3", head=Column)


def test_a_factory_that_fails_or_builds_no_module_is_named():
    """Either way the message has the part."""
    refused("server_tower must build a torch.nn.Module, got ZeroDivisionError", server_tower=lambda: 1 / 0)
    refused("device_tower must return a torch.nn.Module, got list", device_tower=list)


def test_a_tower_that_does_not_compute_in_float32_is_refused():
    """Every side computes in float32."""
    refused("server_tower must return", server_tower=lambda: nn.Flatten(0))


def test_the_seed_decides_the_weights_and_nothing_else():
    """The caller's generator is as it was, equal seeds give equal weights, others do not."""
    before = torch.random.get_rng_state()
    one, again, other = (Network.build(model(), seed=seed).weights()["head.linear.weight"] for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert (one == again).all()
    assert (one != other).any()


def test_weights_come_back_as_they_went():
    """What one network gives, another takes; another network's are refused."""
    source, target = Network.build(model(), seed=1), Network.build(model(), seed=2)
    target.load_weights(source.weights())
    for name, value in source.weights().items():
        np.testing.assert_array_equal(target.weights()[name], value)
    with pytest.raises(ConfigError, match="device_tower: the weights are of another network"):
        Network.build(model(device_tower=lambda: nn.Linear(4, 4, bias=False))).load_weights(source.weights())


def test_a_correction_shifts_the_logits_and_travels_with_the_weights():
    """A logit of 0 shifted by -log 3 is odds of 1 : 3, a quarter; weights of before there was one have none."""
    network, other = Network.build(model()), Network.build(model())
    before = network.weights()
    assert network.correction(torch.zeros(2)).tolist() == [0.5, 0.5]
    network.correction.set_shift(-math.log(3))
    other.load_weights(network.weights())
    np.testing.assert_allclose(other.correction(torch.zeros(2)).numpy(), [0.25, 0.25], rtol=1e-6)
    other.load_weights({name: value for name, value in before.items() if not name.startswith("correction.")})
    assert float(other.correction.shift) == 0


def test_a_correction_is_no_part_of_a_definition_and_nothing_trains_it():
    """The description is the same with a shift; the parameters that travel have it neither way."""
    network = Network.build(model())
    before = network.description()
    network.correction.set_shift(1.0)
    assert network.description() == before
    assert not list(network.correction.parameters())


@given(
    st.lists(
        st.tuples(*[numbers] * 5, st.sampled_from([0, 1, 2, 3]), st.sampled_from([0, 1, 5])), min_size=1, max_size=8
    )
)
def test_numpy_and_torch_agree_on_every_input(rows: list[tuple[float, ...]]):
    """Inputs, NaN, infinities, denormals and edges among them, give the same slots and the same columns.

    log1p is another library's on each side, so slots may differ in the last digits.
    """
    inputs = np.asarray(rows, dtype=np.float32)
    slots = EVERY_KIND.slots(inputs)
    torch_slots = Transforms(EVERY_KIND)(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(torch_slots, slots, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(torch_slots[:, 3:], slots[:, 3:])
    np.testing.assert_array_equal(Encoder(EVERY_KIND)(torch.from_numpy(slots)).numpy(), EVERY_KIND.encode(slots))


@given(
    st.lists(
        st.tuples(numbers, st.none() | st.text(max_size=3) | st.sampled_from(["Cafe\u0301", "Caf\u00e9"])), min_size=1
    )
)
def test_raw_values_give_a_finite_encoding_on_both_sides(rows: list[tuple[float, str | None]]):
    """Whatever people's devices hold, a tower gets finite columns, and the same ones."""
    features = Features.of({"rate": Numeric(), "place": Categorical(vocabulary=("Caf\u00e9",))})
    rates, places = zip(*rows, strict=True)
    inputs = features.inputs({"rate": list(rates), "place": list(places)})
    encoded = features.encode(features.slots(inputs))
    assert np.isfinite(encoded).all()
    program = DeviceProgram(features, nn.Identity())
    np.testing.assert_allclose(program(torch.from_numpy(inputs)).numpy(), encoded, rtol=1e-6)


LATER = {"trips": Numeric(normalise="federated", low=0, high=100)}


def learned_version(network: Network, transforms: dict[str, Any]) -> Version:
    learned = Learned(transforms=transforms, users=9, run="r") if transforms else None
    training = TrainingRecord(kind="federated", run="r", population="p", users=9, examples=9, learned=learned)
    return Version("taxi", 1, "ab", {}, training, network.weights())


def test_a_network_is_built_before_its_constants_are_learned():
    """It can be described and registered; its device program, which would compute with them, cannot be had."""
    network = Network.build(model(device=LATER, device_tower=lambda: nn.Linear(2, 4)))
    assert network.description()["device_embedding"] == 4
    with pytest.raises(ConfigError, match="the constants of trips are not learned yet"):
        network.device_program()


def test_the_network_of_a_version_computes_with_the_constants_it_learned():
    """(60 - 50) / 20 = 0.5 reaches the tower, whose weights are the version's too."""
    declared = model(device=LATER, device_tower=lambda: nn.Linear(2, 4))
    trained = Network.build(declared, seed=7)
    network = Network.of(declared, learned_version(trained, {"trips": Numeric(mean=50, std=20)}))
    with torch.no_grad():
        embedding = network.device_program()(torch.tensor([[60.0]]))
        expected = trained.device_tower(torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(embedding, expected)


def test_a_version_without_the_constants_that_its_model_needs_is_refused():
    """Nothing stands in their place."""
    declared = model(device=LATER, device_tower=lambda: nn.Linear(2, 4))
    with pytest.raises(ConfigError, match=r"must be learned of \['trips'\], as it declares, got those of \[\]"):
        Network.of(declared, learned_version(Network.build(declared), {}))
