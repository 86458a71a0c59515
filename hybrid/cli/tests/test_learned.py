"""`hybrid train` learns the constants that a model declares to be learned, within its budget, of those it trains on."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.analytics.normalisation import FILE as LEARNED
from hybrid.cli import app
from hybrid.cli.runs import exactly, people_of
from hybrid.cli.tests.conftest import FILE
from hybrid.errors import ConfigError, NotFound
from hybrid.features import Categorical, Numeric
from hybrid.federation import training
from hybrid.federation.population import Population
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.workspace import Workspace

DEVICE = '{"trips": Numeric(normalise="federated", low=-5, high=5), "habit": Categorical(discover=3)}'


@pytest.fixture
def learning(project, tmp_path):
    """The project with a model whose two device features have constants to learn."""
    text = FILE.replace('{"trips": Numeric()}', DEVICE).replace("import Clear,", "import Categorical, Clear,")
    (tmp_path / "model.py").write_text(text)
    rows = pd.read_parquet("rows.parquet")
    habits = np.where(np.arange(len(rows)) % 3 == 0, "often", "never")
    rows.assign(trips=rows.trips * 2 + 1, habit=habits).to_parquet("rows.parquet")
    project("register", "model.py")
    project("features", "apply", "taxi")
    project("population", "import", "rows.parquet", "--user", "person", "--name", "taxi", "--replace")
    return project


def trained(hybrid, *words):
    return json.loads(hybrid("train", "taxi", *words, "--json"))


def test_a_version_has_the_constants_that_its_training_learned(learning, tmp_path):
    """Paid from the run's ledger, before its rounds, all within the declared epsilon of 4; the registry gives them."""
    record = trained(learning, "--run", "monday", "--normalise-share", "0.5")["training"]
    account = Ledger.read(tmp_path / "runs" / "monday")
    purposes = [entry.purpose for entry in account.entries]
    assert purposes == ["normalise"] * (len(purposes) - 3) + ["train"] * 3
    assert record["learned"]["epsilon"] <= 2 < record["epsilon"] <= 4
    version = Registry(Workspace.current()).version("taxi", 1)
    assert set(version.learned) == {"trips", "habit"}
    assert version.training.learned.run == "monday"
    kept = json.loads((tmp_path / "runs" / "monday" / LEARNED).read_text())
    assert kept["learned"] == record["learned"]
    shown = learning("show", "taxi:1")
    assert "trips (numeric, learned), habit (categorical, learned)" in " ".join(shown.split())
    assert "trips: mean " in shown


def test_a_training_that_is_resumed_has_the_constants_that_it_had(learning, tmp_path, monkeypatch):
    """Broken off in its rounds, it goes on to the version that it would have given, and learns nothing again."""
    whole = trained(learning, "--run", "whole")
    step = training.ServerOptimizer.step
    calls = []

    def broken(*arguments, **named):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(training.ServerOptimizer, "step", broken)
        learning("train", "taxi", "--run", "broken")
    spent = len(Ledger.read(tmp_path / "runs" / "broken").entries)
    resumed = trained(learning, "--resume")
    assert resumed["training"]["learned"] == whole["training"]["learned"] | {"run": "broken"}
    assert resumed["training"]["epsilon"] == whole["training"]["epsilon"]
    normalised = [e for e in Ledger.read(tmp_path / "runs" / "broken").entries if e.purpose == "normalise"]
    assert len(normalised) <= spent
    weights = [Registry(Workspace.current()).version("taxi", one["version"]).weights for one in (resumed, whole)]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_what_was_learned_counts_although_its_training_never_began(learning, monkeypatch):
    """It fails after it paid for its constants: `hybrid privacy` finds them, and there is no training to resume."""

    def broken(*_):
        raise NotFound("some rows have no server features")

    with monkeypatch.context() as patch:
        patch.setattr("hybrid.cli.train.examples_of", broken)
        with pytest.raises(NotFound, match="no server features"):
            learning("train", "taxi", "--run", "broken")
    (run,) = json.loads(learning("privacy", "taxi", "--json"))["runs"]
    assert (run["run"], {each["purpose"] for each in run["spent_on"]}) == ("broken", {"normalise"})
    with pytest.raises(NotFound, match="has no training to resume"):
        learning("train", "taxi", "--resume", "--run", "broken")
    assert trained(learning, "--run", "broken")["version"] == 1


def test_a_reference_has_exact_constants(learning):
    """Of pooled rows, with no epsilon: 2 x + 1 of normal numbers has the mean 1 and the standard deviation 2."""
    found = trained(learning, "--central")["training"]["learned"]
    assert found["epsilon"] is None
    assert found["transforms"]["trips"]["mean"] == pytest.approx(1, abs=0.5)
    assert found["transforms"]["trips"]["std"] == pytest.approx(2, abs=0.5)
    assert found["transforms"]["habit"]["vocabulary"][:2] == ["never", "often"]


def test_constants_are_of_those_who_are_trained_on(learning):
    """Not of held-out users, and not of rows without a label."""
    workspace = Workspace.current()
    model = Registry(workspace).load_model("taxi")
    population = Population.open("taxi", workspace)
    people = people_of(model, "taxi", "1/4", workspace)
    learning_users = ~population.fold(1, 4)
    of_row = np.repeat(learning_users, np.diff(population.offsets))
    assert len(people) == learning_users.sum() < population.users
    assert people.columns["trips"].tolist() == population.column("trips")[of_row].tolist()
    assert np.diff(people.offsets).tolist() == np.diff(population.offsets)[learning_users].tolist()
    rows = pd.read_parquet("rows.parquet")
    rows.assign(rode=rows.rode.astype(float).mask(rows.index % 2 == 0)).to_parquet("half.parquet")
    learning("population", "import", "half.parquet", "--user", "person", "--name", "half")
    people = people_of(model, "half", None, workspace)
    assert (len(people), len(people.columns["trips"])) == (100, 100)
    assert people.offsets[-1] == 100


def test_a_column_of_another_type_is_refused_before_anybody_is_asked(learning, tmp_path):
    """The feature is named, no value is shown, and no run is left."""
    rows = pd.read_parquet("rows.parquet")
    rows.assign(trips="many").to_parquet("words.parquet")
    learning("population", "import", "words.parquet", "--user", "person", "--name", "words")
    with pytest.raises(ConfigError, match="population 'words': feature 'trips': must be numbers, got str"):
        learning("train", "taxi", "--population", "words")
    assert not list((tmp_path / "runs").glob("*"))


def test_an_oracle_computes_with_exact_constants(learning):
    """What sweeps and audits look at; a model that declares all its constants is itself."""
    workspace = Workspace.current()
    model = exactly(Registry(workspace).load_model("taxi"), "taxi", None, workspace)
    assert isinstance(model.device["trips"], Numeric)
    assert isinstance(model.device["habit"], Categorical)
    assert model.device_features.pending == ()
    assert exactly(model, "taxi", None, workspace) is model


def test_nothing_is_asked_where_the_training_would_be_refused(learning, tmp_path):
    """A delta too large for so few people is refused before anybody is asked: no run is left."""
    rows = pd.read_parquet("rows.parquet")
    lots = pd.concat([rows.assign(person=rows.person + 100 * n) for n in range(9)])
    lots.to_parquet("lots.parquet")
    learning("population", "import", "lots.parquet", "--user", "person", "--name", "lots")
    with pytest.raises(ConfigError, match=r"privacy\.delta must be at most"):
        learning("train", "taxi", "--population", "lots")
    assert not list((tmp_path / "runs").glob("*"))


def test_options_of_learning_are_refused_where_nothing_is_learned(project, tmp_path):
    """They would do nothing; no run is left."""
    with pytest.raises(ConfigError, match="taxi declares all its constants, and learns none"):
        project("train", "taxi", "--normalise-share", "0.2")
    assert not list((tmp_path / "runs").glob("*"))


def test_rows_that_cannot_be_trained_on_are_refused_before_anybody_is_asked(learning, tmp_path):
    """Of zones that the feature store does not know nothing is learned: it would be paid for, and of no use."""
    rows = pd.read_parquet("rows.parquet")
    rows.assign(zone_id="airport").to_parquet("elsewhere.parquet")
    learning("population", "import", "elsewhere.parquet", "--user", "person", "--name", "elsewhere")
    with pytest.raises(NotFound, match="200 of 200 rows have no features of their zone"):
        learning("train", "taxi", "--population", "elsewhere")
    assert not list((tmp_path / "runs").glob("*"))


def test_a_vocabulary_of_no_text_is_said_before_the_rounds(learning):
    """At an epsilon of 0.04 noise hides 100 people's habits: rounds would train a feature that says nothing."""
    words = ["train", "taxi", "--normalise-share", "0.01"]
    warned = "habit: no text stood out from the noise, so that the feature will say nothing"
    assert warned in " ".join(CliRunner().invoke(app, words, catch_exceptions=False).stderr.split())
    assert warned not in " ".join(CliRunner().invoke(app, [*words[:2], "--central"]).stderr.split())


def test_frequent_texts_of_a_vocabulary_that_is_not_learned_yet_can_be_asked_for(learning):
    """Two of three say never, the others often: nobody needs to know what texts there are to count them."""
    shown = json.loads(learning("analyze", "taxi", "habit", "--frequent", "3", "--epsilon", "4", "--json"))
    assert set(shown["values"]) <= {"never", "often"}
    with pytest.raises(ConfigError, match="--frequent must be given for 'habit'"):
        learning("analyze", "taxi", "habit", "--epsilon", "4")
