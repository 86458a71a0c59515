"""`hybrid rollout`, `hybrid rollback` and `hybrid history`: launching in small steps, and taking back."""

from __future__ import annotations

import base64
import json
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hybrid.cli.promote import OTHERWISE, wait_loaded
from hybrid.cli.runs import CANARY, PRODUCTION, SHADOW, version_of
from hybrid.deployment import anything
from hybrid.errors import ConfigError, NotFound
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.deployment import Check, Deployment, Window
    from hybrid.registry import Registry
    from hybrid.version import Version

MOST_REASON = 500
Beside = Literal["canary", "shadow"]
app = typer.Typer()


@app.command()
def rollout(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    version: Annotated[str, typer.Argument(help="A trained version's number, or an alias that points at one.")],
    *,
    canary: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Of devices that are to fetch it: 5%, or 0.05.")
    ] = None,
    shadow: Annotated[
        str | None, typer.Option(metavar="SHARE", help="In its place: of batches on which its server tower runs too.")
    ] = None,
    on_devices: Annotated[
        bool,
        typer.Option(
            "--on-devices",
            help="With --shadow: so large a share of devices whose host apps let them ask it too, after the default.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Has some devices fetch a version in place of the default: its canary; or runs it beside, for nobody: its shadow.

    Each device draws a number for the version when it first hears of it, keeps it to
    itself, and fetches the canary if it is below the share: nobody needs to know who
    has it. The same command with a larger share lets more devices in, none leaves.
    Requests name the version that a device has, and each is answered by its own pair.

    No device learns of a shadow. Once a batch was answered, the worker runs its server
    tower on what the server knows of the same rows, and counts errors, seconds and
    predictions without a device, beside the default's. With --canary it leaves the shadow.

    With --on-devices devices do learn of it. One whose host app lets it draws a number, as
    for a canary, and below the share it fetches the shadow too: once it has the default's
    answer about a row it asks once more, as the shadow's bundle declares, and throws the
    answer away. That releases a second embedding of the row, where the server merges.

    `hybrid promote MODEL VERSION production` makes it the default; `hybrid rollback
    MODEL` takes it back; `hybrid watch MODEL` does either by itself.

    Example: hybrid rollout coupon 3 --shadow 10%

    Example: hybrid rollout coupon 3 --shadow 10% --on-devices

    Example: hybrid rollout coupon 3 --canary 5%
    """
    if (canary is None) == (shadow is None):
        raise ConfigError("--canary or --shadow must be given, and not both")
    if on_devices and shadow is None:
        raise ConfigError("--on-devices needs --shadow: a canary is fetched by devices anyway")
    what: Beside = CANARY if shadow is None else SHADOW
    share = _share(what, canary or shadow or "")
    told = try_out(Workspace.current(), model, version, share, what=what, devices=on_devices)
    tried, default = getattr(told, what), told.default.version
    if as_json:
        shown = {"model": model, "version": tried.version, "as": what, "share": share, "default": default}
        print(json.dumps(shown | ({"devices": on_devices} if what == SHADOW else {})))
        return
    print(tried_out(told, what))
    if what == CANARY:
        print(f"Next: `hybrid rollout {model} {tried.version} --canary SHARE` with a larger one,")
        print(f"  `hybrid promote {model} {tried.version} production` for all, or `hybrid rollback {model}`.")
    else:
        print(f"Next: `hybrid watch {model}`, then `hybrid rollout {model} {tried.version} --canary 5%`,")
        print(f"  or `hybrid rollback {model}`.")


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    version: Annotated[
        int | None, typer.Option(min=1, help="Which; by default the canary, else the shadow, else the default.")
    ] = None,
    reason: Annotated[str, typer.Option(help="For people and logs, at most 500 characters.")] = "rolled back",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Takes a version back, for good: devices that have it go to the one before it.

    From now on it is served to nobody: a request that names it is told to update,
    and rows of it that are on their way are still answered. Devices are told with
    their next update, signed by the control plane's key; they take it from nobody
    any more. `hybrid fleet halt` tells devices that only train.

    Example: hybrid rollback coupon --reason "recall fell"
    """
    if not 0 < len(reason) <= MOST_REASON:
        raise ConfigError(f"--reason must have 1 to {MOST_REASON} characters, got {len(reason)}")
    workspace = Workspace.current()
    window = window_of(workspace, model)
    number = version or window.tried or window.default.version
    default = take_back(workspace, model, number, reason)
    if as_json:
        print(json.dumps({"model": model, "halted": number, "reason": reason, "default": default}))
    else:
        print(taken_back(model, number, reason, default))


def try_out(
    workspace: Workspace,
    model: str,
    version: str | int,
    share: float,
    check: Check = anything,
    *,
    what: Beside = CANARY,
    devices: bool = False,
) -> Window:
    """Makes a version the canary, or the shadow, exported and loaded first where it is not served yet; its alias too.

    Args:
        workspace: of the project.
        model: whose.
        version: a number, also as text, or an alias.
        share: in (0, 1]: of devices that fetch a canary, of batches on which a shadow runs.
        check: of what is served before.
        what: "canary" or "shadow".
        devices: of a shadow: whether devices compute it too, see `hybrid.deployment.Shadow`.

    Returns:
        What is served after it.

    Raises:
        NotFound: there is no such version, or nothing is served of the model yet.
        ConfigError: it cannot be exported, was taken back, or is the default.
        StackError: the local stack's Triton does not load it.
    """
    from hybrid.deployment import Window, change
    from hybrid.registry import Registry

    registry = Registry(workspace)
    found = version_of(registry, model, version, otherwise=OTHERWISE)
    window = window_of(workspace, model)
    window.check(found.number)
    deployment = _served(window, found.number) or _exported(registry, found, workspace)
    to = Window.try_out if what == CANARY else partial(Window.shade, devices=devices)
    told = change(
        workspace.deployments,
        model,
        lambda now: to(_there(now, model, check), deployment, share),
        action=what,
        version=found.number,
        share=share,
        devices=devices,
    )
    registry.set_alias(model, found.number, what)
    if what == CANARY and window.shadow is not None and window.shadow.version == found.number:
        registry.drop_alias(model, SHADOW)
    return told


def tried_out(told: Window, what: Beside = CANARY) -> str:
    """A canary, or a shadow, in words."""
    tried, default = getattr(told, what), told.default
    name, share = f"{default.model}:{tried.version}", f"{100 * tried.share:.4g}%"
    if what == CANARY:
        return f"{name} is the canary: {share} of devices fetch it, the others {default.version}"
    said = f"{name} is the shadow: it runs on {share} of the batches of {default.version}"
    return f"{said}, and on as large a share of the devices that let it" if tried.devices else said


def taken_back(model: str, number: int, reason: str, default: int) -> str:
    """The same of a version that was taken back."""
    return f"{model}:{number} was taken back ({reason}); devices fetch {default}"


def take_back(workspace: Workspace, model: str, number: int, reason: str, check: Check = anything) -> int:
    """Halts a served version, moves the registry's aliases with it, and returns the default after it.

    Args:
        workspace: of the project.
        model: whose.
        number: of the version.
        reason: for people and logs; what is beyond `MOST_REASON` is left out.
        check: of what is served before.

    Raises:
        NotFound: it is not served.
        ConfigError: there is none to go back to.
    """
    from hybrid.bundle import signing_key
    from hybrid.deployment import Halted, change
    from hybrid.plan import Halt, sign
    from hybrid.registry import Registry

    window, reason = window_of(workspace, model), reason[:MOST_REASON]
    if _served(window, number) is None:
        served = ", ".join(str(one.version) for one in window.versions)
        raise NotFound(f"{model}:{number} is not served; served are: {served}")
    signed = sign(Halt(model=model, versions=(number,), reason=reason), signing_key(workspace.keys))
    halted = Halted(version=number, reason=reason, signed=base64.b64encode(signed).decode())
    told = change(
        workspace.deployments,
        model,
        lambda now: _there(now, model, check).halt(halted),
        action="halt",
        version=number,
        reason=reason,
    )
    registry = Registry(workspace)
    if number == window.default.version:
        registry.set_alias(model, told.default.version, PRODUCTION)
    _drop_beside(registry, window, number)
    return told.default.version


def promote_served(workspace: Workspace, model: str, number: int, check: Check = anything) -> None:
    """Makes a version that is served already the default: nothing is exported anew, and who has it has it.

    Args:
        workspace: of the project.
        model: whose.
        number: of the version.
        check: of what is served before.

    Raises:
        NotFound: it is not served.
    """
    from hybrid.registry import Registry

    window = window_of(workspace, model)
    deployment = _served(window, number)
    if deployment is None:
        raise NotFound(f"{model}:{number} is not served")
    deployment.write(workspace.deployments, check)
    registry = Registry(workspace)
    registry.set_alias(model, number, PRODUCTION)
    _drop_beside(registry, window, number)


def _drop_beside(registry: Registry, window: Window, number: int) -> None:
    """Of a version that was beside the default."""
    for alias in (CANARY, SHADOW):
        beside = getattr(window, alias)
        if beside is not None and number == beside.version:
            registry.drop_alias(window.default.model, alias)


@app.command()
def history(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lists what was promoted, tried out and taken back, when and why.

    Example: hybrid history coupon
    """
    from hybrid.deployment import history as read

    changes = read(Workspace.current().deployments, model)
    if as_json:
        print(json.dumps([change.model_dump(mode="json", exclude_none=True) for change in changes]))
        return
    if not changes:
        raise NotFound(f"{model} has no history: `hybrid promote {model} VERSION production` begins it")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("when (UTC)", "what", "version", "share", "default after it", "why", box=None, pad_edge=False)
    for change in changes:
        share = {"promote": "all", "halt": "none"}.get(change.action) or f"{100 * (change.share or 0):.4g}%"
        what = f"{change.action}, on devices" if change.devices else change.action
        row = (f"{change.at:%Y-%m-%d %H:%M:%S}", what, str(change.version), share, str(change.default))
        table.add_row(*row, Text(change.reason or ""))
    Console(highlight=False).print(table)


def _share(option: str, text: str) -> float:
    number = text.removesuffix("%")
    try:
        share = float(number) / (100 if number != text else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--{option} must be a share above 0%, at most 100%, such as 5% or 0.05, got {text!r}")
    return share


def window_of(workspace: Workspace, model: str) -> Window:
    """Raises: NotFound: nothing is served of the model yet."""
    from hybrid.deployment import Window

    file = workspace.deployments / f"{model}.json"
    return _there(Window.read(file) if file.exists() else None, model)


def _there(window: Window | None, model: str, check: Check = anything) -> Window:
    check(window)
    if window is None:
        raise NotFound(f"nothing is served of {model} yet: `hybrid promote {model} VERSION production` comes first")
    return window


def _served(window: Window, version: int) -> Deployment | None:
    return next((one for one in window.versions if one.version == version), None)


def _exported(registry: Registry, version: Version, workspace: Workspace) -> Deployment:
    from hybrid.export.promote import export_version

    exported = export_version(version, registry.load_model(version.model), workspace)
    wait_loaded(exported.deployment, workspace)
    return exported.deployment
