"""`hybrid promote`: exports a version and points an alias at it."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from hybrid.cli.runs import CANARY, PRODUCTION, SHADOW, version_of
from hybrid.deployment import anything
from hybrid.errors import ConfigError, StackError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.deployment import Check, Deployment
    from hybrid.export.promote import Exported
    from hybrid.spec import HybridModel

OTHERWISE = "train a version of the registered one, or register the file it was trained from"
LOAD_TIMEOUT_S = 60.0
TRITON = "HYBRID_TRITON"  # in the environment: whose HTTP endpoint promotes wait for
app = typer.Typer()


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    version: Annotated[str, typer.Argument(help="A trained version's number, or an alias that points at one.")],
    alias: Annotated[str, typer.Argument(help="What to point at it; 'production' is what is served.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Exports a trained version for Triton and for devices, and points ALIAS at it.

    Every export is compared with the trained network before it is used; the
    device bundle is signed. Serving switches to the version where ALIAS is
    'production'.

    Example: hybrid promote coupon 1 production
    """
    from hybrid.registry import Registry

    workspace = Workspace.current()
    declared = Registry(workspace).load_model(model)
    exported, served = export_to(workspace, declared, version, alias)
    if as_json:
        print(json.dumps(_json(exported, declared, alias, served)))
    else:
        _show(exported, declared, alias, served)


def export_to(
    workspace: Workspace, declared: HybridModel, version: str | int, alias: str, check: Check = anything
) -> tuple[Exported, Path | None]:
    """Exports a version and points an alias at it; in production it is served from now on, by whoever has it loaded.

    Args:
        workspace: of the project.
        declared: the model, as it is registered.
        version: a number, also as text, or an alias.
        alias: what points at it.
        check: of what is served before, where that changes.

    Returns:
        What was exported; and the deployment's file, None where serving is as it was.

    Raises:
        NotFound: there is no such version.
        ConfigError: it cannot be exported, or was taken back.
        StackError: the local stack's Triton does not load it.
    """
    from hybrid.export.promote import export_version
    from hybrid.registry import Registry

    registry = Registry(workspace)
    found = version_of(registry, declared.name, version, otherwise=OTHERWISE)
    exported = export_version(found, declared, workspace)
    served = None
    if alias == PRODUCTION:
        wait_loaded(exported.deployment, workspace)
        served = exported.deployment.write(workspace.deployments, check)
        for beside in {CANARY, SHADOW} & {*found.aliases}:  # it is the default now
            registry.drop_alias(declared.name, beside)
    registry.set_alias(declared.name, found.number, alias)
    return exported, served


def wait_loaded(deployment: Deployment, workspace: Workspace) -> None:
    """Returns once every Triton that is known has both models: serving would ask for them at once.

    Known are those behind `$HYBRID_TRITON`, else the local stack's, if it is up.

    Raises:
        ConfigError: `$HYBRID_TRITON` is no address.
        StackError: one does not load them.
    """
    from hybrid.local.process import http_ok

    deadline = time.monotonic() + LOAD_TIMEOUT_S
    for server, log in _tritons(workspace):
        for name in (deployment.server_tower, deployment.head):
            loaded = http_ok(f"{server}/v2/models/{name}/versions/{deployment.version}/ready")
            while not loaded(Path()):
                if time.monotonic() > deadline:
                    raise StackError(
                        f"Triton at {server} did not load {name} version {deployment.version} within "
                        f"{LOAD_TIMEOUT_S:g} s: what is served stays as it was; {log} may say why"
                    )
                time.sleep(0.1)


def _tritons(workspace: Workspace) -> list[tuple[str, str]]:
    """URLs of their HTTP endpoints, of a name in `$HYBRID_TRITON` one for each address that it has; and their logs."""
    from hybrid.local import stack

    if told := os.environ.get(TRITON):
        return [(url, "its log") for url in _addresses(told)]
    state = stack.status(workspace)
    if state is None or state.phase != "ready":
        return []
    return [(f"http://127.0.0.1:{s.ports['triton-http']}", str(s.log)) for s in state.servers if s.name == "triton"]


def _addresses(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None or parts.port is None:
            raise ValueError
    except ValueError:
        raise ConfigError(f"${TRITON} must be http://HOST:PORT of Triton's HTTP endpoint, got {url!r}") from None
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise StackError(f"${TRITON} names {parts.hostname}, which has no address: {error.strerror}") from None
    return [f"http://[{host}]:{parts.port}" if ":" in host else f"http://{host}:{parts.port}" for host in sorted(found)]


def _json(exported: Exported, model: HybridModel, alias: str, served: Path | None) -> dict[str, Any]:
    deployment = exported.deployment
    return {
        "model": deployment.model,
        "version": deployment.version,
        "alias": alias,
        "definition_hash": deployment.definition_hash,
        "triton": [deployment.server_tower, deployment.head],
        "bundle": str(exported.bundle),
        "bytes": exported.sizes,
        "untrainable": exported.untrainable,
        "deployment": str(served) if served else None,
        "release": _release(model),
    }


def _show(exported: Exported, model: HybridModel, alias: str, served: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    deployment = exported.deployment
    table = Table("what", "bytes", title=f"{deployment.model}:{deployment.version}, now {alias}")
    names = {
        deployment.server_tower: f"Triton model {deployment.server_tower}",
        deployment.head: f"Triton model {deployment.head}",
        "bundle": f"signed device bundle {exported.bundle.name}",
    }
    for name, size in exported.sizes.items():
        table.add_row(names.get(name, f"device program '{name}'"), f"{size:,}")
    console = Console()
    console.print(table)
    if model.release is None:
        console.print("No device embedding leaves a device: it is merged there.", highlight=False)
    else:
        console.print(f"Device embeddings are released {_release(model)}.", highlight=False)
    if model.merge == "device" or model.serving.contribution:
        console.print("Callers are given the server tower's embedding of the entities they name.", highlight=False)
    if deployment.server_slots:
        console.print(
            "Callers who ask are given the server's features of the entities they name, as its tower reads them: "
            "devices train the tower, and need them.",
            highlight=False,
        )
    if exported.untrainable:
        console.print(f"Devices cannot train this version: {exported.untrainable}", highlight=False, markup=False)
    console.print(f"Serving uses it: {served}" if served else f"Serving is unchanged: only '{PRODUCTION}' is served.")


def _release(model: HybridModel) -> str:
    """How an embedding leaves the device, and what that discloses, in words."""
    from hybrid.privacy.mechanisms import local_epsilon
    from hybrid.spec import Noised

    release = model.release
    if isinstance(release, Noised):
        delta = model.privacy.delta
        epsilon = local_epsilon(release.sigma, delta)
        return f"noised on the device, at a local epsilon of {epsilon:.3g} per request (delta {delta:g})"
    return f"in the clear, because: {release.reason}" if release else "not at all"
