from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from hybrid.analytics.results import keep
from hybrid.cli import app
from hybrid.errors import ConfigError, NotFound
from hybrid.privacy.accountant import GaussianEvent, MatrixEvent, epsilon
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.spec import load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace

FILE = """
from datetime import timedelta
from hybrid import Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, View

model = HybridModel(
    name="taxi",
    server=Server(
        service="zones",
        entity=Entity(name="zone", join_key="zone_id"),
        views=(View(name="zones", source="zones.parquet", features={"demand": Numeric()}),),
        max_feature_age=timedelta(hours=1),
    ),
    device={"trips": Numeric()},
    server_tower=lambda: None,
    device_tower=lambda: None,
    head=lambda: None,
    label=Label(column="rode", visible_to="server"),
    privacy=Privacy(epsilon=4, delta=1e-5, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="for a test of the command"),
)
"""
NETWORK = {"server_embedding": 4, "device_embedding": 4, "parameters": {"head": 2}}
TRAIN, QUERY = GaussianEvent(8.0), GaussianEvent(20.0)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A workspace with a registered model; its folder is the current one."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(FILE)
    Registry(Workspace.current()).register(load_model(tmp_path / "model.py"), NETWORK, tmp_path / "model.py")
    return tmp_path


def hybrid(*words):
    return CliRunner().invoke(app, ["privacy", *words], catch_exceptions=False).stdout


def spend(run, *, budget=4.0, delta=1e-5, clips=(0.5, 0.25, 1.0), query=False):
    """A ledger with a training release for each clip, and perhaps one query beside them."""
    with Ledger.open(Workspace.current().runs / run, budget_epsilon=budget, delta=delta) as ledger:
        for number, clip in enumerate(clips, start=1):
            ledger.spend(TRAIN, purpose="train", clip=clip, round_number=number)
        if query:
            ledger.spend(QUERY, purpose="label-rates", clip=6.0, round_number=1)
        return ledger.spent().epsilon


def version(run, epsilon=None, kind="federated"):
    """A version of the model made in a run."""
    registry = Registry(Workspace.current())
    privacy = {"unit": "user", "protects": "device features", "assumption": "for the test of the command"}
    privacy = {} if epsilon is None else privacy | {"epsilon": epsilon, "delta": 1e-5}
    record = TrainingRecord(kind=kind, run=run, population="riders", users=9, examples=90, **privacy)
    return registry.create_version(
        "taxi",
        weights={"head.scale": np.ones(1, np.float32)},
        training=record,
        curves={},
        expected_hash=registry.definition_hash("taxi"),
    )


def test_a_run_shows_what_was_spent_on_what_and_what_is_left(project):
    """Three rounds at clips from 0.25 to 1 and one query: by kind, and together as the accountant says."""
    spent = spend("monday", query=True)
    version("monday", spent)
    assert spent == epsilon([GaussianEvent(8.0, count=3), QUERY], 1e-5).epsilon
    (run,) = json.loads(hybrid("taxi", "--json"))["runs"]
    assert (run["run"], run["versions"], run["epsilon"], run["budget_epsilon"]) == ("monday", [1], spent, 4.0)
    assert run["left"] == pytest.approx(4.0 - spent)
    query, train = run["spent_on"]
    alone = epsilon([GaussianEvent(8.0, count=3)], 1e-5).epsilon
    assert train == {
        "purpose": "train",
        "mechanism": "gaussian",
        "noise_multiplier": 8.0,
        "sampling": 1.0,
        "releases": 3,
        "clip": [0.25, 1.0],
        "epsilon_alone": alone,
    }
    assert (query["purpose"], query["releases"], query["clip"]) == ("label-rates", 1, [6.0, 6.0])
    text = hybrid("taxi")
    for part in (
        f"epsilon {spent:.3f} at delta 1e-05 per user, of 4: {4 - spent:.3f} left; accountant: exact Gaussian",
        f"train: 3 releases, gaussian noise 8 x clip 0.25 to 1, everybody in each; alone epsilon {alone:.3f}",
        "label-rates: 1 release, gaussian noise 20 x clip 6, everybody in each",
        "protects  device features",
        "assumes   for the test of the command",
        "taxi: 1 version, 1 run under differential privacy",
        "per run; repeats and tuning not composed",
    ):
        assert part in text


def test_a_matrix_mechanism_is_shown_as_one_charge_for_its_horizon(project):
    """Two of forty steps and a query: the steps cost 3 / 15, as four releases of z = 10, and the text says for what."""
    matrix = MatrixEvent(noise_multiplier=15.0, sensitivity=3.0, rounds=40, separation=5)
    with Ledger.open(Workspace.current().runs / "turns", budget_epsilon=4.0, delta=1e-5) as ledger:
        ledger.spend(QUERY, purpose="label-rates", clip=6.0, round_number=1)
        for place in (1, 2):
            ledger.spend(matrix, purpose="train", clip=0.5, round_number=place, step=place)
        version("turns", ledger.spent().epsilon)
    (run,) = json.loads(hybrid("taxi", "--json"))["runs"]
    assert run["epsilon"] == epsilon([matrix, QUERY], 1e-5).epsilon
    assert run["spent_on"][1] == {
        "purpose": "train",
        "mechanism": "matrix",
        "noise_multiplier": 15.0,
        "sensitivity": 3.0,
        "rounds": 40,
        "separation": 5,
        "releases": 2,
        "clip": [0.5, 0.5],
        "epsilon_alone": epsilon([matrix], 1e-5).epsilon,
    }
    assert (
        "train: 2 releases, matrix noise 15 x clip 0.5, charged for all 40 rounds of its horizon, "
        "each person at most once in any 5 of them; alone epsilon"
    ) in hybrid("taxi", "--plot", str(project / "turns.svg"))
    assert (project / "turns.svg").stat().st_size > 1000


def test_runs_are_counted_once_and_composed_for_those_in_all_of_them(project):
    """Two versions of one run share its ledger; with another run, six releases at the stricter delta of the two. A
    reference has no part in it and is named.
    """
    monday, tuesday = spend("monday"), spend("tuesday", delta=1e-6)
    for run, spent in (("monday", monday), ("monday", monday), ("tuesday", tuesday)):
        version(run, spent)
    version("central", kind="central")
    shown = json.loads(hybrid("taxi", "--json"))
    assert [(run["run"], run["versions"]) for run in shown["runs"]] == [("monday", [1, 2]), ("tuesday", [3])]
    together = epsilon([GaussianEvent(8.0, count=6)], 1e-6).epsilon
    assert shown["composed"] == {"epsilon": together, "delta": 1e-6, "accountant": "exact Gaussian", "runs": 2}
    text = hybrid("taxi")
    assert "taxi: 4 versions, 2 runs" in text
    assert f"all of the model's runs (2): together epsilon {together:.3f} at delta 1e-06" in text
    assert "version 4 (central) is a reference: trained without a mechanism" in text


def test_one_run_can_be_asked_for(project):
    """The other is left out; what both cost together is still said."""
    version("monday", spend("monday"))
    version("tuesday", spend("tuesday"))
    shown = json.loads(hybrid("taxi", "--run", "tuesday", "--json"))
    assert [run["run"] for run in shown["runs"]] == ["tuesday"]
    assert shown["composed"]["runs"] == 2
    assert "run monday" not in hybrid("taxi", "--run", "tuesday")
    with pytest.raises(NotFound, match="taxi has no run 'friday' that spent privacy; it has: monday, tuesday"):
        hybrid("taxi", "--run", "friday")


def test_a_run_that_goes_on_is_read_and_left_alone(project):
    """Its ledger is open and it has no version: two releases so far, and not a byte of it changes."""
    folder = Workspace.current().runs / "now"
    with Ledger.open(folder, budget_epsilon=4.0, delta=1e-5) as ledger:
        ledger.reserve([GaussianEvent(8.0, count=5)])
        (folder / "config.json").write_text(json.dumps({"model": "taxi"}))
        for number in (1, 2):
            ledger.spend(TRAIN, purpose="train", clip=1.0, round_number=number)
        before = (folder / "ledger.jsonl").read_bytes()
        (run,) = json.loads(hybrid("taxi", "--json"))["runs"]
        assert (run["versions"], run["releases"], run["unit"]) == ([], 2, None)
        assert run["epsilon"] == ledger.spent().epsilon
        assert "versions: none: it goes on, or it failed" in hybrid("taxi")
        assert (folder / "ledger.jsonl").read_bytes() == before


def test_other_models_runs_are_not_this_ones(project):
    """A ledger of another model's run, or of a folder that says nothing, is left out."""
    version("monday", spend("monday"))
    spend("bus")
    (Workspace.current().runs / "bus" / "config.json").write_text('{"model": "bus"}')
    spend("nobody")
    assert [run["run"] for run in json.loads(hybrid("taxi", "--json"))["runs"]] == ["monday"]


def test_a_run_of_another_model_that_paid_for_a_question_is_counted(project):
    """Asked about taxi with --run bus: three releases more, for a person who was in both runs."""
    version("monday", spend("monday"))
    spend("bus")
    folder = Workspace.current().runs / "bus"
    (folder / "config.json").write_text('{"model": "bus"}')
    paid = {"epsilon": 0.2, "delta": 1e-5, "purpose": "train", "releases": 1, "run": "bus"}
    keep(folder, "analyze", {"model": "taxi", "spend": paid}, mark="noised")
    shown = json.loads(hybrid("taxi", "--json"))
    assert {run["run"] for run in shown["runs"]} == {"monday", "bus"}
    assert shown["composed"]["epsilon"] == epsilon([GaussianEvent(8.0, count=6)], 1e-5).epsilon


def test_damage_counts_as_more_spent(project):
    """Of three releases the last is cut: two are shown, three counted."""
    version("monday", spend("monday"))
    ledger = Workspace.current().runs / "monday" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    (run,) = json.loads(hybrid("taxi", "--json"))["runs"]
    assert (run["releases"], run["lost"]) == (2, 1)
    assert run["epsilon"] == epsilon([GaussianEvent(8.0, count=3)], 1e-5).epsilon
    assert "1 release at most that cannot be read, counted as the costliest" in hybrid("taxi")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ledger: ledger.unlink(), "its ledger is missing; its versions spent epsilon {spent:.3f} at least"),
        (
            lambda ledger: ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:3])),
            "its ledger shows less than its versions, which spent epsilon {spent:.3f} at least",
        ),
    ],
)
def test_a_ledger_that_is_not_whole_is_said_to_be_so(project, change, message):
    """It is gone, or its last releases are: the version's claim stands, and no sum over runs is given."""
    spent = spend("monday")
    version("monday", spent)
    version("tuesday", spend("tuesday"))
    change(Workspace.current().runs / "monday" / "ledger.jsonl")
    assert json.loads(hybrid("taxi", "--json"))["composed"] is None
    text = hybrid("taxi")
    assert message.format(spent=spent) in text
    assert "all of the model's runs: not known, since a ledger is not whole" in text


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_epsilon_can_be_drawn(project, suffix):
    """An image of its kind, beside the same words."""
    version("monday", spend("monday", query=True))
    words = hybrid("taxi")
    assert hybrid("taxi", "--plot", f"spent.{suffix}") == words
    image = (project / f"spent.{suffix}").read_bytes()
    assert b"<svg" in image if suffix == "svg" else image.startswith(b"\x89PNG")
    if suffix == "svg":
        hybrid("taxi", "--plot", "again.svg")
        assert b"<dc:date>" not in image


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("spent.pdf", "--plot must end with .svg or .png, got 'spent.pdf'"),
        ("none/spent.svg", "must be in a folder that exists"),
    ],
)
def test_a_plot_that_cannot_be_is_refused(project, file, message):
    """Before anything is read."""
    with pytest.raises(ConfigError, match=message):
        hybrid("taxi", "--plot", file)


def test_a_model_without_runs_says_what_to_do(project):
    """Not trained, or trained as a reference only; unknown as everywhere."""
    with pytest.raises(ConfigError, match="taxi has no trained version; run `hybrid train taxi` first"):
        hybrid("taxi")
    with pytest.raises(NotFound, match="no model 'bus' is registered; registered: taxi"):
        hybrid("bus")
    version("central", kind="central")
    text = hybrid("taxi", "--plot", "empty.svg")
    assert "1 version, 0 runs under differential privacy" in text
    assert "In all" not in text


def test_the_curve_rises_to_what_was_spent(project):
    """From nothing to all releases, never down."""
    from hybrid.cli.privacy import _curve

    spent = spend("monday", query=True)
    releases, epsilons = zip(*_curve(Ledger.read(Workspace.current().runs / "monday"), points=48), strict=True)
    assert releases == (0, 1, 2, 3, 4)
    assert epsilons[0] == 0
    assert list(epsilons) == sorted(epsilons)
    assert epsilons[-1] == spent


def test_help_teaches_with_an_example():
    """Its last line can be pasted."""
    assert "hybrid privacy coupon --plot privacy.svg" in hybrid("--help")
