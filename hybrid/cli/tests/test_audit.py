"""`hybrid audit membership` on a registered model and its population."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import hybrid.cli.audit
from hybrid.cli import app
from hybrid.errors import ConfigError, NotFound
from hybrid.privacy.audit import planted

MEMBERSHIP = ("audit", "membership", "taxi", "--epsilon", "1", "--rounds", "1")


def test_sound_mechanisms_are_not_refuted_and_every_planted_bug_is_seen(project, tmp_path):
    """The model samples everybody: four mechanisms, then three bugs, each with a bound above 1; drawn into a file."""
    words = ("--trials", "20000", "--no-training", "--json", "--plot", str(tmp_path / "audit.svg"))
    shown = json.loads(project(*MEMBERSHIP, *words))
    assert [found["name"] for found in shown["mechanisms"]] == [
        "Gaussian, everybody",
        "Gaussian, adaptive clip, everybody",
        "banded noise, separation 1",
        "blt noise, separation 1",
    ]
    assert all(0.3 < found["epsilon_at_least"] < 1 == found["epsilon_claimed"] for found in shown["mechanisms"])
    assert [found["epsilon_at_least"] > 1 for found in shown["planted_bugs"]] == [True] * 3
    assert (shown["refuted"], shown["unseen"], shown["oracle"]) == ([], [], True)
    assert (tmp_path / "audit.svg").read_text().startswith("<?xml")


def test_the_table_says_what_it_proves_and_what_it_does_not(project):
    """With the training of the model on its population: one row more."""
    text = project(*MEMBERSHIP, "--trials", "500")
    for part in (
        "claimed epsilon 1 at delta 0.001 (oracle)",
        "a training on taxi: Gaussian, everybody",
        "hold together with confidence 0.95",
        "refutes one with a probability of at most 0.05",
        "does not prove the claim",
        "no ledger of the model's pays for it",
    ):
        assert part in text
    assert "REFUTED" not in text


def test_a_mechanism_that_is_refuted_fails_the_command(project, monkeypatch):
    """A mechanism with half the noise among the model's own: its row says so, and the exit status is 1."""

    def buggy(model, epsilon, rounds):
        return planted(epsilon=epsilon, delta=model.privacy.delta, rounds=rounds, sampling=1.0)[:1]

    monkeypatch.setattr(hybrid.cli.audit, "mechanisms", buggy)
    done = CliRunner().invoke(app, [*MEMBERSHIP, "--trials", "20000", "--no-training"])
    assert done.exit_code == 1
    assert "REFUTED: bug: half the noise gives away more than epsilon 1." in done.stdout


def test_an_audit_that_sees_no_planted_bug_fails_the_command(project):
    """A hundred canaries do not tell half the noise from all of it: the audit says that it says nothing."""
    done = CliRunner().invoke(app, [*MEMBERSHIP, "--trials", "100", "--no-training"])
    assert done.exit_code == 1
    assert "NOT SEEN: bug: half the noise. With so few trials this audit says nothing" in done.stdout


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--epsilon", "5"), ConfigError, "at most the 4 that 'taxi' declares, got 5"),
        (("--confidence", "1"), ConfigError, "confidence must be in .0, 1., got 1.0"),
        (("--plot", "audit.pdf"), ConfigError, "--plot must end with .svg or .png"),
        (("--population", "nobody"), NotFound, "population 'nobody' does not exist"),
    ],
)
def test_a_wrong_command_is_one_sentence(project, words, error, message):
    """Before anything is audited."""
    with pytest.raises(error, match=message):
        project("audit", "membership", "taxi", *words)
