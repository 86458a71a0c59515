"""Versions on a real MLflow server, which two workspaces share."""

import sys

import numpy as np
import pytest

from hybrid.errors import RegistryError
from hybrid.local.process import Service, free_ports, http_ok, running
from hybrid.registry import Registry
from hybrid.spec import Training, load_model
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
    release=Clear(reason="for a test of the registry"),
)
"""
TRAINING = TrainingRecord(
    kind="federated",
    run="r1",
    population="riders",
    users=30,
    examples=90,
    epsilon=3.5,
    delta=1e-5,
    protects="device features",
    settings=Training(tower_dropout=0.1),
    oracle={"auc": 0.7},
)
WEIGHTS = {"head.weight": np.array([[1.0, -2.0]], dtype=np.float32)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of an MLflow server that keeps its database and everybody's artifacts in a folder of its own."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")),
    ]
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    service = Service("mlflow", command, http_ok(f"{url}/health"), environment=environment, start_timeout_s=180)
    with running(service, folder):
        yield url, folder


def joined(folder):
    """A workspace that knows the model, whose registry is where the variable says."""
    folder.mkdir()
    (folder / "model.py").write_text(FILE)
    registry = Registry(Workspace(folder / ".hybrid"))
    return registry, registry.register(
        load_model(folder / "model.py"), {"parameters": {"head": 2}}, folder / "model.py"
    )


def test_two_workspaces_have_the_same_versions(server, tmp_path, monkeypatch):
    """What one trains and promotes the other reads, weights, curves and record included; neither has a file of it.

    Weights lie where the server keeps artifacts; then it moves its alias, and the first one sees it.
    """
    url, folder = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    ours, digest = joined(tmp_path / "ours")
    theirs, _ = joined(tmp_path / "theirs")
    assert ours.model("taxi").versions == ()
    curves = {"loss": [(1, 0.9), (2, 0.8)]}
    assert ours.create_version("taxi", weights=WEIGHTS, training=TRAINING, curves=curves, expected_hash=digest) == 1
    ours.set_alias("taxi", 1, "production")
    found = theirs.version("taxi", "production")
    assert (found.number, found.aliases, found.training) == (1, ("production",), TRAINING)
    np.testing.assert_array_equal(found.weights["head.weight"], [[1.0, -2.0]])
    assert theirs.trainings("taxi") == {1: TRAINING}
    assert theirs.curves("taxi", 1)["loss"] == [(1, 0.9), (2, 0.8)]
    assert theirs.created("taxi").keys() == {1}
    assert len(list((folder / "artifacts").rglob("weights.npz"))) == 1
    assert not (tmp_path / "ours/.hybrid/mlflow").exists()
    assert not (tmp_path / "theirs/.hybrid/mlflow").exists()
    doubled = {name: value * 2 for name, value in WEIGHTS.items()}
    assert theirs.create_version("taxi", weights=doubled, training=TRAINING, curves={}, expected_hash=digest) == 2
    theirs.set_alias("taxi", 2, "production")
    theirs.set_alias("taxi", 1, "canary")
    theirs.drop_alias("taxi", "canary")
    assert ours.model("taxi").aliases == {"production": 2}


def test_artifacts_that_are_gone_are_a_sentence(server, tmp_path, monkeypatch):
    """Somebody emptied the server's folder: the version is there, its weights are not."""
    url, folder = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    ours, digest = joined(tmp_path / "ours")
    number = ours.create_version("taxi", weights=WEIGHTS, training=TRAINING, curves={}, expected_hash=digest)
    for file in (folder / "artifacts").rglob("weights.npz"):
        file.unlink()
    with pytest.raises(RegistryError, match=f"^the registry {url} cannot do what it was asked: [A-Z0-9_]+$"):
        ours.version("taxi", number)
