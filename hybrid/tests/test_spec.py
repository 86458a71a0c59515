"""Each wrong declaration fails with a message that names the field, what it must be and what it got."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hybrid import (
    Categorical,
    Clear,
    Entity,
    HybridModel,
    Label,
    Log1p,
    Noised,
    Numeric,
    Privacy,
    Server,
    Serving,
    Training,
    View,
)
from hybrid.errors import ConfigError
from hybrid.features import Transform
from hybrid.spec import definition_hash, load_model

FILE = """
from datetime import timedelta
from hybrid import Categorical, Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, View

model = HybridModel(
    name="taxi",
    server=Server(
        service="zones",
        entity=Entity(name="zone", join_key="zone_id"),
        views=(View(name="zones", source="data/zones.parquet", features={"demand": Numeric()}),),
        max_feature_age=timedelta(hours=1),
    ),
    device={"habit": Categorical(vocabulary=("never", "often"))},
    server_tower=lambda: None,
    device_tower=lambda: None,
    head=lambda: None,
    label=Label(column="rode", visible_to="server"),
    privacy=Privacy(epsilon=4, delta=1e-5, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="for a test of the reader"),
)
"""


def view(**changes: Any) -> View:
    return View(**{"name": "zones", "source": "zones.parquet", "features": {"demand": Numeric()}} | changes)


def server(**changes: Any) -> Server:
    fields: dict[str, Any] = {
        "service": "zones",
        "entity": Entity(name="zone", join_key="zone_id"),
        "views": (view(),),
        "max_feature_age": timedelta(hours=1),
    }
    return Server(**fields | changes)


def privacy(**changes: Any) -> Privacy:
    return Privacy(**{"epsilon": 4, "delta": 1e-5, "clip": 1.0, "unit": "user"} | changes)


def declare(**changes: Any) -> HybridModel:
    fields: dict[str, Any] = {
        "name": "taxi",
        "server": server(),
        "device": {"habit": Categorical(vocabulary=("never", "often"))},
        "server_tower": lambda: None,
        "device_tower": lambda: None,
        "head": lambda: None,
        "label": Label(column="rode", visible_to="server"),
        "privacy": privacy(),
        "merge": "server",
        "release": Clear(reason="for a test of the declaration"),
    }
    return HybridModel(**fields | changes)


def refused(build: Any, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


class Squared(Transform):
    """Of no kind that an export knows."""

    kind: str = "squared"


class Doubled(Numeric):
    """Passes for Numeric, and computes something else."""


def test_the_valid_declaration_is_accepted():
    """What the tests below change is right before they change it."""
    assert declare().server_features.names == ("demand",)


def test_an_unknown_field_is_named():
    """A misspelt field is an error, never ignored."""
    refused(lambda: declare(devices={}), "HybridModel.devices: Extra inputs are not permitted")


def test_a_missing_field_is_named():
    """`unit` has no default: whose contribution is protected must be said."""
    refused(lambda: Privacy(epsilon=4, delta=1e-5, clip=1.0), "Privacy.unit: Field required")


@pytest.mark.parametrize("name", ["Taxi", "taxi-zone", "1taxi", "", "../taxi", "a" * 64])
def test_names_are_plain(name: str):
    """Names become folders, tables and topics."""
    refused(lambda: declare(name=name), "HybridModel.name: must be lower-case letters, digits and _", repr(name)[:60])


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("epsilon", 0, "greater than 0, got 0"),
        ("epsilon", -1.0, "greater than 0, got -1.0"),
        ("epsilon", 101, "less than or equal to 100, got 101"),
        ("epsilon", float("nan"), "finite number, got nan"),
        ("epsilon", float("inf"), "finite number, got inf"),
        ("delta", 0, "greater than 0, got 0"),
        ("delta", 0.01, "less than 0.01, got 0.01"),
        ("clip", 0.0, "greater than 0, got 0.0"),
        ("unit", "person", "'user' or 'device', got 'person'"),
    ],
)
def test_a_budget_out_of_range_is_refused(field: str, value: Any, must: str):
    """The budget's fields have ranges, and the message has both."""
    refused(lambda: privacy(**{field: value}), f"Privacy.{field}: ", must)


def test_merging_on_the_server_needs_a_release():
    """A device embedding leaves the device only as declared."""
    refused(lambda: declare(release=None), "release must be Clear(reason=...) or Noised(clip=..., sigma=...)")


def test_merging_on_the_device_has_no_release():
    """Nothing is released there, so declaring how is a contradiction."""
    refused(lambda: declare(merge="device"), "release must be left out where merge='device'")


def test_merging_on_the_device_has_neither_a_missing_device_nor_a_contribution():
    """The device is where the answer is made, and the server's embedding is the answer, unless its tower is trained."""
    for how, must in (
        ({"missing_device": "server-only"}, "serving.missing_device must be left out where merge='device'"),
        (
            {"contribution": True},
            "serving.contribution must be left out where merge='device' and training.server_tower is 'central'",
        ),
    ):
        refused(lambda how=how: declare(merge="device", release=None, serving=Serving(**how)), must)
    federated = {"serving": Serving(contribution=True), "training": Training(server_tower="federated")}
    assert declare(merge="device", release=None, **federated).serving.contribution


def test_a_release_of_another_kind_is_refused():
    """Only the two forms whose disclosure can be stated."""
    refused(lambda: declare(release="clear"), "HybridModel.release: must be Clear(...) or Noised(...), got 'clear'")


def test_a_clear_release_needs_a_reason_in_words():
    """Ten characters at least: a sentence, not a dash."""
    refused(lambda: Clear(reason="because"), "Clear.reason", "at least 10 characters, got 'because'")


def test_a_noised_release_needs_noise():
    """sigma 0 would be clear without saying so."""
    refused(lambda: Noised(clip=1.0, sigma=0.0), "Noised.sigma", "greater than 0, got 0.0")


def test_a_device_feature_must_not_be_served():
    """What the server knows is not private to the device, and the budget would claim it."""
    served = {"demand": Numeric()}
    refused(lambda: declare(device=served), "device features ['demand'] are also served by the server")
    habit = {"habit": Numeric()}
    refused(lambda: declare(request=habit), "device features ['habit'] are also served by the server")


def test_a_device_side_without_features_is_refused():
    """Without one there is nothing to federate."""
    refused(lambda: declare(device={}), "device must declare at least one feature")


def test_a_request_feature_must_not_be_served_too():
    """One name, one source."""
    refused(lambda: declare(request={"demand": Numeric()}), "server and request features must have distinct names")


@pytest.mark.parametrize("name", ["entity", "device_embedding"])
def test_a_request_feature_must_not_be_called_as_an_input_of_every_request(name: str):
    """Both arrive by name in one request."""
    refused(lambda: declare(request={name: Numeric()}), f"request features cannot be called ['{name}']")


def test_a_transform_of_unknown_kind_is_refused():
    """It has no form that a device program or Triton could run."""
    kinds = "must be Numeric, Log1p, Bucketize, Categorical or Hash"
    refused(lambda: declare(device={"habit": Squared()}), "HybridModel.device.habit: ", kinds, "got Squared(")
    refused(lambda: declare(device={"habit": "numeric"}), "HybridModel.device.habit: ", kinds, "got 'numeric'")
    refused(lambda: view(features={"demand": len}), "View.features.demand: ", kinds)


def test_a_transform_that_only_passes_for_a_known_one_is_refused():
    """A subclass of Numeric would be exported as Numeric and compute another thing in training."""
    refused(lambda: declare(device={"habit": Doubled()}), "habit must be Numeric", "got Doubled")
    served = server(views=(view(features={"demand": Doubled()}),))
    refused(lambda: declare(server=served), "demand must be Numeric", "got Doubled")


def test_the_label_must_not_be_a_feature():
    """The model would read its answer."""
    refused(
        lambda: declare(label=Label(column="habit", visible_to="server")),
        "label.column 'habit' is also a feature or the join key",
    )


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"visible_to": "everyone"}, "Label.visible_to: Input should be 'server' or 'device', got 'everyone'"),
        ({"window": timedelta(0)}, "window must be positive, got 0:00:00"),
        ({"absent": 0}, "absent says what no event within `window` means, so it needs a window"),
    ],
)
def test_a_wrong_label_is_refused(label: dict[str, Any], message: str):
    """Who learns it, and how long to wait for it."""
    refused(lambda: Label(**{"column": "rode", "visible_to": "server"} | label), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_feature_age": timedelta(0)}, "max_feature_age must be positive, got 0:00:00"),
        ({"views": ()}, "Server.views: "),
        ({"views": (view(), view(name="again"))}, "server features must have distinct names, got ['demand']"),
        ({"views": (view(features={"zone_id": Numeric()}),)}, "the join key 'zone_id' cannot be a feature"),
        ({"entity": "zone"}, "Server.entity: Input should be a valid dictionary or instance of Entity, got 'zone'"),
    ],
)
def test_a_wrong_server_side_is_refused(changes: dict[str, Any], message: str):
    """Views join on one key, and each feature has one place."""
    refused(lambda: server(**changes), message)


def test_a_label_that_only_the_device_sees_may_be_declared():
    """Training with it is later work; the declaration stands, and epsilon then covers the label."""
    model = declare(label=Label(column="rode", visible_to="device"))
    assert model.protects == "device features and label"


def test_a_file_is_read_and_its_sources_are_beside_it(tmp_path: Path):
    """Relative sources start at the file, wherever the command runs."""
    (tmp_path / "model.py").write_text(FILE)
    model = load_model(tmp_path / "model.py")
    assert model.name == "taxi"
    assert model.server.views[0].source == tmp_path / "data/zones.parquet"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model.py must build exactly one HybridModel at module level, got 0"),
        (
            FILE + "\nagain = model.model_copy(update={'name': 'other'})",
            "exactly one HybridModel at module level, got 2",
        ),
        ("def broken(:", "model.py does not run: SyntaxError: "),
        ("1 / 0", "model.py does not run: ZeroDivisionError: division by zero"),
        ("import nowhere", "model.py does not run: ModuleNotFoundError: No module named 'nowhere'"),
        (
            FILE.replace("epsilon=4", "epsilon=400"),
            "model.py: Privacy.epsilon: Input should be less than",
        ),
        (
            FILE.replace('("never", "often")', "()"),
            "model.py: Categorical: vocabulary must hold at least one text",
        ),
        (FILE.replace("Numeric()", "Numeric(std=0)"), "model.py: Numeric.std: Input should be greater than 0, got 0"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, text: str, message: str):
    """One sentence with the file's name, whatever is wrong in it."""
    (tmp_path / "model.py").write_text(text)
    refused(lambda: load_model(tmp_path / "model.py"), message)


def test_a_file_that_is_none_is_refused(tmp_path: Path):
    """A path that is no file, and a file that is no Python."""
    refused(lambda: load_model(tmp_path / "none.py"), "does not exist")
    (tmp_path / "model.yaml").write_text("name: taxi")
    refused(lambda: load_model(tmp_path / "model.yaml"), "model file 'model.yaml' must be a Python file (.py)")


def test_the_hash_is_of_what_is_declared_not_of_where(tmp_path: Path):
    """A moved file is the same definition; another constant is another."""
    hashes = []
    for folder, text in [("a", FILE), ("b", FILE), ("c", FILE.replace("epsilon=4", "epsilon=3"))]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.py").write_text(text)
        hashes.append(definition_hash(load_model(tmp_path / folder / "model.py").definition()))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_file_is_read_as_it_is_now(tmp_path: Path):
    """An edit of equal length within the same second counts: no cached byte code is used, and none is written."""
    file = tmp_path / "model.py"
    for name in ("taxi", "taxa"):
        file.write_text(FILE.replace('"taxi"', f'"{name}"'))
        os.utime(file, (1_000_000_000, 1_000_000_000))
        assert load_model(file).name == name
    assert [path.name for path in tmp_path.iterdir()] == ["model.py"]


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        ({"missing_entity": "constant"}, "constant must be a probability, since missing_entity='constant'"),
        ({"constant": 1.5}, "less than or equal to 1"),
        ({"missing_device": "device-only"}, "'error', 'server-only' or 'constant'"),
        ({"stale_features": "cached"}, "'error', 'device-only' or 'constant'"),
        ({"transport": "carrier pigeon"}, "'kafka' or 'direct'"),
        ({"versions": 0}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_way_to_serve_is_refused(serving: dict[str, Any], message: str):
    """The message names the field and what it must be."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        Serving(**serving)


def test_how_a_model_is_served_is_not_part_of_its_definition():
    """A fallback can be declared for a trained version: its definition's hash stays."""
    plain = declare()
    assert declare(serving=Serving(missing_entity="constant", constant=0.1)).definition() == plain.definition()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"noise": "banded"}, "separation must be given with noise='banded'"),
        ({"noise": "blt"}, "separation must be given with noise='blt'"),
        ({"noise": "blt", "separation": 0}, "separation: Input should be greater than or equal to 1"),
        ({"noise": "pink"}, "noise: Input should be 'independent', 'banded' or 'blt'"),
        ({"separation": 4, "noise_memory": 3}, "noise_memory must be left out with noise='independent'"),
        ({"separation": 4, "clip_quantile": 0.5}, "clip_quantile must be left out with a separation"),
    ],
)
def test_noise_that_spans_rounds_needs_to_know_who_comes_back_when(training: dict[str, Any], message: str):
    """And one clip for all rounds."""
    refused(lambda: Training(**training), message)


def test_a_declaration_is_read_from_a_json_file(tmp_path):
    """As it was written; what is no file, no JSON object, or has a wrong field, is said in one sentence."""
    file, entity = tmp_path / "entity.json", Entity(name="offer", join_key="offer_id")
    with pytest.raises(ConfigError, match=r"Entity file '.*entity.json' cannot be read: No such file"):
        Entity.read(file)
    file.write_text(entity.model_dump_json())
    assert Entity.read(file) == entity
    for content in ("[1]", "{", "\xff"):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(ConfigError, match="must be a JSON object"):
            Entity.read(file)
    file.write_text('{"name": "offer"}')
    with pytest.raises(ConfigError, match="join_key"):
        Entity.read(file)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"balance": 0.0}, "balance: Input should be greater than 0"),
        ({"balance": 1.0}, "balance: Input should be less than 1"),
        ({"balance_epsilon": 0.5}, "balance_epsilon must be left out without balance"),
        ({"balance": 0.5, "balance_epsilon": 0.0}, "balance_epsilon: Input should be greater than 0"),
    ],
)
def test_a_balance_is_a_share_and_its_epsilon_is_for_it(training: dict[str, Any], message: str):
    """The message names the field and its range."""
    refused(lambda: Training(**training), message)


TRIPS = Numeric(normalise="federated", low=0, high=100)


def test_only_a_device_feature_may_be_learned():
    """What the server sees, it can count itself: the feature is named."""
    declare(device={"trips": TRIPS, "zone": Categorical(discover=3)})
    for changes in (
        {"server": server(views=(view(features={"demand": TRIPS}),))},
        {"request": {"demand": Categorical(discover=3)}, "server": server(views=(view(features={"rain": Numeric()}),))},
    ):
        refused(lambda changes=changes: declare(**changes), "['demand'] must have constants written by hand")


def test_a_model_with_learned_constants_is_one_written_by_hand():
    """Its device features, and nothing else of it; a model that declares all its constants is itself."""
    model = declare(device={"habit": Numeric(std=2), "trips": TRIPS})
    assert model.with_learned({"trips": Numeric(mean=5)}).device == {"habit": Numeric(std=2), "trips": Numeric(mean=5)}
    assert declare().with_learned({}).definition() == declare().definition()


@pytest.mark.parametrize(
    ("learned", "message"),
    [
        ({}, "must be learned of ['trips', 'zone'], as it declares, got those of []"),
        ({"trips": Numeric(), "zone": Categorical(vocabulary=("a",))}, "'zone' must be categorical of width 5"),
        ({"trips": Log1p(), "zone": Categorical(vocabulary=("a", "b", "c"))}, "'trips' must be numeric of width 2"),
        ({"trips": TRIPS, "zone": Categorical(vocabulary=("a", "b", "c"))}, "'trips' must be numeric of width 2"),
        ({"trips": Numeric(), "zone": Categorical(vocabulary=("a", "b", "c")), "x": Numeric()}, "got those of ['trips"),
    ],
)
def test_constants_of_another_declaration_are_refused(learned, message):
    """Some are missing, too many, of another kind, of another width, or not learned."""
    model = declare(device={"trips": TRIPS, "zone": Categorical(discover=3)})
    refused(lambda: model.with_learned(learned), message)


def test_what_is_learned_is_no_part_of_the_definition():
    """The declaration's hash stays: it holds that the constants are learned, within which bounds, and none of them."""
    definition = declare(device={"trips": TRIPS}).definition()
    said = {"kind": "numeric", "clip": 10.0, "normalise": "federated", "low": 0.0, "high": 100.0}
    assert definition["device"] == {"trips": said}


def test_settings_that_came_later_move_no_other_definition():
    """They are in the declaration of a training only where they are not what they are by default."""
    assert not {name for name in Training().model_dump(mode="json") if name.startswith(("normalise", "balance"))}
    changed = Training(normalise_share=0.3, normalise_rows=2)
    assert changed.model_dump(mode="json") == Training().model_dump(mode="json") | {
        "normalise_share": 0.3,
        "normalise_rows": 2,
    }
    assert Training(**changed.model_dump()) == changed


def test_what_watching_may_cost_is_no_part_of_what_is_trained(tmp_path: Path):
    """With budgets for drift and for the funnel, or other ones, a model is the same, and so are its versions."""
    (tmp_path / "plain.py").write_text(FILE)
    watched = FILE.replace("import Categorical,", "import Categorical, Drift, Funnel,")
    watched = watched.replace('merge="server"', 'merge="server", drift=Drift(epsilon=1), funnel=Funnel(epsilon=2)')
    (tmp_path / "watched.py").write_text(watched)
    plain, both = (load_model(tmp_path / f"{name}.py") for name in ("plain", "watched"))
    assert (both.funnel and both.funnel.least, plain.funnel) == (20, None)
    assert definition_hash(plain.definition()) == definition_hash(both.definition())
