from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_runtime.store import Rows
from hybrid import Categorical, Clear, Entity, HybridModel, Label, Log1p, Numeric, Privacy, Server, View
from hybrid.bundle import Bundle, Manifest, read_bundle, write_bundle
from hybrid.export import executorch, onnx
from hybrid.network import Network


class Dot(torch.nn.Module):
    def forward(self, server, device):
        return server.sum(1) + device.sum(1)


MODEL = HybridModel(
    name="meals",
    server=Server(
        service="meals",
        entity=Entity(name="shop", join_key="shop_id"),
        views=(View(name="shops", source=Path("shops.parquet"), features={"rating": Numeric()}),),
        max_feature_age=timedelta(hours=1),
    ),
    request={"time": Categorical(vocabulary=("7AM", "2PM")), "distance": Numeric()},
    device={
        "mood": Categorical(vocabulary=("Zufrieden-Glasklar", "Missmutig-Vertrackt")),
        "steps": Log1p(mean=8, std=2),
        "temperature": Numeric(mean=60, std=20),
    },
    server_tower=lambda: torch.nn.LazyLinear(2),
    device_tower=lambda: torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Tanh()),
    head=Dot,
    label=Label(column="y", visible_to="server"),
    privacy=Privacy(epsilon=8, delta=1e-5, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="a test of the client"),
)


@pytest.fixture(scope="session")
def key() -> Ed25519PrivateKey:
    """The control plane's."""
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(scope="session")
def network() -> Network:
    return Network.build(MODEL)


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    return Manifest(
        model="meals",
        version=7,
        definition_hash="ab" * 32,
        features=MODEL.device_features,
        request={"time": "text", "distance": "number"},
        server_embedding=2,
        device_embedding=4,
        merge="server",
        release=MODEL.release,
        programs={},
    )


@pytest.fixture(scope="session")
def bundle_file(
    network: Network, manifest: Manifest, key: Ed25519PrivateKey, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    file = tmp_path_factory.mktemp("bundle") / "meals-7.bundle"
    programs = executorch.device_programs(network) | onnx.device_programs(network)
    write_bundle(file, manifest, programs, key)
    return file


@pytest.fixture(scope="session")
def bundle(bundle_file: Path, key: Ed25519PrivateKey) -> Bundle:
    return read_bundle(bundle_file.read_bytes(), key.public_key())


@pytest.fixture
def rows() -> Rows:
    """Two devices: 4 has two rows, 9 has one, in which everything optional is missing."""
    return Rows(
        device=np.array([4, 4, 9]),
        row=np.array([0, 1, 0]),
        entity=["shop-1", "shop-2", "shop-1"],
        request={"time": ["7AM", "2PM", None], "distance": [1.5, 2.0, None]},
        features={
            "mood": ["Zufrieden-Glasklar", "Missmutig-Vertrackt", None],
            "steps": [7319.0, 10543.0, None],
            "temperature": [83.4375, 71.8125, None],
        },
    )
