"""`hybrid audit inversion` on a trained version and its population."""

from __future__ import annotations

import json

import pytest

from hybrid.errors import ConfigError, NotFound
from hybrid.privacy.mechanisms import local_epsilon

INVERSION = ("audit", "inversion", "taxi", "--fold", "1/3")


@pytest.fixture
def trained(project):
    """(*words) -> what a command prints, once version 1 of taxi is there, which saw two folds of three."""
    project("train", "taxi", "--epsilon", "4", "--fold", "1/3")
    return project


def test_an_audit_says_what_is_recovered_and_what_noise_costs(trained, tmp_path):
    """The linear tower tells the one number; clear it is found, at sigma 10 it is not; in JSON, drawn into a file."""
    words = ("--sigma", "0", "--sigma", "10", "--json", "--plot", str(tmp_path / "inversion.svg"))
    shown = json.loads(trained(*INVERSION, *words))
    clear, noised = shown["levels"]
    assert (shown["model"], shown["version"], shown["oracle"], shown["hidden_from"]) == ("taxi", 1, True, 10.0)
    assert shown["known"] + shown["attacked"] == 100
    assert (clear["epsilon"], clear["declared"], clear["auc_cost"]["mean"]) == (None, True, 0.0)
    assert noised["epsilon"] == local_epsilon(10.0, 1e-3)
    assert clear["features"]["trips"]["recovery"] > 0.9 > 0.5 > clear["features"]["trips"]["prior"]
    assert clear["largest_gain"] > 0.5 > 0.05 >= noised["largest_gain"]
    assert (tmp_path / "inversion.svg").read_text().startswith("<?xml")


def test_the_tables_are_put_in_words(trained):
    """The verdict, what one request means, and that it is an oracle."""
    text = trained(*INVERSION, "--sigma", "10")
    for part in (
        "clear (declared)",
        "From a clear embedding 1 of 1 features are recovered better than by guessing, most of all trips: ",
        f"From sigma 10 (a local epsilon of {local_epsilon(10.0, 1e-3):.3g} a request)",
        "nothing sent",
        "Of one request.",
        "Oracle: ",
    ):
        assert part in text
    assert "learned from" not in text


def test_another_fold_than_that_of_the_training_is_remarked_on(trained):
    """Nearly every held-out person of fold 1/7 was in the training of fold 1/3: its AUC is of people it knows."""
    text = trained("audit", "inversion", "taxi", "--fold", "1/7", "--sigma", "0")
    assert "AUC is too good if it learned from attacked people. Give the --fold that it was trained with." in text


def test_the_registered_definition_must_be_the_version_s(trained, tmp_path):
    """Another definition has other features: no attack on it says anything about the version."""
    file = tmp_path / "model.py"
    file.write_text(file.read_text().replace("Training(rounds=3", "Training(rounds=4"))
    trained("register", "model.py")
    with pytest.raises(ConfigError, match="taxi:1 was trained from another definition"):
        trained(*INVERSION)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ((), ConfigError, "taxi has no trained version; run `hybrid train taxi` first"),
        (("--version", "production"), ConfigError, "taxi has no trained version"),
        (("--plot", "audit.pdf"), ConfigError, "--plot must end with .svg or .png"),
    ],
)
def test_a_wrong_command_is_one_sentence(project, words, error, message):
    """Before anything is attacked."""
    with pytest.raises(error, match=message):
        project(*INVERSION, *words)


def test_a_wrong_option_is_one_sentence(trained):
    """Each says what it must be."""
    for words, error, message in (
        (("--version", "7"), NotFound, "taxi has no version 7; it has: 1"),
        (("--version", "canary"), NotFound, "taxi has no alias 'canary'"),
        (("--sigma", "-1"), ConfigError, "sigma must be finite and >= 0"),
        (("--fold", "4/3"), ConfigError, "fold must be K/N"),
        (("--population", "nobody"), NotFound, "population 'nobody' does not exist"),
    ):
        with pytest.raises(error, match=message):
            trained(*INVERSION, *words)
