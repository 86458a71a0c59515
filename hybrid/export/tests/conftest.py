from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from hybrid import (
    Bucketize,
    Categorical,
    Entity,
    Hash,
    HybridModel,
    Label,
    Log1p,
    Noised,
    Numeric,
    Privacy,
    Server,
    View,
)
from hybrid.bundle import Bundle, read_bundle, trusted_key
from hybrid.export.promote import Exported, export_version
from hybrid.network import Network
from hybrid.spec import load_model
from hybrid.version import TrainingRecord, Version
from hybrid.workspace import Workspace

COUPON = Path(__file__).parents[3] / "examples" / "coupon" / "model.py"
ALL = {
    "number": Numeric(mean=60, std=20, clip=3),
    "count": Log1p(mean=1, std=2),
    "hours": Bucketize(edges=(1.0, 24.0, 168.0)),
    "word": Categorical(vocabulary=("a", "b")),
    "hashed": Hash(buckets=7, seed=1),
}


SHIFT = -1.5  # of the logits of "every", as label balancing leaves one


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 1)

    def forward(self, server, device):
        return self.linear(torch.cat([server, device], 1)).squeeze(-1)


def declared(**changes) -> HybridModel:
    """A model with every transform on both sides; embeddings of 3 and 2."""
    fields = {
        "name": "every",
        "server": Server(
            service="every_service",
            entity=Entity(name="item", join_key="item_id", dtype="integer"),
            views=(View(name="items", source=Path("items.parquet"), features=ALL),),
            max_feature_age=timedelta(hours=2),
        ),
        "request": {"place": Categorical(vocabulary=("home",)), "speed": Numeric()},
        "device": {f"own_{name}": transform for name, transform in ALL.items()},
        "server_tower": lambda: torch.nn.Sequential(torch.nn.LazyLinear(6), torch.nn.ReLU(), torch.nn.Linear(6, 3)),
        "device_tower": lambda: torch.nn.Sequential(torch.nn.LazyLinear(5), torch.nn.Tanh(), torch.nn.Linear(5, 2)),
        "head": Head,
        "label": Label(column="y", visible_to="server"),
        "privacy": Privacy(epsilon=8, delta=1e-5, clip=1.0, unit="user"),
        "merge": "server",
        "release": Noised(clip=1.0, sigma=2.0),
    }
    return HybridModel(**(fields | changes))


def version_of(network: Network) -> Version:
    training = TrainingRecord(
        kind="federated",
        run="r",
        population="p",
        users=10,
        examples=100,
        epsilon=8,
        delta=1e-5,
        settings=network.model.training,
    )
    definition = {"declaration": network.model.definition(), "network": network.description()}
    return Version(network.model.name, 2, "ab" * 32, definition, training, network.weights())


@dataclass(frozen=True)
class Promoted:
    """An untrained network, exported as version 2."""

    network: Network
    workspace: Workspace
    exported: Exported

    @property
    def version(self) -> Version:
        return version_of(self.network)

    @property
    def bundle(self) -> Bundle:
        return read_bundle(self.exported.bundle.read_bytes(), trusted_key(self.workspace.keys / "bundle-signing.pub"))


@pytest.fixture(scope="session")
def coupon(tmp_path_factory) -> Promoted:
    return promoted(Network.build(load_model(COUPON)), tmp_path_factory.mktemp("coupon"))


@pytest.fixture(scope="session")
def every(tmp_path_factory) -> Promoted:
    network = Network.build(declared())
    network.correction.set_shift(SHIFT)
    return promoted(network, tmp_path_factory.mktemp("every"))


def promoted(network: Network, folder: Path) -> Promoted:
    workspace = Workspace(folder / ".hybrid")
    return Promoted(network, workspace, export_version(version_of(network), network.model, workspace))


@pytest.fixture(params=["coupon", "every"])
def either(request) -> Promoted:
    return request.getfixturevalue(request.param)
