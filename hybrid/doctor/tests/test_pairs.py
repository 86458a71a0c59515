"""Each way in which the parts of a served version can come apart, planted in real files and a real registry."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from hybrid import Clear
from hybrid.bundle import Manifest, signing_key, write_bundle
from hybrid.deployment import Deployment
from hybrid.doctor.pairs import pairs
from hybrid.features import Features, Numeric
from hybrid.registry import Registry
from hybrid.spec import Training, load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace

FILE = """
from datetime import timedelta
from hybrid import Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, View

model = HybridModel(
    name="taxi",
    server=Server(
        service="zones",
        entity=Entity(name="zone", join_key="zone_id"),
        views=(View(name="zones", source="zones.parquet", features={"demand": Numeric()}),),
        max_feature_age=timedelta(hours=1),
    ),
    device={"trips": Numeric()},
    server_tower=lambda: None,
    device_tower=lambda: None,
    head=lambda: None,
    label=Label(column="rode", visible_to="server"),
    privacy=Privacy(epsilon=4, delta=1e-5, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="for a test of the doctor"),
)
"""
TRAINING = TrainingRecord(
    kind="federated",
    run="r1",
    population="riders",
    users=30,
    examples=90,
    epsilon=3.5,
    delta=1e-5,
    protects="device features",
    settings=Training(),
    oracle={},
)
WEIGHTS = {"head.weight": np.array([[1.0, -2.0]], dtype=np.float32)}
PARTS = ("taxi_server_tower", "taxi_head")
DAY_MS = 86_400_000


def promoted(workspace: Workspace, digest: str, number: int, **manifest: object) -> None:
    """What `hybrid promote` leaves of a version, with programs of no content; the last one is the default."""
    write_bundle(
        workspace.bundles / f"taxi-{number}.bundle",
        Manifest(
            model="taxi",
            version=number,
            definition_hash=digest,
            features=Features.of({"trips": Numeric()}),
            request={},
            server_embedding=1,
            device_embedding=1,
            merge="server",
            release=Clear(reason="for a test of the doctor"),
            programs={},
        ).model_copy(update=manifest),
        {"embed.pte": b"program"},
        signing_key(workspace.keys),
    )
    for part in PARTS:
        file = workspace.triton / part / str(number) / "model.onnx"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"network")
    Deployment(
        model="taxi",
        version=number,
        definition_hash=digest,
        packed_view="zones__packed",
        join_key="zone_id",
        join_key_type="text",
        max_feature_age_s=3600,
        server=Features.of({"demand": Numeric()}),
        request=Features.of({}),
        server_embedding=1,
        device_embedding=1,
        server_tower=PARTS[0],
        head=PARTS[1],
    ).write(workspace.deployments)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workspace whose version 1 is promoted, and the model's hash: the registry takes seconds to make."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "model.py").write_text(FILE)
    workspace, network = Workspace(folder / ".hybrid"), {"parameters": {"head": 2}}
    registry, model = Registry(workspace), load_model(folder / "model.py")
    digest = registry.register(model, network, folder / "model.py")
    for _ in range(2):
        registry.create_version("taxi", weights=WEIGHTS, training=TRAINING, curves={}, expected_hash=digest)
    registry.set_alias("taxi", 1, "production")
    promoted(workspace, digest, 1)
    return workspace.root, digest


@pytest.fixture
def served(template: tuple[Path, str], tmp_path: Path) -> tuple[Workspace, Registry, str]:
    """A copy of it, to be harmed, and the registry, which is not."""
    root, digest = template
    shutil.copytree(root, tmp_path / ".hybrid", ignore=shutil.ignore_patterns("mlflow"))
    return Workspace(tmp_path / ".hybrid"), Registry(Workspace(root)), digest


def look(served) -> list[tuple[str, str, str]]:
    workspace, registry, _ = served
    return [(finding.status, finding.found, finding.fix) for finding in pairs(workspace, registry)]


AGAIN = "`hybrid promote taxi 1 production` exports it again"


def test_a_version_whose_parts_agree_is_well(served):
    """Signed by the key in keys/, its Triton models there, the alias on it; where nothing is served, it is skipped."""
    assert look(served) == [("ok", "taxi 1: deployment, bundle, Triton's files and registry agree", "")]
    shutil.rmtree(served[0].deployments)
    assert look(served)[0][0] == "skipped"


def test_a_bundle_that_is_gone_fails(served):
    """Devices would fetch it."""
    (served[0].bundles / "taxi-1.bundle").unlink()
    assert look(served) == [
        ("fail", "taxi:1 is served, and its bundle taxi-1.bundle is not there to be fetched", AGAIN)
    ]


def test_a_bundle_that_was_changed_fails(served):
    """One bit of its program."""
    file = served[0].bundles / "taxi-1.bundle"
    data = bytearray(file.read_bytes())
    data[data.index(b"program")] ^= 1
    file.write_bytes(data)
    ((status, found, fix),) = look(served)
    assert (status, fix) == ("fail", AGAIN)
    assert found.startswith("devices refuse taxi-1.bundle: ")


def test_a_bundle_of_another_key_fails_and_so_do_halves_that_do_not_belong_together(served):
    """The public half, which devices trust, is another's: neither what is there nor what is promoted next would do."""
    workspace = served[0]
    other = workspace.root / "other"
    signing_key(other)
    (other / "bundle-signing.pub").replace(workspace.keys / "bundle-signing.pub")
    first, second = look(served)
    assert first[0] == "fail"
    assert first[1].startswith("keys/bundle-signing.pem is not the private half of keys/bundle-signing.pub")
    assert second[0] == "fail"
    assert second[1].startswith("devices refuse taxi-1.bundle: ")


def test_without_the_public_key_signatures_are_not_looked_at(served):
    """In a pod that only serves."""
    shutil.rmtree(served[0].keys)
    ((status, found, _),) = look(served)
    assert (status, "was not looked at" in found) == ("skipped", True)


def test_a_bundle_that_has_expired_fails(served):
    """Since the day before."""
    workspace, _, digest = served
    shutil.rmtree(workspace.triton)
    promoted(workspace, digest, 1, created_ms=0, expires_ms=DAY_MS)
    assert look(served) == [("fail", "taxi-1.bundle has expired: devices refuse it", AGAIN)]


def test_a_bundle_of_another_definition_fails(served):
    """Somebody copied it from elsewhere; it is signed by the same key."""
    workspace, _, digest = served
    shutil.rmtree(workspace.triton)
    promoted(workspace, digest, 1, definition_hash="ab" * 32)
    ((status, found, _),) = look(served)
    assert (status, found) == (
        "fail",
        f"taxi-1.bundle is of taxi:1, definition abababababab, and taxi:1 of {digest[:12]} is served",
    )


def test_a_triton_model_that_is_gone_fails(served):
    """Triton would not load it at its next start."""
    (served[0].triton / "taxi_head/1/model.onnx").unlink()
    assert look(served) == [("fail", "taxi:1 is served, and Triton's repository has no taxi_head of it", AGAIN)]


def test_a_version_that_the_registry_does_not_know_fails(served):
    """As with another registry in MLFLOW_TRACKING_URI."""
    workspace, _, digest = served
    promoted(workspace, digest, 7)
    missing, alias = look(served)
    assert missing[:2] == ("fail", "taxi:7 is served, but: taxi has no version 7; it has: 1, 2")
    assert "MLFLOW_TRACKING_URI" in missing[2]
    assert alias[:2] == ("warn", "taxi@production is version 1 in the registry, version 7 is served as that")


def test_an_alias_that_points_elsewhere_is_told(served):
    """Version 2 is served, by a promotion that was stopped before its last step."""
    workspace, _, digest = served
    promoted(workspace, digest, 2)
    assert look(served) == [
        (
            "warn",
            "taxi@production is version 1 in the registry, version 2 is served as that",
            "`hybrid promote taxi 2 production` writes both anew",
        )
    ]


def test_a_deployment_that_cannot_be_read_fails_and_others_are_looked_at(served):
    """One that is half a file."""
    (served[0].deployments / "bus.json").write_text('{"versions": [')
    bad, well = look(served)
    assert bad[0] == "fail"
    assert bad[1].startswith("bus.json is not a deployment")
    assert well[0] == "ok"
