import pytest

from hybrid.errors import ConfigError, UnknownModel
from serving.deployments import Deployments
from serving.testing import deployment


def test_a_promotion_is_seen_at_the_next_refresh(tmp_path):
    """Version 2 is then the served one, version 1 unknown to callers, and found for rows on their way."""
    deployment(1).write(tmp_path)
    deployments = Deployments(tmp_path)
    deployment(2).write(tmp_path)
    assert deployments.served("shop").version == 1
    deployments.refresh()
    assert deployments.served("shop", "2").version == 2
    with pytest.raises(UnknownModel, match="served in version 2 only"):
        deployments.served("shop", "1")
    assert deployments.find("shop", 1) == deployment(1)


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
