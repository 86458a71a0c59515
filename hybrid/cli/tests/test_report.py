from __future__ import annotations

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from hybrid.analytics.results import keep
from hybrid.cli import app
from hybrid.cli.tests.test_privacy import FILE, NETWORK
from hybrid.errors import ConfigError, NotFound
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.report.tests.examples import numbers
from hybrid.spec import load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace

TRAINED = TrainingRecord(
    kind="federated",
    run="monday",
    population="taxi",
    users=500,
    examples=900,
    epsilon=0.5,
    delta=1e-5,
    unit="user",
    protects="device features",
    assumption="nobody sees who took part",
    oracle={"auc": 0.7654, "auc_without_server": 0.6, "auc_without_device": 0.7},
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A workspace with a registered model; its folder is the current one."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(FILE)
    Registry(Workspace.current()).register(load_model(tmp_path / "model.py"), NETWORK, tmp_path / "model.py")
    return tmp_path


def hybrid(*words):
    return CliRunner().invoke(app, ["report", *words], catch_exceptions=False)


def spend(run, purpose):
    folder = Workspace.current().runs / run
    with Ledger.open(folder, budget_epsilon=4.0, delta=1e-5) as ledger:
        ledger.spend(GaussianEvent(20.0), purpose=purpose, clip=1.0, round_number=1)
    (folder / "config.json").write_text(json.dumps({"model": "taxi"}))
    return folder


def answer(run):
    """Keeps an answer about temperature that says that this run's ledger paid for it."""
    shown = numbers().shown
    paid = shown["spend"] | {"run": run, "protects": "device features", "assumption": "it is a test"}
    keep(Workspace.current().runs / run, "analyze", shown | {"model": "taxi", "spend": paid}, mark="noised")


def test_a_registered_model_alone_has_a_page_and_it_costs_nothing(project):
    """Nothing was trained or asked: commands are shown; no folder of runs comes of it."""
    printed = hybrid("taxi").stdout
    assert "Nothing was spent" in printed
    content = (project / "taxi.html").read_text()
    assert "hybrid train taxi" in content
    assert "hybrid analyze taxi trips" in content
    assert not Workspace.current().runs.exists()


def test_versions_curves_answers_and_spending_are_shown_and_ledgers_stay_as_they_are(project):
    """AUC 0.765 of the record, its curve, an answer, and both purposes; byte by byte nothing changed under runs/."""
    registry = Registry(Workspace.current())
    curves = {"oracle_auc": [(1, 0.71), (2, 0.7654)]}
    digest = registry.definition_hash("taxi")
    registry.create_version("taxi", weights={"a": np.zeros(2)}, training=TRAINED, curves=curves, expected_hash=digest)
    registry.set_alias("taxi", 1, "production")
    spend("monday", "train")
    spend("tuesday", "analyze")
    answer("tuesday")
    files = [file for file in Workspace.current().runs.rglob("*") if file.is_file()]
    before = [file.read_bytes() for file in files]
    hybrid("taxi", "--output", "page.html")
    assert [file.read_bytes() for file in files] == before
    content = (project / "page.html").read_text()
    for said in ("0.765", "AUC by round", "temperature", "production", "train: ", "analyze: ", "it is a test"):
        assert said in content, said
    assert registry.curves("taxi", 1) == curves


def test_an_answer_that_no_ledger_paid_for_is_not_shown(project):
    """Its run has spent on training only: the page says that an answer is left out, and why."""
    spend("monday", "train")
    answer("monday")
    hybrid("taxi")
    content = (project / "taxi.html").read_text()
    assert "<bdi>temperature</bdi>" not in content
    assert "the ledger of monday has no such spend" in content


def test_one_run_alone(project):
    """--run shows what is of that run, and knows which there are."""
    for run in ("monday", "tuesday"):
        spend(run, "analyze")
    answer("monday")
    hybrid("taxi", "--run", "tuesday")
    content = (project / "taxi.html").read_text()
    assert "temperature" not in content
    assert re.findall(r"<h3><bdi>run (\w+)</bdi></h3>", content) in ([], ["tuesday"])
    with pytest.raises(NotFound, match="taxi has no run 'friday'; it has: monday, tuesday"):
        hybrid("taxi", "--run", "friday")


@pytest.mark.parametrize(
    ("output", "said"), [("page.pdf", "must end with .html, got 'page.pdf'"), ("no/page.html", "a folder that exists")]
)
def test_a_page_that_cannot_be_written_is_a_sentence(project, output, said):
    """Before anything is read."""
    with pytest.raises(ConfigError, match=said):
        hybrid("taxi", "--output", output)


def test_a_damaged_answer_is_named(project):
    """The file is in the message, and no page is left."""
    folder = spend("monday", "analyze") / "results"
    folder.mkdir()
    (folder / "analyze-0001.json").write_text("{")
    with pytest.raises(ConfigError, match=r"monday/results/analyze-0001\.json"):
        hybrid("taxi")
    assert not (project / "taxi.html").exists()
