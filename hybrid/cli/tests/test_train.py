import inspect
import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.cli.train import train
from hybrid.errors import BudgetExceeded, ConfigError, NotFound
from hybrid.spec import Training

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


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a registered model, its features and its population; (*words) -> what a command prints."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(FILE)
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


def test_trainings_of_one_run_share_one_budget(project, tmp_path):
    """The second is refused and changes no file; one without --run has a folder and a budget of its own."""
    first = json.loads(project("train", "taxi", "--run", "monday", "--json"))
    assert first["run"] == str(tmp_path / "runs" / "monday")
    before = {file.name: file.read_bytes() for file in (tmp_path / "runs" / "monday").iterdir()}
    with pytest.raises(BudgetExceeded):
        project("train", "taxi", "--run", "monday", "--seed", "1")
    assert {file.name: file.read_bytes() for file in (tmp_path / "runs" / "monday").iterdir()} == before
    assert json.loads(project("train", "taxi", "--json"))["version"] == 2
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_refused_training_leaves_no_run(project, tmp_path):
    """Neither under its own name nor under a new one; a name is no path."""
    for words in (("--epsilon", "5"), ("--epsilon", "5", "--run", "monday"), ("--run", "../monday")):
        with pytest.raises(ConfigError):
            project("train", "taxi", *words)
    assert not list((tmp_path / "runs").glob("*"))
    assert not (tmp_path / "monday").exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(*words) -> `hybrid train ...` in a workspace without models."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    return lambda *words: CliRunner().invoke(app, ["train", *words], catch_exceptions=False)


def test_every_field_of_training_has_a_flag():
    """The command takes a keyword for each."""
    assert set(Training.model_fields) <= set(inspect.signature(train).parameters)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--central", "--server-only"), "give one"),
        (("--central", "--epsilon", "4"), "--epsilon must be left out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(run, words, message):
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match=message):
        run("coupon", *words)


def test_an_unknown_model_is_not_found(run):
    """It must be registered first."""
    with pytest.raises(NotFound, match="coupon"):
        run("coupon")


def test_help_teaches_with_an_example(run):
    """Its last line can be pasted."""
    assert "hybrid train coupon --epsilon 4 --fold 1/5" in run("--help").stdout
