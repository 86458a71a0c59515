"""Keys that others can read, and folders that cannot be written, in real files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hybrid.bundle import signing_key
from hybrid.doctor.permissions import permissions
from hybrid.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """With a signing key; nobody else may enter it."""
    workspace = Workspace(tmp_path / ".hybrid")
    workspace.root.mkdir(mode=0o700)
    signing_key(workspace.keys)
    return workspace


def test_a_workspace_of_its_owner_alone_is_well(workspace: Workspace):
    """Public halves may be read by anybody; a group may enter, as on a volume that pods share."""
    workspace.root.chmod(0o2770)
    assert [finding.status for finding in permissions(workspace)] == ["ok"]


def test_a_private_key_that_others_can_read_fails(workspace: Workspace):
    """With the command that mends it; the public half is none."""
    file = workspace.keys / "bundle-signing.pem"
    file.chmod(0o640)
    (found,) = permissions(workspace)
    assert (found.status, found.found) == (
        "fail",
        "keys/bundle-signing.pem must be readable by its owner only (chmod 600)",
    )
    assert found.fix.startswith(f"chmod 600 {file};")


def test_a_workspace_that_is_open_to_all_is_told(workspace: Workspace):
    """People's rows and devices' sums lie there."""
    workspace.root.chmod(0o705)
    (found,) = permissions(workspace)
    assert (found.status, found.fix) == ("warn", f"chmod o-rwx {workspace.root}")


def test_a_folder_that_cannot_be_written_names_the_command_that_will_fail(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    """A read-only mount. The system's answer is given here: where tests run as root it never refuses."""
    workspace.deployments.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != workspace.deployments)
    (found,) = permissions(workspace)
    assert (found.status, str(workspace.deployments) in found.found) == ("warn", True)
    assert "so `hybrid promote` will fail" in found.found
    assert "securityContext.fsGroup" in found.fix


def test_a_folder_of_keys_that_has_one_need_not_be_written(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """So a Secret is mounted in its place."""
    signing_key(workspace.keys)
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != workspace.keys)
    assert [found.status for found in permissions(workspace)] == ["ok"]


def test_a_workspace_that_is_not_there_fails(tmp_path: Path):
    """The wrong folder, or HYBRID_HOME."""
    (found,) = permissions(Workspace(tmp_path / ".hybrid"))
    assert found.status == "fail"
    assert "HYBRID_HOME" in found.fix
