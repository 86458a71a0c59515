from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid import Categorical, Label, Log1p, Numeric, OnDevice, Serving, Training
from hybrid.bundle import Alone, Keeping
from hybrid.errors import ConfigError
from hybrid.export import promote
from hybrid.export.promote import export_version
from hybrid.export.tests.conftest import declared, version_of
from hybrid.network import Network
from hybrid.version import Learned
from hybrid.workspace import Workspace


class Sum(torch.nn.Module):
    """A head without a care for widths."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, server, device):
        return self.scale * server.sum(dim=1) + device.sum(dim=1)


def test_serving_is_told_all_that_it_needs(every):
    """The deployment has the Feast side, the sizes and the Triton names; 2 hours are 7,200 s."""
    deployment = every.exported.deployment
    assert (deployment.model, deployment.version, deployment.definition_hash) == ("every", 2, "ab" * 32)
    assert (deployment.packed_view, deployment.join_key) == ("every_service__packed", "item_id")
    assert (deployment.join_key_type, deployment.max_feature_age_s) == ("integer", 7200.0)
    assert deployment.server.names == ("number", "count", "hours", "word", "hashed")
    assert deployment.request.names == ("place", "speed")
    assert (deployment.server_embedding, deployment.device_embedding) == (3, 2)
    assert (deployment.server_tower, deployment.head) == ("every_server_tower", "every_head")


def test_serving_is_told_the_embeddings_that_stand_for_a_missing_side(every, tmp_path: Path):
    """Those that tower dropout learned: (1, 2, 3) for the server's; none for the device's, which stayed zero."""
    learned = {"missing.server.weight": np.array([[1.0], [2.0], [3.0]], np.float32)}
    version = replace(every.version, weights=every.version.weights | learned)
    deployment = export_version(version, every.network.model, Workspace(tmp_path)).deployment
    assert (deployment.missing_server, deployment.missing_device) == ((1.0, 2.0, 3.0), ())


@pytest.mark.parametrize("serving", [{"missing_entity": "device-only"}, {"missing_device": "server-only"}])
def test_a_fallback_that_was_not_learned_is_refused(every, tmp_path: Path, serving: dict[str, str]):
    """Zeros are no embedding: the message names the setting and what learns one."""
    model = every.network.model.model_copy(update={"serving": Serving(**serving)})
    with pytest.raises(ConfigError, match=f"serving.{next(iter(serving))} must be .* tower dropout"):
        export_version(every.version, model, Workspace(tmp_path))


def test_the_environment_says_what_runs_onnx_there(every, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a cluster, where every promote is for Triton's own image; another word is refused by name."""
    monkeypatch.setenv("HYBRID_TRITON_BACKEND", "onnxruntime")
    export_version(every.version, every.network.model, Workspace(tmp_path))
    assert 'backend: "onnxruntime"' in (tmp_path / "triton" / "every_head" / "config.pbtxt").read_text()
    monkeypatch.setenv("HYBRID_TRITON_BACKEND", "onnx")
    with pytest.raises(ConfigError, match=r"HYBRID_TRITON_BACKEND must be one of python, onnxruntime, got 'onnx'"):
        export_version(every.version, every.network.model, Workspace(tmp_path))


def test_export_alone_changes_nothing_that_is_served(every):
    """The flip is `deployment.write`, after the alias points at the version."""
    assert (every.workspace.triton / "every_head" / "2" / "model.onnx").is_file()
    assert not every.workspace.deployments.exists()


def test_the_bundle_is_signed_and_holds_no_server_feature(every):
    """It opens with the control plane's public half; its tables are the device's alone."""
    manifest = every.bundle.manifest
    assert every.exported.bundle == every.workspace.bundles / "every-2.bundle"
    assert manifest == every.exported.manifest
    assert all(name.startswith("own_") for name in manifest.features.names)
    assert manifest.request == {"place": "text", "speed": "number"}
    assert manifest.release is not None
    assert manifest.release.kind == "noised"
    assert {name: len(data) for name, data in every.bundle.programs.items()}.items() <= every.exported.sizes.items()


@pytest.mark.parametrize("kind", ["central", "server-only"])
def test_a_reference_without_privacy_is_not_promoted(every, tmp_path: Path, kind: str):
    """It learned from pooled device features in the clear; nothing is written."""
    version = every.version
    version = replace(version, training=version.training.model_copy(update={"kind": kind}))
    with pytest.raises(ConfigError, match=f"every:2 is a {kind} reference, trained without a privacy mechanism"):
        export_version(version, every.network.model, Workspace(tmp_path / ".hybrid"))
    assert not list(tmp_path.iterdir())


def test_a_device_that_merges_is_told_what_it_may_answer_alone(tmp_path: Path):
    """Of the declared fallbacks those that it can compute, with the learned embedding and the constant, signed."""
    serving = Serving(unavailable="device-only", stale_features="constant", missing_entity="device-only", constant=0.25)
    network = Network.build(declared(merge="device", release=None, serving=serving))
    version = version_of(network)
    learned = {"missing.server.weight": np.array([[1.0], [2.0], [3.0]], np.float32)}
    exported = export_version(replace(version, weights=version.weights | learned), network.model, Workspace(tmp_path))
    assert exported.deployment.merge == "device"
    assert exported.manifest.alone == Alone(
        unavailable="device-only", stale_features="constant", missing_server=(1.0, 2.0, 3.0), constant=0.25
    )


def test_weights_of_another_network_are_refused(every, tmp_path: Path):
    """A tower with a layer less cannot pass for the declared one."""
    version = every.version
    weights = {name: value for name, value in version.weights.items() if name != "device_tower.2.bias"}
    with pytest.raises(ConfigError, match="device_tower: the weights are of another network"):
        export_version(replace(version, weights=weights), every.network.model, Workspace(tmp_path))


def test_a_network_other_than_the_registered_one_is_refused(every, tmp_path: Path):
    """A tower that changed in a module beside the model's file does not pass for the registered one."""
    other = every.network.model.model_copy(update={"head": lambda: torch.nn.Bilinear(3, 2, 1)})
    with pytest.raises(ConfigError, match="head must return"):
        export_version(every.version, other, Workspace(tmp_path))
    deeper = lambda: torch.nn.Sequential(torch.nn.LazyLinear(5), torch.nn.ReLU(), torch.nn.Linear(5, 2))  # noqa: E731
    other = every.network.model.model_copy(update={"device_tower": deeper})
    with pytest.raises(ConfigError, match="the network of 'every' changed since it was registered"):
        export_version(every.version, other, Workspace(tmp_path))


def test_a_device_is_told_what_to_keep_and_until_when_to_install(every, tmp_path: Path):
    """A window of 6 h is 21,600 s, 2 MB are 2,097,152 bytes, and 30 days after 1,000 ms is 2,592,001,000 ms."""
    label = Label(column="y", visible_to="device", window=timedelta(hours=6), absent=0)
    on_device = OnDevice(
        keep=timedelta(days=2),
        keep_mb=2,
        max_examples=64,
        max_seconds=5,
        max_memory_mb=100,
        bundle_lifetime=timedelta(days=30),
    )
    model = every.network.model.model_copy(update={"label": label, "on_device": on_device})
    manifest = export_version(every.version, model, Workspace(tmp_path), created_ms=1000).manifest
    assert manifest.keeping == Keeping(
        label_window_s=21600,
        label_absent=0,
        seconds=172800,
        bytes=2097152,
        max_examples=64,
        max_seconds=5,
        max_memory_mb=100,
    )
    assert (manifest.created_ms, manifest.expires_ms) == (1000, 2592001000)


def test_a_bundle_without_a_declared_lifetime_never_expires(every):
    """It says when it was made, by the clock, and no end; any runtime there is can run it."""
    manifest = every.bundle.manifest
    assert manifest.expires_ms is None
    assert manifest.created_ms > 1_700_000_000_000
    assert manifest.minimum_runtime == 1


def test_a_bundle_holds_each_program_in_both_forms_and_what_devices_train(every):
    """For ExecuTorch and for ONNX Runtime; a training program for ExecuTorch alone, and how it is fed."""
    assert set(every.bundle.programs) == {"device.pte", "embed.onnx", "predict.onnx", "train.pte"}
    train = every.bundle.manifest.train
    assert (train.server, train.missing, every.exported.untrainable) == (3, False, None)


def test_devices_train_what_the_version_s_training_trained(every, tmp_path: Path):
    """A federated server tower takes 7 slots in place of its embedding; tower dropout trains what is missing."""
    settings = Training(server_tower="federated", tower_dropout=0.1)
    version = replace(every.version, training=every.version.training.model_copy(update={"settings": settings}))
    model = every.network.model.model_copy(update={"serving": Serving(contribution=True)})
    exported = export_version(version, model, Workspace(tmp_path))
    train, deployment = exported.manifest.train, exported.deployment
    assert (train.server, train.missing, train.takes_slots) == (7, True, True)
    assert (deployment.contributes, deployment.server_slots) == ("slots", train.server)
    assert (every.exported.deployment.contributes, every.exported.deployment.server_slots) == ("embedding", 0)


def test_of_a_server_tower_without_weights_the_embedding_is_contributed(tmp_path: Path):
    """Nothing of it can be trained, federated or not: the gradient is the same, and so is what devices are given."""
    training = Training(server_tower="federated")
    network = Network.build(declared(server_tower=torch.nn.Flatten, head=Sum, training=training))
    exported = export_version(version_of(network), network.model, Workspace(tmp_path))
    assert exported.manifest.train.server == network.server_embedding
    assert (exported.manifest.train.takes_slots, exported.deployment.contributes) == (False, "embedding")


@pytest.mark.parametrize("why", ["train again", "no such operator"])
def test_a_version_that_no_device_can_train_is_served(every, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str):
    """Its bundle predicts, and says that there is no training program; whoever promotes is told why."""
    version = every.version
    if why == "train again":  # its record is of before records said what was trained
        version = replace(version, training=version.training.model_copy(update={"settings": None}))
    else:

        def none(*_: object, **__: object):
            raise ConfigError("the gradient cannot be exported for devices: no such operator")

        monkeypatch.setattr(promote, "training_program", none)
    settings = version.training.settings and Training(server_tower="federated")
    version = replace(version, training=version.training.model_copy(update={"settings": settings}))
    exported = export_version(version, every.network.model, Workspace(tmp_path))
    assert (exported.manifest.train, exported.deployment.contributes) == (None, "embedding")
    assert set(exported.manifest.programs) == {"device.pte", "embed.onnx", "predict.onnx"}
    assert why in exported.untrainable


def test_learned_constants_ship_like_those_written_by_hand(tmp_path: Path):
    """Manifest, programs and their conformance checks have the version's constants; the definition has none."""
    later = {
        "own_number": Numeric(normalise="federated", low=0, high=100, clip=3),
        "own_count": Log1p(normalise="federated", low=0, high=50),
        "own_word": Categorical(discover=3),
    }
    transforms = {
        "own_number": Numeric(mean=61.25, std=19.5, clip=3),
        "own_count": Log1p(mean=1.5, std=0.75),
        "own_word": later["own_word"].learned(("a", "b")),
    }
    model = declared(device=later)
    network = Network.build(model)
    version = version_of(network)
    with pytest.raises(ConfigError, match="constants of 'every' must be learned"):
        export_version(version, model, Workspace(tmp_path))
    learned = Learned(transforms=transforms, users=10, run="r", rows=1, epsilon=0.1, delta=1e-5)
    version = replace(version, training=version.training.model_copy(update={"learned": learned}))
    exported = export_version(version, model, Workspace(tmp_path))
    assert exported.manifest.features.transforms == transforms
    assert exported.untrainable is None
