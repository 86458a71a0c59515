"""Definitions, immutable versions and aliases, in a real MLflow store."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from hybrid.errors import ConfigError, NotFound
from hybrid.registry import Registry, parse_selector
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
NETWORK = {"server_embedding": 4, "device_embedding": 4, "parameters": {"head": 2}}
WEIGHTS = {"head.weight": np.array([[1.0, -2.0]], dtype=np.float32), "head.bias": np.array([0.5], dtype=np.float32)}
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


def registered(folder: Path, text: str = FILE) -> tuple[Registry, str]:
    """A registry in `folder` that knows the model in `text`, and the model's hash."""
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(text)
    registry = Registry(Workspace(folder / ".hybrid"))
    return registry, registry.register(load_model(folder / "model.py"), NETWORK, folder / "model.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with two versions of one model, the second in production; a store takes seconds to make."""
    registry, digest = registered(tmp_path_factory.mktemp("trained"))
    curves = {"loss": [(1, 0.9), (2, 0.8)]}
    assert registry.create_version("taxi", weights=WEIGHTS, training=TRAINING, curves=curves, expected_hash=digest) == 1
    doubled = {name: value * 2 for name, value in WEIGHTS.items()}
    assert registry.create_version("taxi", weights=doubled, training=TRAINING, curves={}, expected_hash=digest) == 2
    registry.set_alias("taxi", 2, "production")
    return registry


def test_a_registered_model_is_read_back_from_its_file(tmp_path: Path):
    """The same declaration, and the hash covers it and the network."""
    registry, digest = registered(tmp_path)
    assert registry.load_model("taxi").server.views[0].source == tmp_path / "zones.parquet"
    assert registry.definition_hash("taxi") == digest
    stored = json.loads((tmp_path / ".hybrid/definitions/taxi/definition.json").read_text())
    assert stored["network"] == NETWORK
    assert stored["file"] == str(tmp_path / "model.py")


def test_the_hash_covers_the_network(tmp_path: Path):
    """The same declaration with another tower is another definition."""
    registry, digest = registered(tmp_path)
    model = load_model(tmp_path / "model.py")
    assert registry.register(model, NETWORK | {"server_embedding": 5}, tmp_path / "model.py") != digest


def test_a_file_that_changed_is_not_used(tmp_path: Path):
    """What is trained is what was registered, or nothing; registering again mends it."""
    registry, _ = registered(tmp_path)
    (tmp_path / "model.py").write_text(FILE.replace("epsilon=4", "epsilon=5"))
    with pytest.raises(ConfigError, match=r"'model.py' of taxi changed since it was registered; run `hybrid register"):
        registry.load_model("taxi")
    registered(tmp_path, FILE.replace("epsilon=4", "epsilon=5"))
    assert registry.load_model("taxi").privacy.epsilon == 5
    (tmp_path / "model.py").unlink()
    with pytest.raises(ConfigError, match=r"which is gone; run `hybrid register model.py` again"):
        registry.load_model("taxi")


def test_the_command_that_mends_a_changed_file_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its path is the file's, from the current folder."""
    registry, _ = registered(tmp_path / "my team")
    (tmp_path / "my team/model.py").write_text(FILE.replace("epsilon=4", "epsilon=5"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"run `hybrid register 'my team/model.py'` again"):
        registry.load_model("taxi")


def test_a_file_whose_imports_changed_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file's bytes are the same, what it declares is not."""
    monkeypatch.setenv("TAXI_EPSILON", "4")
    registry, _ = registered(
        tmp_path, FILE.replace("epsilon=4", 'epsilon=float(__import__("os").environ["TAXI_EPSILON"])')
    )
    monkeypatch.setenv("TAXI_EPSILON", "5")
    with pytest.raises(ConfigError, match=r"what 'model.py' of taxi declares changed"):
        registry.load_model("taxi")


def test_unknown_models_are_named_with_those_there_are(tmp_path: Path):
    """Also a name that would be a path."""
    registry, _ = registered(tmp_path)
    for name in ("bus", "bus:1", "../definitions/taxi", ""):
        with pytest.raises(NotFound, match=r"is registered; registered: taxi$"):
            registry.load_model(name)


def test_a_version_where_a_name_is_enough_is_refused_with_the_name(tmp_path: Path):
    """Commands about a whole model take taxi, not taxi:1 or taxi@canary."""
    registry, _ = registered(tmp_path)
    for name in ("taxi:1", "taxi@canary"):
        with pytest.raises(NotFound, match=r"registered: taxi; here its name is enough, without a version: taxi$"):
            registry.load_model(name)


def test_where_nothing_is_registered_it_is_said_where_and_how(tmp_path: Path):
    """Whoever stands in the wrong folder sees it."""
    with pytest.raises(NotFound, match=f"nothing is, in {tmp_path}: `hybrid register FILE` registers one"):
        Registry(Workspace(tmp_path)).load_model("taxi")


def test_an_untrained_model_has_no_version_to_promote(tmp_path: Path):
    """Neither to read nor to alias, and the message says what to do."""
    registry, _ = registered(tmp_path)
    for act in (lambda: registry.version("taxi", 1), lambda: registry.set_alias("taxi", 1, "production")):
        with pytest.raises(ConfigError, match=r"^taxi has no trained version; run `hybrid train taxi` first$"):
            act()
    assert registry.models()[0].versions == ()


def test_a_version_is_what_was_trained(trained: Registry):
    """Weights, record and definition come back as they went, by number and by alias."""
    version = trained.version("taxi", 1)
    assert version.training == TRAINING
    assert version.definition["network"] == NETWORK
    assert version.definition_hash == trained.definition_hash("taxi")
    assert version.weights.keys() == WEIGHTS.keys()
    np.testing.assert_array_equal(version.weights["head.weight"], [[1.0, -2.0]])
    assert version.aliases == ()
    produced = trained.version("taxi", "production")
    assert (produced.number, produced.aliases) == (2, ("production",))
    np.testing.assert_array_equal(produced.weights["head.weight"], [[2.0, -4.0]])


def test_how_versions_were_trained_is_told_without_their_weights(trained: Registry):
    """By number; of a model without versions nothing, of an unknown one that it is unknown."""
    assert trained.trainings("taxi")[1] == TRAINING
    with pytest.raises(NotFound, match="no model 'bus' is registered"):
        trained.trainings("bus")


def test_it_is_known_when_a_version_was_added(trained: Registry, tmp_path: Path):
    """In the last ten minutes, in UTC; of a model that was never trained nothing is."""
    assert datetime.now(UTC) - trained.created("taxi")[1] < timedelta(minutes=10)
    assert registered(tmp_path)[0].created("taxi") == {}


def test_models_are_listed_with_versions_and_aliases(trained: Registry):
    """As `hybrid models` prints them."""
    (model,) = trained.models()
    assert (model.name, model.versions, model.aliases) == ("taxi", (1, 2), {"production": 2})


def test_an_alias_moves(trained: Registry):
    """It points at one version at a time."""
    trained.set_alias("taxi", 2, "canary")
    trained.set_alias("taxi", 1, "canary")
    assert trained.version("taxi", "canary").number == 1


def test_unknown_versions_and_aliases_are_named_with_those_there_are(trained: Registry):
    """NotFound, with what to choose from."""
    with pytest.raises(NotFound, match="taxi has no version 7; it has: 1, 2"):
        trained.version("taxi", 7)
    with pytest.raises(NotFound, match="taxi has no version 7; it has: 1, 2"):
        trained.set_alias("taxi", 7, "production")
    with pytest.raises(
        NotFound, match=r"taxi has no alias 'shadow'; it has: .*production.* `hybrid promote taxi .*are 1, 2$"
    ):
        trained.version("taxi", "shadow")


@pytest.mark.parametrize("alias", ["latest", "v1", "Production", "", "a b"])
def test_an_alias_has_a_plain_name(trained: Registry, alias: str):
    """MLflow keeps 'latest' and 'v1' for itself."""
    with pytest.raises(ConfigError, match="an alias must be lower-case letters"):
        trained.set_alias("taxi", 1, alias)


def test_curves_are_in_mlflow(trained: Registry):
    """Each point at its round, so MLflow's own pages draw them; pooled metrics are marked oracle."""
    client = trained._client
    run = client.get_model_version("taxi", "1").run_id
    assert [(point.step, point.value) for point in client.get_metric_history(run, "loss")] == [(1, 0.9), (2, 0.8)]
    assert client.get_run(run).data.metrics["oracle.auc"] == 0.7
    assert client.get_run(run).data.params["epsilon"] == "3.5"
    assert client.get_run(run).data.params["training.tower_dropout"] == "0.1"


def test_damaged_weights_are_refused(trained: Registry):
    """A version never changes: weights that are others than recorded are not served."""
    digest = trained.definition_hash("taxi")
    number = trained.create_version("taxi", weights=WEIGHTS, training=TRAINING, curves={}, expected_hash=digest)
    source = trained._client.get_model_version("taxi", str(number)).source
    stored = Path(source.removeprefix("file://")) / "weights.npz"
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ConfigError, match=f"the stored weights of taxi:{number} are damaged"):
        trained.version("taxi", number)


def test_weights_that_are_not_finite_are_no_version(trained: Registry):
    """A training that diverged says so, and adds nothing."""
    before, digest = trained.model("taxi").versions, trained.definition_hash("taxi")
    weights = WEIGHTS | {"head.bias": np.array([np.nan])}
    with pytest.raises(ConfigError, match=r"weights must be finite, got others in \['head.bias'\]"):
        trained.create_version("taxi", weights=weights, training=TRAINING, curves={}, expected_hash=digest)
    assert trained.model("taxi").versions == before


def test_a_version_is_bound_to_the_definition_it_was_trained_from(trained: Registry):
    """If another was registered meanwhile, the training is of nothing that is registered."""
    with pytest.raises(ConfigError, match="another definition of taxi was registered while this one was trained"):
        trained.create_version("taxi", weights=WEIGHTS, training=TRAINING, curves={}, expected_hash="0" * 64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("taxi", ("taxi", None)), ("taxi@production", ("taxi", "production")), ("taxi:12", ("taxi", 12))],
)
def test_a_selector_names_a_model_and_perhaps_a_version(text: str, expected: tuple[str, str | int | None]):
    """NAME, NAME@ALIAS, NAME:VERSION."""
    assert parse_selector(text) == expected


@pytest.mark.parametrize("text", ["", "@production", "taxi:", "taxi:one", "taxi@a:1", "taxi:-1", "taxi@"])
def test_what_is_no_selector_is_refused(text: str):
    """With the three forms in the message."""
    with pytest.raises(ConfigError, match="NAME, NAME@ALIAS or NAME:VERSION, got "):
        parse_selector(text)


def test_the_registry_brings_mlflow_only_when_a_version_is_asked_for(tmp_path: Path):
    """Registering and listing untrained models cost no seconds of import."""
    registered(tmp_path)
    code = (
        "import sys; from pathlib import Path; from hybrid.registry import Registry; "
        "from hybrid.workspace import Workspace; "
        f"print(Registry(Workspace(Path({str(tmp_path / '.hybrid')!r}))).models()); print('mlflow' in sys.modules)"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.splitlines()[-1] == "False"
