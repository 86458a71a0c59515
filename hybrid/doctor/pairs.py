"""Whether the parts of each served version belong together: deployment, bundle, Triton's models, registry."""

from __future__ import annotations

import time
from collections.abc import Iterator

from hybrid.bundle import read_bundle, trusted_key
from hybrid.deployment import Deployment, Window
from hybrid.doctor.findings import Finding
from hybrid.errors import BundleError, ConfigError, NotFound
from hybrid.registry import Registry
from hybrid.workspace import Workspace

NAME = "pairs"
PRODUCTION = "production"
PUBLIC_KEY = "bundle-signing.pub"


def pairs(workspace: Workspace, registry: Registry) -> Iterator[Finding]:
    """Looks at every version that is served.

    Raises:
        RegistryError: the registry does not answer.
    """
    files = sorted(workspace.deployments.glob("*.json"))
    if not files:
        yield Finding(NAME, "skipped", f"nothing is promoted in {workspace.deployments}")
        return
    yield from _keys(workspace)
    for file in files:
        try:
            window = Window.read(file)
        except ConfigError as error:
            fix = f"put it back from your copy, or remove it and run `hybrid promote {file.stem} VERSION production`"
            yield Finding(NAME, "fail", str(error).partition("\n")[0], fix)
            continue
        bad = [finding for version in window.versions for finding in _version(version, workspace, registry)]
        bad += _aliases(window, registry)
        yield from bad
        if not bad:
            served = ", ".join(str(version.version) for version in window.versions)
            yield Finding(NAME, "ok", f"{file.stem} {served}: deployment, bundle, Triton's files and registry agree")


def _keys(workspace: Workspace) -> Iterator[Finding]:
    """Both halves of the signing key, where both are here; a place that only serves has neither."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    private, public = workspace.keys / "bundle-signing.pem", workspace.keys / PUBLIC_KEY
    if not private.exists() or not public.exists():
        return
    raw = Encoding.Raw, PublicFormat.Raw
    ours = load_pem_private_key(private.read_bytes(), password=None).public_key().public_bytes(*raw)
    if ours not in [key.public_bytes(*raw) for key in trusted_key(public).keys]:
        found = (
            f"keys/{private.name} is not the private half of keys/{PUBLIC_KEY}: devices refuse what is promoted next"
        )
        yield Finding(NAME, "fail", found, "put back the private key that belongs to the public one that devices trust")


def _version(deployment: Deployment, workspace: Workspace, registry: Registry) -> Iterator[Finding]:
    name = f"{deployment.model}:{deployment.version}"
    again = f"`hybrid promote {deployment.model} {deployment.version} production` exports it again"
    yield from _bundle(deployment, workspace, name, again)
    for part in (deployment.server_tower, deployment.head):
        file = workspace.triton / part / str(deployment.version) / "model.onnx"
        if workspace.triton.is_dir() and not file.is_file():
            yield Finding(NAME, "fail", f"{name} is served, and Triton's repository has no {part} of it", again)
    try:
        registered = registry.version(deployment.model, deployment.version).definition_hash
    except (NotFound, ConfigError) as error:
        fix = "set MLFLOW_TRACKING_URI to the registry it was trained in, or promote a version that this one has"
        yield Finding(NAME, "fail", f"{name} is served, but: {error}", fix)
        return
    if registered != deployment.definition_hash:
        found = (
            f"{name} is served from definition {deployment.definition_hash[:12]}, the registry has {registered[:12]}"
        )
        yield Finding(NAME, "fail", found, again)


def _bundle(deployment: Deployment, workspace: Workspace, name: str, again: str) -> Iterator[Finding]:
    file, key = workspace.bundles / f"{deployment.model}-{deployment.version}.bundle", workspace.keys / PUBLIC_KEY
    if not key.is_file():
        found = f"the signature of {name}'s bundle was not looked at: keys/{PUBLIC_KEY} is not here"
        yield Finding(NAME, "skipped", found, "give the public half of the signing key to whoever runs this")
        return
    if not file.is_file():
        yield Finding(NAME, "fail", f"{name} is served, and its bundle {file.name} is not there to be fetched", again)
        return
    try:
        manifest = read_bundle(file.read_bytes(), trusted_key(key)).manifest
    except BundleError as error:
        yield Finding(NAME, "fail", f"devices refuse {file.name}: {error}", again)
        return
    if (manifest.model, manifest.version, manifest.definition_hash) != (
        deployment.model,
        deployment.version,
        deployment.definition_hash,
    ):
        found = f"{file.name} is of {manifest.model}:{manifest.version}, definition {manifest.definition_hash[:12]}, "
        yield Finding(NAME, "fail", f"{found}and {name} of {deployment.definition_hash[:12]} is served", again)
    if manifest.expires_ms is not None and manifest.expires_ms <= time.time() * 1000:
        yield Finding(NAME, "fail", f"{file.name} has expired: devices refuse it", again)


def _aliases(window: Window, registry: Registry) -> Iterator[Finding]:
    """What the registry calls production, canary and shadow is what is served as that."""
    default = window.default
    try:
        aliases = registry.model(default.model).aliases
    except NotFound:
        return  # said of the version already
    served = {PRODUCTION: default.version}
    served |= {name: one.version for name in ("canary", "shadow") if (one := getattr(window, name)) is not None}
    for alias in (PRODUCTION, "canary", "shadow"):
        known, here = aliases.get(alias), served.get(alias)
        if known != here:
            found = f"{default.model}@{alias} is {_named(known)} in the registry, {_named(here)} is served as that"
            fix = f"`hybrid promote {default.model} {default.version} production` writes both anew"
            if alias != PRODUCTION:
                fix = f"`hybrid rollout` or `hybrid rollback` of {default.model} writes both anew"
            yield Finding(NAME, "warn", found, fix)


def _named(version: int | None) -> str:
    return "none" if version is None else f"version {version}"
