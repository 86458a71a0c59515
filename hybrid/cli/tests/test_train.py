import inspect
import json

import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.cli.train import train
from hybrid.errors import BudgetExceeded, ConfigError, NotFound
from hybrid.spec import Training


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
