"""A shop whose devices merge: the model file of two tests, which each write it to a folder of their own."""

from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from hybrid import Categorical, Entity, HybridModel, Label, Log1p, Numeric, Privacy, Server, Serving, Training, View


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, server, device):
        return self.linear(torch.cat([server, device], dim=1)).squeeze(-1)


model = HybridModel(
    name="stall",
    server=Server(
        service="sizes_v1",
        entity=Entity(name="shop", join_key="shop_id"),
        views=(View(name="sizes", source=Path("sizes.parquet"), features={"size": Numeric(mean=3, std=2)}),),
        max_feature_age=timedelta(days=30),
    ),
    request={"budget": Numeric()},
    device={
        "mood": Categorical(vocabulary=("Zufrieden-Glasklar", "Missmutig-Vertrackt")),
        "steps": Log1p(mean=8, std=2),
    },
    server_tower=lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 4)),
    device_tower=lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 4)),
    head=Head,
    label=Label(column="bought", visible_to="server"),
    privacy=Privacy(epsilon=8, delta=1e-4, clip=1.0, unit="user"),
    merge="device",
    training=Training(server_tower="federated"),
    serving=Serving(
        missing_entity="device-only",
        unavailable="device-only",
        stale_features="constant",
        constant=0.125,
        contribution=True,
    ),
)
