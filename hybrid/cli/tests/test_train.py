import inspect

import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.cli.train import train
from hybrid.errors import ConfigError, NotFound
from hybrid.spec import Training


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
