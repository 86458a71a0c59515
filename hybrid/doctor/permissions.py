"""Who can read keys and people's rows, and whether what must be written can be."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hybrid.doctor.findings import Finding
from hybrid.errors import ConfigError
from hybrid.files import check_private
from hybrid.workspace import Workspace

NAME, SIGNING_KEY = "permissions", "bundle-signing.pem"


def permissions(workspace: Workspace) -> Iterator[Finding]:
    """Looks at the workspace's keys and folders; what is not there yet is not missed."""
    if not workspace.root.is_dir():
        found = f"the workspace {workspace.root} does not exist"
        yield Finding(
            NAME, "fail", found, "run this where the project is, or set HYBRID_HOME; `hybrid migrate` makes it"
        )
        return
    bad = [*_keys(workspace.keys), *_open_to_all(workspace), *_unwritable(workspace)]
    yield from bad
    if not bad:
        yield Finding(NAME, "ok", f"keys are their owner's alone, and {workspace.root} can be written")


def _keys(folder: Path) -> Iterator[Finding]:
    """Each file there is a secret, but for public halves."""
    for file in sorted(folder.glob("*")):
        if file.suffix == ".pub" or not file.is_file():
            continue
        try:
            check_private(file.stat(), f"keys/{file.name}")
        except ConfigError as error:
            yield Finding(NAME, "fail", str(error), f"chmod 600 {file}; and take it for known: make another")


def _open_to_all(workspace: Workspace) -> Iterator[Finding]:
    """A group may have it: so a shared volume is given to pods."""
    for folder in (workspace.root, workspace.runs):
        if folder.is_dir() and folder.stat().st_mode & stat.S_IRWXO:
            yield Finding(NAME, "warn", f"{folder} is open to every account of the machine", f"chmod o-rwx {folder}")


def _unwritable(workspace: Workspace) -> Iterator[Finding]:
    written = {
        workspace.definitions: "register",
        workspace.mlflow: "train",
        workspace.runs: "train",
        workspace.feast: "features apply",
        workspace.triton: "promote",
        workspace.bundles: "promote",
        workspace.deployments: "promote",
        workspace.keys: "promote",
    }
    if (workspace.keys / SIGNING_KEY).exists():  # it is made once; a Secret that is mounted there is never written
        del written[workspace.keys]
    for folder, command in written.items():
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            found = f"{folder} cannot be written by this account (uid {os.geteuid()}), so `hybrid {command}` will fail"
            fix = (
                "give it to the account that runs `hybrid`; in Kubernetes by securityContext.fsGroup, without readOnly"
            )
            yield Finding(NAME, "warn", found, fix)
