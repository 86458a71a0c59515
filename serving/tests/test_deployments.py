import base64
import json
import re
from functools import partial

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.testclient import TestClient

from hybrid.deployment import Canary, Halted, Window, change
from hybrid.errors import ConfigError, UnknownModel, UpdateRequired
from hybrid.plan import Halt, sign
from hybrid.rollout import Rollout
from hybrid.spec import Serving
from serving.deployments import Deployments
from serving.gateway import Gateway, application
from serving.testing import deployment


def test_a_promotion_is_seen_at_the_next_refresh(tmp_path):
    """Version 2 is then the default, and version 1, which devices still hold, answers for itself."""
    deployment(1).write(tmp_path)
    deployments = Deployments(tmp_path)
    deployment(2).write(tmp_path)
    assert deployments.served("shop").version == 1
    deployments.refresh()
    assert deployments.served("shop").version == 2
    assert deployments.served("shop", "2").version == 2
    assert deployments.served("shop", "1") == deployment(1)


def test_a_version_older_than_the_window_is_told_to_update(tmp_path):
    """With two versions served, the third promotion ends the first; rows of it that are on their way are answered."""
    deployment(1).write(tmp_path)
    deployments = Deployments(tmp_path)
    for version in (2, 3):
        deployment(version).write(tmp_path)
    deployments.refresh()
    assert deployments.versions("shop") == [3, 2]
    with pytest.raises(UpdateRequired, match=r"served in versions \[3, 2\]; fetch the bundle of 3"):
        deployments.served("shop", "1")
    assert deployments.find("shop", 1) == deployment(1)


def test_a_folder_without_deployments_is_spoken_of(tmp_path, caplog):
    """Serving begins, since a promotion may come; whether the folder is there at all is said."""
    Deployments(tmp_path / "nope").refresh()
    assert "nope' does not exist; `hybrid promote` writes it" in caplog.text
    Deployments(tmp_path)
    assert "holds no deployment" in caplog.text
    caplog.clear()
    deployment(1).write(tmp_path)
    Deployments(tmp_path)
    assert "nothing is served" not in caplog.text


@pytest.mark.parametrize("version", ["4", "0", "-1", "01x", "", "٣", "9" * 400])
def test_a_version_that_never_was_is_unknown(tmp_path, version):
    """It is not an old one that could be updated from."""
    deployment(3).write(tmp_path)
    with pytest.raises(UnknownModel, match=r"served in versions \[3\]"):
        Deployments(tmp_path).served("shop", version)


def test_going_back_makes_the_old_version_the_default_and_keeps_the_new_one(tmp_path):
    """Devices that hold version 2 are answered by it until they fetch version 1 again."""
    for version in (1, 2, 1):
        deployment(version).write(tmp_path)
    assert Deployments(tmp_path).versions("shop") == [1, 2]


def test_a_file_of_the_release_before_contributes_embeddings(tmp_path):
    """It does not say what is contributed; slots are given to nobody, though the contribution is declared."""
    giving = deployment(1).model_copy(update={"serving": Serving(contribution=True), "contributes": "slots"})
    assert giving.server_slots == 3
    file = giving.write(tmp_path)
    file.write_text(re.sub(r'"contributes": "slots",\s*', "", file.read_text()))
    served = Deployments(tmp_path).served("shop")
    assert (served.contributes, served.server_slots) == ("embedding", 0)


def test_a_file_that_cannot_be_read_leaves_all_as_it_was(tmp_path, caplog):
    """Serving goes on with what it has, and says so."""
    deployment(1).write(tmp_path)
    deployments = Deployments(tmp_path)
    (tmp_path / "shop.json").write_text("{")
    deployments.refresh()
    assert deployments.served("shop").version == 1
    assert "shop.json is not a deployment" in caplog.text


def test_a_file_that_vanishes_while_it_is_looked_at_leaves_all_as_it_was(tmp_path, caplog):
    """A link to nothing is listed and cannot be asked for its time, like a file deleted in between."""
    deployment(1).write(tmp_path)
    deployments = Deployments(tmp_path)
    (tmp_path / "other.json").symlink_to(tmp_path / "nothing")
    deployments.refresh()
    assert deployments.served("shop").version == 1
    assert "deployments stay as they were" in caplog.text


def test_a_file_that_cannot_be_read_at_the_start_is_an_error(tmp_path):
    """There is nothing to go on with."""
    (tmp_path / "shop.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"shop\.json"):
        Deployments(tmp_path)


def test_a_folder_without_deployments_serves_nothing_yet(tmp_path):
    """It need not even exist; the first promotion is seen at the next refresh."""
    deployments = Deployments(tmp_path / "later")
    with pytest.raises(UnknownModel):
        deployments.served("shop")
    deployment(1).write(tmp_path / "later")
    deployments.refresh()
    assert deployments.served("shop").version == 1


def test_what_was_taken_back_is_answered_with_an_update_and_its_rows_on_the_way_are_answered(tmp_path):
    """A device that still has version 2 is told to fetch another; what the gateway sent before is found."""
    for version in (1, 2):
        deployment(version).write(tmp_path)
    deployments = Deployments(tmp_path)
    halted = Halted(version=2, reason="worse", signed="")
    change(tmp_path, "shop", lambda window: window.halt(halted), action="halt", version=2, reason="worse")
    deployments.refresh()
    assert deployments.served("shop").version == 1
    with pytest.raises(UpdateRequired, match="version 2 of model 'shop' was taken back; update: fetch the bundle"):
        deployments.served("shop", "2")
    assert deployments.find("shop", 2) == deployment(2)


def test_all_devices_are_told_the_same_of_a_rollout(tmp_path):
    """Default, canary and what was taken back, as the control plane signed it; of a model that is not there, 404."""
    key = Ed25519PrivateKey.generate()
    deployment(2).write(tmp_path)
    change(tmp_path, "shop", lambda window: window.try_out(deployment(3), 0.05), action="canary", version=3, share=0.05)
    gateway = Gateway(Deployments(tmp_path), None, lambda: True)
    client = TestClient(application(gateway), raise_server_exceptions=False)
    told = client.get("/v2/models/shop/rollout")
    assert (told.status_code, told.headers["Cache-Control"]) == (200, "no-cache")
    assert told.json() == {"model": "shop", "default": 2, "canary": {"version": 3, "share": 0.05}, "halted": []}
    signed = sign(Halt(model="shop", versions=(3,), reason="worse"), key)
    halted = Halted(version=3, reason="worse", signed=base64.b64encode(signed).decode())
    change(tmp_path, "shop", lambda window: window.halt(halted), action="halt", version=3, reason="worse")
    gateway.deployments.refresh()
    read = Rollout.read(client.get("/v2/models/shop/rollout").content, "shop")
    assert (read.default, read.canary, read.halts(key.public_key())) == (2, None, {3: "worse"})
    assert read.halts(Ed25519PrivateKey.generate().public_key()) == {}
    assert client.get("/v2/models/other/rollout").status_code == 404


def test_devices_are_told_of_a_shadow_only_where_they_are_to_compute_it(tmp_path):
    """Its version and share, and no more; who knows of no shadows reads the rest."""
    deployment(2).write(tmp_path)
    gateway = Gateway(Deployments(tmp_path), None, lambda: True)
    client = TestClient(application(gateway), raise_server_exceptions=False)
    for devices in (False, True):
        to = partial(Window.shade, deployment=deployment(3), share=0.1, devices=devices)
        change(tmp_path, "shop", to, action="shadow", version=3, share=0.1)
        gateway.deployments.refresh()
        told = client.get("/v2/models/shop/rollout").json()
        assert told.get("shadow") == ({"version": 3, "share": 0.1} if devices else None)
        assert told | {"shadow": None} == {"model": "shop", "default": 2, "canary": None, "halted": [], "shadow": None}
    assert Rollout.read(json.dumps(told).encode(), "shop").shadow == Canary(version=3, share=0.1)
    assert Rollout.read(json.dumps(told | {"later": {"x": 1}}).encode(), "shop").default == 2
