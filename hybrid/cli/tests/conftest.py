from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.registry import Registry
from hybrid.workspace import Workspace
from serving.testing import deployment

FILE = """
from datetime import timedelta
from hybrid import Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, Training, View


def tower():
    from torch import nn
    return nn.LazyLinear(2)


def head():
    from torch import nn

    class Product(nn.Module):
        def forward(self, server, device):
            return (server * device).sum(1)

    return Product()


model = HybridModel(
    name="taxi",
    server=Server(
        service="zones_v1",
        entity=Entity(name="zone", join_key="zone_id"),
        views=(View(name="zones", source="zones.parquet", features={"demand": Numeric()}),),
        max_feature_age=timedelta(days=1),
    ),
    device={"trips": Numeric()},
    server_tower=tower,
    device_tower=tower,
    head=head,
    label=Label(column="rode", visible_to="server"),
    privacy=Privacy(epsilon=4, delta=1e-3, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="for a test of the command"),
    training=Training(rounds=3, sampling=1.0),
)
"""


@pytest.fixture(scope="session")
def begun():
    """(folder) -> (*words) -> what a command prints, in a current folder where a model and people are made first."""

    def begin(folder):
        (folder / "model.py").write_text(FILE)
        stamp = [datetime.now(UTC) - timedelta(minutes=5)] * 2
        zones = pd.DataFrame({"zone_id": ["centre", "port"], "demand": [1.0, -1.0], "event_timestamp": stamp})
        zones.to_parquet("zones.parquet")
        rng = np.random.default_rng(0)
        rows = pd.DataFrame({"person": np.arange(200) % 100, "zone_id": rng.choice(["centre", "port"], 200)})
        rows.assign(trips=rng.normal(size=200), rode=rng.integers(0, 2, 200)).to_parquet("rows.parquet")

        def hybrid(*words):
            return CliRunner().invoke(app, list(words), catch_exceptions=False).stdout

        hybrid("register", "model.py")
        hybrid("features", "apply", "taxi")
        hybrid("population", "import", "rows.parquet", "--user", "person", "--name", "taxi")
        return hybrid

    return begin


@pytest.fixture
def project(tmp_path, monkeypatch, begun):
    """A folder with a registered model, its features and its population; (*words) -> what a command prints."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    monkeypatch.chdir(tmp_path)
    return begun(tmp_path)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Of a shop that is served: version 2 is the default, version 1 came before it. Its folder is the current one."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    monkeypatch.chdir(tmp_path)
    workspace = Workspace.current()
    for version in (1, 2):
        deployment(version).write(workspace.deployments)
    return workspace


@pytest.fixture
def aliases(monkeypatch):
    """Of a registry that knows nothing else: what the commands do with a served version needs no more."""
    found = {"production": 2, "canary": 3}
    monkeypatch.setattr(Registry, "set_alias", lambda _, name, number, alias: found.update({alias: number}))
    monkeypatch.setattr(Registry, "drop_alias", lambda _, name, alias: found.pop(alias, None))
    return found
