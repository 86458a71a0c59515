"""Everything that runs one version: Triton models, the device bundle, and what serving is told."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast, get_args

from hybrid.bundle import Alone, Keeping, Manifest, TrainProgram, signing_key, write_bundle
from hybrid.deployment import Deployment
from hybrid.errors import ConfigError
from hybrid.export import executorch, onnx, triton
from hybrid.export.training import training_program
from hybrid.network import Network
from hybrid.protocol import CONSTANT, DEVICE_ONLY
from hybrid.spec import HybridModel
from hybrid.version import TrainingRecord, Version
from hybrid.workspace import Workspace

BACKEND = "HYBRID_TRITON_BACKEND"  # in the environment, as the servers have it
MINIMUM_RUNTIME = 1  # `device_runtime.RUNTIME` of the first that runs the programs below; older ones refuse the bundle


@dataclass(frozen=True)
class Exported:
    """What `export_version` wrote, and the deployment that makes serving use it.

    Attributes:
        deployment: not written yet: `deployment.write(workspace.deployments)` is the flip.
        bundle: the device bundle's file.
        manifest: in it.
        sizes: bytes of each Triton model's ONNX file, each device program and the bundle.
        untrainable: why devices cannot train this version; None: they can.
    """

    deployment: Deployment
    bundle: Path
    manifest: Manifest
    sizes: dict[str, int]
    untrainable: str | None


def export_version(
    version: Version,
    model: HybridModel,
    workspace: Workspace,
    *,
    backend: triton.Backend | None = None,
    created_ms: int | None = None,
) -> Exported:
    """Exports a trained version to `workspace.triton` and `workspace.bundles`; every export is checked against torch.

    Args:
        version: trained from `model`'s definition.
        model: the declaration.
        workspace: its signing key signs the bundle.
        backend: which Triton backend runs the ONNX files; None: what `$HYBRID_TRITON_BACKEND` says, else the local
            stack's.
        created_ms: Unix time in UTC that the bundle says it is from; None: now.

    Raises:
        ConfigError: the version cannot be promoted, or a part cannot be exported.
    """
    _check(version, model)
    network = Network.of(model, version)
    network.check_registered(version.definition["network"])
    _check_fallbacks(network, f"{model.name}:{version.number}")
    programs, train, untrainable = _device_programs(network, version.training)
    tower, head = triton.export(network, version.number, workspace.triton, backend=backend or _backend())
    bundle = workspace.bundles / f"{model.name}-{version.number}.bundle"
    created_ms = time.time_ns() // 1_000_000 if created_ms is None else created_ms
    unsigned = _manifest(version, network, train, created_ms)
    manifest = write_bundle(bundle, unsigned, programs, signing_key(workspace.keys))
    files = {name: workspace.triton / name / str(version.number) / "model.onnx" for name in (tower, head)}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    sizes |= {name: len(data) for name, data in programs.items()} | {"bundle": bundle.stat().st_size}
    deployment = deployment_of(network, version.number, version.definition_hash, (tower, head), train)
    return Exported(deployment, bundle, manifest, sizes, untrainable)


def _backend() -> triton.Backend:
    told = os.environ.get(BACKEND, "python")
    if told not in get_args(triton.Backend):
        raise ConfigError(f"${BACKEND} must be one of {', '.join(get_args(triton.Backend))}, got {told!r}")
    return cast(triton.Backend, told)


def deployment_of(
    network: Network, version: int, definition_hash: str, names: tuple[str, str], train: TrainProgram | None = None
) -> Deployment:
    """What serving is told of a version.

    Args:
        network: of the model.
        version: its number, in Triton too.
        definition_hash: of the definition it was trained from.
        names: of the Triton models, as `triton.export` returns them.
        train: how devices train the version; None: they cannot, and no slots are needed.
    """
    model, server = network.model, network.model.server
    server_tower, head = names
    return Deployment(
        model=model.name,
        version=version,
        definition_hash=definition_hash,
        packed_view=server.packed_view,
        join_key=server.entity.join_key,
        join_key_type=server.entity.dtype,
        max_feature_age_s=server.max_feature_age.total_seconds(),
        server=server.features,
        request=model.request_features,
        server_embedding=network.server_embedding,
        device_embedding=network.device_embedding,
        server_tower=server_tower,
        head=head,
        merge=model.merge,
        serving=model.serving,
        contributes="slots" if train is not None and train.takes_slots else "embedding",
        missing_server=_learned(network, "server"),
        missing_device=_learned(network, "device"),
    )


def _learned(network: Network, side: str) -> tuple[float, ...]:
    """The embedding that stands for a missing side; nothing where it is as it was built, all zeros."""
    embedding = network.missing_embedding(side, 1)[0].tolist()
    return tuple(embedding) if any(embedding) else ()


def _check(version: Version, model: HybridModel) -> None:
    name = f"{model.name}:{version.number}"
    if version.training.kind != "federated":
        raise ConfigError(
            f"{name} is a {version.training.kind} reference, trained without a privacy mechanism; "
            "only a federated version can be promoted"
        )


def _check_fallbacks(network: Network, name: str) -> None:
    for setting in network.model.serving.learned:
        if not _learned(network, "device" if setting == "missing_device" else "server"):
            raise ConfigError(
                f"serving.{setting} must be 'error' or 'constant' for {name}, got "
                f"{getattr(network.model.serving, setting)!r}: it was trained without tower dropout, which is what "
                "learns an embedding for a missing side; train with --tower-dropout 0.1, or choose another fallback"
            )


def _device_programs(
    network: Network, training: TrainingRecord
) -> tuple[dict[str, bytes], TrainProgram | None, str | None]:
    """What a bundle holds by file name, how its training program is fed, and why it has none.

    A model can be served whose gradient no device can compute; such a bundle predicts, and takes part in no training.
    """
    programs = executorch.device_programs(network) | onnx.device_programs(network)
    settings = training.settings
    if settings is None:
        return programs, None, "its record does not say what its users trained, as older ones do not; train again"
    # Of a tower without weights nothing is trained: its embedding says all.
    federated = settings.server_tower == "federated" and any(True for _ in network.server_tower.parameters())
    try:
        data, train = training_program(network, server_tower=federated, missing=settings.tower_dropout > 0)
    except ConfigError as error:
        return programs, None, str(error)
    return programs | {"train.pte": data}, train, None


def _manifest(version: Version, network: Network, train: TrainProgram | None, created_ms: int) -> Manifest:
    model = network.model
    lifetime = model.on_device.bundle_lifetime
    return Manifest(
        model=model.name,
        version=version.number,
        definition_hash=version.definition_hash,
        features=model.device_features,
        request={name: "text" if t.text else "number" for name, t in model.request.items()},
        server_embedding=network.server_embedding,
        device_embedding=network.device_embedding,
        merge=model.merge,
        release=model.release,
        programs={},
        alone=_alone(network) if model.merge == "device" else None,
        train=train,
        keeping=_keeping(model),
        created_ms=created_ms,
        expires_ms=None if lifetime is None else created_ms + lifetime // timedelta(milliseconds=1),
        minimum_runtime=MINIMUM_RUNTIME,
    )


def _keeping(model: HybridModel) -> Keeping:
    """What devices keep and for how long they wait for a label, in plain units."""
    label, on_device = model.label, model.on_device
    return Keeping(
        label_window_s=None if label.window is None else label.window.total_seconds(),
        label_absent=label.absent,
        seconds=on_device.keep.total_seconds(),
        bytes=round(on_device.keep_mb * (1 << 20)),
        max_examples=on_device.max_examples,
        max_seconds=on_device.max_seconds,
        max_memory_mb=on_device.max_memory_mb,
    )


def _alone(network: Network) -> Alone:
    """What a device that merges may answer without the server: of the declared fallbacks those that it can compute."""
    serving = network.model.serving
    declared = {"unavailable": serving.unavailable, "stale_features": serving.stale_features}
    own = {name: answer for name, answer in declared.items() if answer in (DEVICE_ONLY, CONSTANT)}
    learned = {"missing_server": _learned(network, "server"), "constant": serving.constant}
    return Alone.model_validate(own | learned)
