"""`hybrid register`, `models`, `show` and `features`, from the file to the rows that are served."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import ConfigError, NotFound
from hybrid.registry import Registry
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace

FILE = """
from datetime import timedelta
from hybrid import Categorical, Clear, Entity, HybridModel, Label, Noised, Numeric, Privacy, Server, View


def tower():
    from torch import nn
    return nn.LazyLinear(4)


def head():
    from torch import nn

    class Sum(nn.Module):
        def forward(self, server, device):
            return (server * device).sum(1)

    return Sum()


model = HybridModel(
    name="taxi",
    server=Server(
        service="zones_v1",
        entity=Entity(name="zone", join_key="zone_id"),
        views=(View(name="zones", source="zones.parquet", features={"demand": Numeric(mean=10, std=5)}),),
        max_feature_age=timedelta(hours=1),
    ),
    request={"hour": Categorical(vocabulary=("day", "night"))},
    device={"trips": Numeric()},
    server_tower=tower,
    device_tower=tower,
    head=head,
    label=Label(column="rode", visible_to="server"),
    privacy=Privacy(epsilon=4, delta=1e-5, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="for a test of the command"),
)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model file and its source, and a workspace of its own."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "model.py").write_text(FILE)
    times = [datetime.now(UTC) - timedelta(minutes=30), datetime.now(UTC) - timedelta(hours=2)]
    zones = pd.DataFrame({"zone_id": ["centre", "port"], "demand": [20.0, 5.0], "event_timestamp": times})
    zones.to_parquet(tmp_path / "zones.parquet")
    return tmp_path


def hybrid(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_registering_says_what_was_declared(project: Path):
    """Features by side, sizes, the budget and what it protects, the release and what it discloses; so does showing."""
    shown = hybrid("register", str(project / "model.py"))
    shown_again = hybrid("show", "taxi")
    for part in (
        "demand (numeric)",
        "hour (categorical)",
        "trips (numeric)",
        "server 4, device 4",
        "server_tower 28, device_tower 12, head 0",  # (2 + 4) x 4 + 4 and 2 x 4 + 4
        "epsilon <= 4 at delta 1e-05 per user; protects device features",
        "clear: whoever holds the tower can try inputs until one gives the embedding",
        "for a test of the command",
    ):
        assert part in shown
        assert part in shown_again
    assert "Registered. Next: `hybrid features apply taxi`" in shown


def test_a_noised_release_is_shown_with_its_local_epsilon(project: Path):
    """Noise of 10 clips on a sensitivity of 2 clips (any embedding for any other): mu = 2 / 10."""
    from hybrid.privacy.mechanisms import gaussian_epsilon

    noised = FILE.replace('Clear(reason="for a test of the command")', "Noised(clip=1.0, sigma=10.0)")
    (project / "model.py").write_text(noised)
    expected = f"{gaussian_epsilon(0.2, 1e-5):.3g}"
    assert f"each request has a local epsilon of {expected} at delta 1e-05" in hybrid(
        "register", str(project / "model.py")
    )


def test_a_label_of_the_device_registers_and_says_what_its_training_needs(project: Path):
    """The server has no label to fit its tower on, as it does by default."""
    (project / "model.py").write_text(FILE.replace('visible_to="server"', 'visible_to="device"'))
    shown = hybrid("register", str(project / "model.py"))
    assert "protects device features and label" in shown
    assert "train with --server-tower federated or frozen" in shown


def test_a_model_that_merges_on_the_device_registers_and_says_what_it_gives_away(project: Path):
    """Nothing is released, and the server's embedding is."""
    server = 'merge="server",\n    release=Clear(reason="for a test of the command"),'
    (project / "model.py").write_text(FILE.replace(server, 'merge="device",'))
    said = "none: the device merges, and is sent the server's embedding of the entity that it names"
    assert said in hybrid("register", str(project / "model.py"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('features={"demand"', 'features={"supply"', "zones.supply: 'zones.parquet' has no such column"),
        (
            "(server * device)",
            "(server * device[:, :3])",
            "head must take a (3, 4) server and a (3, 4) device embedding",
        ),
        ("zones.parquet", "none.parquet", "view 'zones': source must be a Parquet file, 'none.parquet' does not exist"),
    ],
)
def test_a_wrong_declaration_is_not_registered(project: Path, old: str, new: str, message: str):
    """It fails with the field and what it must be, and nothing is stored."""
    (project / "model.py").write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        hybrid("register", str(project / "model.py"))
    assert message in str(caught.value)
    assert json.loads(hybrid("models", "--json")) == []


def test_a_registered_model_is_listed_and_shown(project: Path):
    """With its hash, in full for scripts; without a version until it is trained."""
    digest = json.loads(hybrid("register", str(project / "model.py"), "--json"))["definition_hash"]
    (listed,) = json.loads(hybrid("models", "--json"))
    assert (listed["name"], listed["definition_hash"], listed["versions"]) == ("taxi", digest, [])
    assert "not trained" in hybrid("models")
    shown = json.loads(hybrid("show", "taxi", "--json"))
    assert shown["definition"]["declaration"]["privacy"]["epsilon"] == 4
    assert digest in hybrid("show", "taxi")
    with pytest.raises(ConfigError, match="taxi has no trained version; run `hybrid train taxi` first"):
        hybrid("show", "taxi:1")
    with pytest.raises(NotFound, match="no model 'bus' is registered; registered: taxi"):
        hybrid("show", "bus")


def test_a_trained_version_is_shown_with_what_it_cost(project: Path):
    """By number and by alias: epsilon, delta, and metrics of pooled data marked oracle."""
    hybrid("register", str(project / "model.py"))
    registry = Registry(Workspace.current())
    training = TrainingRecord(
        kind="federated",
        run="r1",
        population="riders",
        users=9,
        examples=90,
        epsilon=3.21,
        delta=1e-5,
        sampling=0.5,
        rounds=70,
        mechanism="Gaussian; accountant: PRV",
        assumption="independent coins",
        unit="user",
        protects="device features",
        oracle={"auc": 0.7},
    )
    weights = {"head.scale": np.ones(1, dtype=np.float32)}
    digest = registry.definition_hash("taxi")
    number = registry.create_version("taxi", weights=weights, training=training, curves={}, expected_hash=digest)
    registry.set_alias("taxi", number, "canary")
    shown = json.loads(hybrid("show", "taxi@canary", "--json"))
    assert (shown["version"], shown["aliases"], shown["training"]["epsilon"]) == (1, ["canary"], 3.21)
    text = hybrid("show", "taxi:1")
    assert "3.21" in text
    for line in training.privacy_lines():
        assert line in text
    assert "for a test of the command" in text
    assert "auc (oracle: pooled data, simulation only)" in text
    assert "canary -> 1" in hybrid("models")


def test_weights_are_not_promoted_under_other_mathematics(project: Path):
    """A head that subtracts where it multiplied has the same modules and shapes; registered again, it is another."""
    hybrid("register", str(project / "model.py"))
    registry = Registry(Workspace.current())
    before = registry.definition_hash("taxi")
    training = TrainingRecord(kind="federated", run="r1", population="riders", users=9, examples=90)
    registry.create_version(
        "taxi", weights={"head.scale": np.ones(1)}, training=training, curves={}, expected_hash=before
    )
    (project / "model.py").write_text(FILE.replace("server * device", "server - device"))
    hybrid("register", str(project / "model.py"))
    assert registry.definition_hash("taxi") != before
    with pytest.raises(ConfigError, match="taxi:1 was trained from another definition than is registered now"):
        hybrid("promote", "taxi", "1", "production")


def test_features_are_applied_materialised_and_read(project: Path):
    """(20 - 10) / 5 = 2 for the centre; the port's row is two hours old where one is allowed; the moon is unknown."""
    hybrid("register", str(project / "model.py"))
    applied = hybrid("features", "apply", "taxi")
    assert applied.splitlines() == ["applied zones", "applied zones_v1", "applied zones_v1__packed"]
    materialized = hybrid("features", "materialize", "taxi")
    assert materialized.splitlines() == ["zones: 2 entities", "packed: 2 entities; of 1, packed = unpacked = offline"]
    centre, port, moon = json.loads(hybrid("features", "read", "taxi", "centre", "port", "moon", "--json"))
    assert (centre["status"], centre["slots"]) == ("ok", {"demand": 2.0})
    assert centre["age_s"] == pytest.approx(1800, abs=120)
    assert (port["status"], port["slots"]) == ("stale_features", {"demand": None})
    assert (moon["status"], moon["age_s"]) == ("unknown_entity", None)
    assert "unknown_entity" in hybrid("features", "read", "taxi", "moon")
