from datetime import timedelta

import numpy as np
import pytest

from hybrid import Categorical, Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, Training, View
from hybrid.federation.population import Examples


def _server_tower():
    from torch import nn

    return nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 3))


def _device_tower():
    from torch import nn

    return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3))


def _head():
    import torch

    class Score(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.server = torch.nn.Linear(3, 1)

        def forward(self, server, device):
            return self.server(server).squeeze(-1) + (server * device).sum(-1)

    return Score()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Towers this small run slower on two."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model():
    """(**changes) -> a model with one server, one request and one device feature."""

    def build(**changes):
        fields = {
            "name": "tiny",
            "server": Server(
                service="tiny_service",
                entity=Entity(name="offer", join_key="offer_id"),
                views=(View(name="offers", source="offers.parquet", features={"rate": Numeric()}),),
                max_feature_age=timedelta(days=1),
            ),
            "request": {"hour": Categorical(vocabulary=("7AM", "2PM"))},
            "device": {"age": Numeric(mean=30, std=10)},
            "server_tower": _server_tower,
            "device_tower": _device_tower,
            "head": _head,
            "label": Label(column="clicked", visible_to="server"),
            "privacy": Privacy(epsilon=8, delta=1e-3, clip=1.0, unit="user"),
            "merge": "server",
            "release": Clear(reason="a test of training"),
            "training": Training(rounds=20, sampling=0.5, local_lr=0.5, server_lr=0.05),
        }
        return HybridModel(**fields | changes)

    return build


@pytest.fixture(scope="session")
def tiny_examples():
    """(users) -> examples whose label depends on what server and device know together."""

    def build(users, seed=0):
        rng = np.random.default_rng(seed)
        counts = rng.integers(0, 9, users)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        rate, age, hour = rng.normal(size=(3, offsets[-1]))
        server = np.stack([rate, 0 * rate, hour > 0, hour <= 0, 0 * hour, 0 * hour], axis=1).astype(np.float32)
        device = np.stack([age, 0 * age], axis=1).astype(np.float32)
        chance = 1 / (1 + np.exp(-(rate + 2 * age * np.sign(hour))))
        return Examples(server, device, (rng.random(len(rate)) < chance).astype(np.float32), offsets, "tiny")

    return build
