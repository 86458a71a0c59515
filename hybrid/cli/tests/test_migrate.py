"""`hybrid migrate`: once it does what is missing, twice nothing."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.local.process import free_ports
from hybrid.tests.test_tracking import older
from hybrid.tracking import revisions
from hybrid.workspace import Workspace


def migrated(*words):
    """Exit status, and outcomes by what they are about."""
    done = CliRunner().invoke(app, ["migrate", "--json", *words], catch_exceptions=False)
    printed = json.loads(done.stdout)
    assert printed["ok"] == (done.exit_code == 0)
    outcomes = {}
    for step in printed["steps"]:
        outcomes.setdefault(step["what"], []).append(step["outcome"])
    return done.exit_code, outcomes, printed["steps"]


def test_an_upgrade_is_done_once_and_shown_before(project, tmp_path):
    """Folders, MLflow's tables and a feature store that is gone: shown, done, and then already so."""
    workspace = Workspace.current()
    revision = older(workspace.mlflow / "mlflow.db")
    (workspace.feast / "registry.db").unlink()
    folders = ["triton", "bundles", "deployments", "keys", "runs"]
    code, shown, _ = migrated("--dry-run")
    assert (code, shown) == (
        0,
        {"folders": ["would"] * 5, "registry": ["would"], "features of taxi": ["would"], "topics": ["skipped"]},
    )
    assert not (tmp_path / "runs").exists()
    assert revisions(workspace.mlflow / "mlflow.db")[0] == revision
    code, done, steps = migrated()
    assert code == 0
    assert done == {"folders": ["done"] * 5, "registry": ["done"], "features of taxi": ["done"], "topics": ["skipped"]}
    assert sorted(step["detail"].rpartition("/")[2] for step in steps[:5]) == sorted(folders)
    assert steps[6]["detail"] == (
        "applied zones, zones_v1__packed, zones_v1; run `hybrid features materialize taxi` next"
    )
    code, again, _ = migrated()
    assert code == 0
    assert again == {
        "folders": ["already"],
        "registry": ["already"],
        "features of taxi": ["already"],
        "topics": ["skipped"],
    }


def test_a_step_that_fails_does_not_end_the_others(project, tmp_path, monkeypatch):
    """The model's file is gone, and Kafka is away: both are told, and the folders are made."""
    (tmp_path / "model.py").unlink()
    (port,) = free_ports(1)
    code, done, steps = migrated("--kafka", f"127.0.0.1:{port}")
    assert code == 1
    assert (done["features of taxi"], done["topics"], set(done["folders"])) == (["failed"], ["failed"], {"done"})
    assert "which is gone; run `hybrid register model.py` again" in str(steps)


def test_a_registry_that_is_not_the_workspaces_is_left_to_its_owner(project, monkeypatch):
    """Whoever runs the server upgrades its tables; its password is not shown."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:hunter2@db.internal/mlflow")
    _, done, steps = migrated()
    assert done["registry"] == ["skipped"]
    assert "hunter2" not in str(steps)
