import inspect
import json
import re

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.cli.train import train
from hybrid.errors import BudgetExceeded, ConfigError, FederationError, NotFound
from hybrid.federation.optimizers import ServerOptimizer
from hybrid.federation.training import Outcome
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.spec import Training
from hybrid.workspace import Workspace


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


def test_a_balanced_training_tells_what_it_learned(project):
    """Prior, what devices keep and the shift, after the training and wherever the version is shown."""
    said = project("train", "taxi", "--balance", "0.7")
    assert "label balance: label prior" in said
    assert "label balance" in project("show", "taxi:1")
    shown = json.loads(project("show", "taxi:1", "--json"))["training"]
    assert shown["settings"]["balance"] == 0.7
    assert shown["balance"]["keep"][1] == 1.0


def test_a_refused_training_leaves_no_run(project, tmp_path):
    """Neither under its own name nor under a new one; a name is no path."""
    for words in (("--epsilon", "5"), ("--epsilon", "5", "--run", "monday"), ("--run", "../monday")):
        with pytest.raises(ConfigError):
            project("train", "taxi", *words)
    assert not list((tmp_path / "runs").glob("*"))
    assert not (tmp_path / "monday").exists()


class _Broken(BaseException):
    """Ends a command where it stands. A process that is really killed: integration_tests/test_resume.py."""


def _break(project, *words, at=ServerOptimizer):
    """`hybrid train taxi`, broken off in its second round, or before its version is registered."""
    with pytest.MonkeyPatch.context() as patch:
        _raise_at(patch, at, _Broken)
        with pytest.raises(_Broken):
            project("train", "taxi", *words)


def _raise_at(patch, owner, error):
    name, last = ("step", 3) if owner is ServerOptimizer else ("create_version", 1)  # the first step is a trial
    call, calls = getattr(owner, name), []

    def broken(*arguments, **named):
        calls.append(None)
        if len(calls) == last:
            raise error
        return call(*arguments, **named)

    patch.setattr(owner, name, broken)


def _weights(printed):
    return Registry(Workspace.current()).version("taxi", printed["version"]).weights


@pytest.mark.parametrize("at", [ServerOptimizer, Registry])
def test_a_broken_training_is_resumed_as_it_was_started(project, tmp_path, at):
    """Its fold, seed and settings are read from the run; it gives the version that it would have given."""
    words = ("--fold", "1/4", "--seed", "3", "--server-optimizer", "Adam", "--server-option", "betas=0.8,0.9")
    words += ("--fleet", "phones", "--epsilon", "3")
    whole = json.loads(project("train", "taxi", *words, "--run", "whole", "--json"))
    _break(project, *words, "--run", "broken", at=at)
    resumed = json.loads(project("train", "taxi", "--resume", "--json"))
    assert resumed["training"] == whole["training"] | {"run": "broken"}
    mine, theirs = _weights(resumed), _weights(whole)
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match="run 'broken' is finished: it is taxi:2"):
        project("train", "taxi", "--resume", "--run", "broken")
    with pytest.raises(NotFound, match="no interrupted training of taxi: `hybrid train taxi` starts one"):
        project("train", "taxi", "--resume")


def test_which_training_to_resume_must_be_clear(project):
    """Two that were interrupted are named with how far they came; a run without one, or with no name, is told apart."""
    for name in ("monday", "tuesday"):
        _break(project, "--run", name)
    with pytest.raises(ConfigError, match=r"choose by --run: monday \(. of 3 rounds\), tuesday \(. of 3 rounds\)"):
        project("train", "taxi", "--resume")
    with pytest.raises(NotFound, match="run 'friday' has no training to resume"):
        project("train", "taxi", "--resume", "--run", "friday")
    with pytest.raises(ConfigError, match="--run must be"):
        project("train", "taxi", "--resume", "--run", "../monday")
    with pytest.raises(ConfigError, match="run 'monday' holds an interrupted training"):
        project("train", "taxi", "--run", "monday")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rounds", "4"), "training.rounds of run 'monday' must stay 3 to resume it, got 4"),
        (("--seed", "1"), "seed of run 'monday' must stay 0 to resume it, got 1"),
        (("--fold", "1/3"), "fold of run 'monday' must stay None to resume it, got '1/3'"),
        (("--epsilon", "2"), r"epsilon of run 'monday' must stay 4\.0 to resume it, got 2\.0"),
        (("--central",), "kind of run 'monday' must stay 'federated' to resume it, got 'central'"),
        (("--fleet", "phones"), "fleet"),
        (("--federation", "local"), "federation of run 'monday' must stay None to resume it, got 'local'"),
    ],
)
def test_an_option_given_again_must_say_the_same(broken_project, words, message):
    """Another value is refused, and what it was is named; the same value is no other."""
    with pytest.raises(ConfigError, match=message):
        broken_project("train", "taxi", "--resume", *words)


def test_what_changed_since_is_refused(broken_project, tmp_path):
    """Other rows under the population's name, and another registered model of the same name."""
    rows = pd.read_parquet("rows.parquet")
    rows.assign(trips=rows.trips + 1).to_parquet("rows.parquet")
    words = ("population", "import", "rows.parquet", "--user", "person", "--name", "taxi", "--replace")
    broken_project(*words)
    with pytest.raises(ConfigError, match="the rows to learn from changed since run 'monday' was started"):
        broken_project("train", "taxi", "--resume")
    (tmp_path / "model.py").write_text(
        (tmp_path / "model.py").read_text().replace("(server * device).sum(1)", "server[:, 0] * device[:, 1]")
    )
    broken_project("register", "model.py")
    with pytest.raises(ConfigError, match="the model's registered definition changed since run 'monday'"):
        broken_project("train", "taxi", "--resume")


def test_who_stops_a_training_is_told_how_it_goes_on(project, monkeypatch):
    """Ctrl-C in its second round: exit status 130, and the command, which works."""
    with monkeypatch.context() as patch:
        _raise_at(patch, ServerOptimizer, KeyboardInterrupt)
        result = CliRunner().invoke(app, ["train", "taxi", "--run", "monday"])
    assert result.exit_code == 130
    command = re.search(r"stopped with . of 3 rounds kept: `hybrid (.*)` goes on", result.stderr)[1]
    assert json.loads(project(*command.split(), "--json"))["version"] == 1


class _Falling:
    """A federation without servers, whose ServerApp dies in round 2, once; each round adds 1 to all weights."""

    name, assumption, falls = "local", "as a test says", True

    def train(self, rounds, after):
        for number in range(rounds.done + 1, rounds.settings.rounds + 1):
            if number == 2 and self.falls:
                self.falls = False
                raise FederationError("the ServerApp ended before its last round")
            after(number, rounds.initial + number - rounds.done)
        return Outcome(clip=1.0, failed_rounds=0)


def test_a_federation_that_ends_is_told_how_it_goes_on(project, monkeypatch):
    """The command that the message names works, and needs no --federation."""
    federation = _Falling()
    monkeypatch.setattr("hybrid.cli.train._local_flower", lambda file: federation)
    with pytest.raises(FederationError, match=r"before its last round\n`hybrid .*` goes on") as told:
        project("train", "taxi", "--federation", "local", "--run", "monday")
    command = re.search("`hybrid (.*)`", str(told.value))[1]
    version = json.loads(project(*command.split(), "--json"))
    assert version["training"]["rounds"] == 3
    assert version["training"]["assumption"].endswith("as a test says")
    assert len(Ledger.read(Workspace.current().runs / "monday").entries) == 3


@pytest.fixture
def broken_project(project):
    """One with a training that was broken off, in the run "monday"."""
    _break(project, "--run", "monday")
    return project


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
    """Two lines of it can be pasted."""
    shown = run("--help").stdout
    assert "hybrid train coupon --epsilon 4 --fold 1/5" in shown
    assert "hybrid train coupon --resume --run monday" in shown


def test_an_asynchronous_training_is_resumed_as_it_was_started(project):
    """On phones by default, with the concurrency that was given; the same version as if it had not been broken off."""
    words = (
        "--buffer",
        "10",
        "--separation",
        "2",
        "--max-staleness",
        "2",
        "--server-optimizer",
        "SGD",
        "--concurrency",
        "30",
    )
    whole = json.loads(project("train", "taxi", *words, "--run", "whole", "--json"))
    _break(project, *words, "--run", "broken")
    resumed = json.loads(project("train", "taxi", "--resume", "--json"))
    assert resumed["training"] == whole["training"] | {"run": "broken"}
    mine, theirs = _weights(resumed), _weights(whole)
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert whole["training"]["settings"]["buffer"] == 10
    config = json.loads((Workspace.current().runs / "whole" / "config.json").read_text())
    assert (config["fleet"]["concurrency"], config["fleet"]["deadline_s"]) == (30, 600.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--concurrency", "3"), "--concurrency must be left out without --buffer, got 3"),
        (("--max-staleness", "3"), "--max-staleness must be left out without --buffer, got 3"),
        (("--deadline", "3"), "--deadline must be left out without --fleet or --buffer, got 3"),
        (("--separation", "3", "--sampling", "0.5"), "--sampling must be left out with --separation, .*, got 0.5"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(project, words, message):
    """By its name, and with what it goes together or not."""
    with pytest.raises(ConfigError, match=message):
        project("train", "taxi", *words)


def test_what_a_simulated_fleet_did_is_not_of_held_out_users(project):
    """Without any held out there is no line of them; with some, the fleet's figures have a line of their own."""
    words = ("train", "taxi", "--buffer", "10", "--separation", "1", "--max-staleness", "1")
    alone = project(*words)
    assert "simulated fleet (oracle): fleet_hours" in alone
    assert "held-out users" not in alone
    both = project(*words, "--fold", "1/4")
    (held_out,) = (line for line in both.splitlines() if line.startswith("held-out users (oracle): "))
    assert "auc" in held_out
    assert "fleet_" not in held_out


def test_a_training_whose_buffer_is_too_large_leaves_no_run(project, tmp_path):
    """100 users, 50 updates, twice over, of which each may be late: 50 x (2 + 10)."""
    with pytest.raises(ConfigError, match=r"at most the 100 users, got 50 x \(2 \+ 10\)"):
        project("train", "taxi", "--buffer", "50", "--separation", "2", "--run", "monday")
    assert not (tmp_path / "runs" / "monday").exists()
