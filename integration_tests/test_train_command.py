"""`hybrid train` over a real Feast store and a real MLflow registry."""

import json
import textwrap
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import ConfigError, NotFound
from hybrid.registry import Registry
from hybrid.workspace import Workspace

NOW = datetime.now(UTC).replace(tzinfo=None, microsecond=0)
MODEL = """
    from datetime import timedelta

    from hybrid import Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, Training, View


    def tower():
        from torch import nn

        return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2))


    def head():
        import torch

        class Match(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.server = torch.nn.Linear(2, 1)

            def forward(self, server, device):
                return self.server(server).squeeze(-1) + (server * device).sum(-1)

        return Match()


    model = HybridModel(
        name="clicks",
        server=Server(
            service="clicks_offers",
            entity=Entity(name="offer", join_key="offer_id"),
            views=(View(name="offers", source="offers.parquet", features={"rate": Numeric()}),),
            max_feature_age=timedelta(days=300),
        ),
        device={"age": Numeric(mean=30, std=10)},
        server_tower=tower,
        device_tower=tower,
        head=head,
        label=Label(column="clicked", visible_to="server"),
        privacy=Privacy(epsilon=6, delta=1e-3, clip=1.0, unit="user"),
        merge="server",
        release=Clear(reason="a test of the command"),
        training=Training(rounds=60, sampling=1.0, local_lr=4.0, server_lr=0.05),
    )
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(*words) -> what a `hybrid` command prints, in a project with a registered model and its population.

    Offer o1's rate was 1 a hundred days ago and is -1 today.
    """
    folder = tmp_path_factory.mktemp("project")
    (folder / "model.py").write_text(textwrap.dedent(MODEL))
    old, new = NOW - timedelta(days=100), NOW - timedelta(days=1)
    offers = pd.DataFrame(
        {"offer_id": ["o1", "o1", "o2"], "rate": [1.0, -1.0, 0.5], "event_timestamp": [old, new, old]}
    )
    offers.assign(event_timestamp=offers.event_timestamp.dt.tz_localize("UTC")).to_parquet(folder / "offers.parquet")
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"person": rng.integers(0, 300, 2000), "offer_id": rng.choice(["o1", "o2"], 2000)})
    rows["age"] = rng.normal(30, 10, 2000)
    rows["at"] = np.where(rng.random(2000) < 0.5, NOW - timedelta(days=50), NOW)
    rows["clicked"] = (rng.random(2000) < 1 / (1 + np.exp(-(rows.age - 30) / 5))).astype(int)
    rows.to_parquet(folder / "rows.parquet")

    def invoke(*words):
        return CliRunner().invoke(app, list(words), catch_exceptions=False).stdout

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_HOME", str(folder / ".hybrid"))
        patch.chdir(folder)
        invoke("register", "model.py")
        invoke("features", "apply", "clicks")
        invoke("population", "import", "rows.parquet", "--user", "person", "--time", "at", "--name", "clicks")
        yield invoke


def test_a_training_becomes_a_version_bound_to_its_definition(run):
    """Version, weights, record and curves are in the registry; the run has its ledger."""
    printed = json.loads(run("train", "clicks", "--epsilon", "3", "--fold", "1/4", "--json"))
    workspace = Workspace.current()
    registry = Registry(workspace)
    version = registry.version("clicks", printed["version"])
    assert version.definition_hash == registry.definition_hash("clicks")
    assert version.training.epsilon == printed["training"]["epsilon"] <= 3
    assert version.training.oracle["auc"] > 0.6
    assert (workspace.runs / version.training.run / "ledger.jsonl").exists()
    assert set(version.weights) >= {"server_tower.0.weight", "device_tower.0.weight", "head.server.weight"}


def test_server_features_are_joined_as_they_were_at_each_rows_time(run):
    """Of o1's rows, those of fifty days ago saw rate 1, those of today -1."""
    from hybrid.cli.runs import examples_of

    workspace = Workspace.current()
    rows, _ = examples_of(Registry(workspace).load_model("clicks"), "clicks", None, workspace)
    assert set(np.unique(rows.server[:, 0])) == {-1.0, 0.5, 1.0}


def test_the_references_register_as_versions_without_privacy(run):
    """Both kinds, each in a run of its own."""
    for kind in ("central", "server-only"):
        printed = json.loads(run("train", "clicks", f"--{kind}", "--json"))
        assert printed["training"]["kind"] == kind
        assert printed["training"]["epsilon"] is None


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--epsilon", "7"), ConfigError, "at most the 6 that 'clicks' declares, got 7"),
        (("--population", "nobody"), NotFound, "population 'nobody' does not exist"),
        (("--fold", "one"), ConfigError, "--fold must be K/N"),
        (("--rounds", "0"), ConfigError, "rounds"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_makes_no_version(run, words, error, message):
    """The registry has as many versions after it as before."""
    before = Registry(Workspace.current()).model("clicks").versions
    with pytest.raises(error, match=message):
        run("train", "clicks", *words)
    assert Registry(Workspace.current()).model("clicks").versions == before
