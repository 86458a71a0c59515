from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_runtime.program import EmbedProgram, open_bundle
from device_runtime.store import Rows
from hybrid.bundle import MAX_BYTES, Bundle
from hybrid.errors import BadRequest, BundleError, ConfigError
from hybrid.network import Network


def public(key: Ed25519PrivateKey, folder: Path) -> Path:
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "trusted.pub").write_bytes(key.public_key().public_bytes(encoding, form))
    return folder / "trusted.pub"


def test_raw_columns_become_the_tower_s_embeddings(bundle: Bundle, network: Network, rows: Rows):
    """Tables, transforms and tower give on the device what NumPy and torch give, missing values included."""
    program = EmbedProgram(bundle)
    inputs = program.inputs(rows.features)
    got = np.concatenate([program.embed(inputs[i : i + 1]) for i in range(3)])
    features = network.model.device_features
    encoded = features.encode(features.slots(features.inputs(rows.features)))
    expected = network.device_tower(torch.from_numpy(encoded)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_embeddings_do_not_share_memory(bundle: Bundle, rows: Rows):
    """A second call leaves the first one's answer as it was."""
    program = EmbedProgram(bundle)
    inputs = program.inputs(rows.features)
    first = program.embed(inputs[:1])
    kept = first.copy()
    program.embed(inputs[1:2])
    np.testing.assert_array_equal(first, kept)


def test_a_value_of_the_wrong_type_names_its_feature(bundle: Bundle, rows: Rows):
    """The message has the feature and the type, never the value."""
    with pytest.raises(BadRequest, match="feature 'mood': must be text, got int") as error:
        EmbedProgram(bundle).inputs({**rows.features, "mood": ["a", 4711, None]})
    assert "4711" not in str(error.value)
    with pytest.raises(BadRequest, match=r"features \['steps'\] are missing"):
        EmbedProgram(bundle).inputs({"mood": [None], "temperature": [None]})


def test_only_what_the_host_app_s_key_signed_is_opened(bundle_file: Path, key: Ed25519PrivateKey, tmp_path: Path):
    """The right key opens it; another, or a byte less, does not."""
    assert open_bundle(bundle_file, public(key, tmp_path)).manifest.version == 7
    short = tmp_path / "short.bundle"
    short.write_bytes(bundle_file.read_bytes()[:-1])
    with pytest.raises(BundleError):
        open_bundle(short, tmp_path / "trusted.pub")
    with pytest.raises(BundleError, match="not signed by the key this device trusts"):
        open_bundle(bundle_file, public(Ed25519PrivateKey.generate(), tmp_path))


def test_a_bundle_file_is_read_up_to_its_limit_only(key: Ed25519PrivateKey, tmp_path: Path):
    """Whatever its size on disk, one byte past the limit is enough to refuse it; an absent one is said to be."""
    large = tmp_path / "large.bundle"
    with large.open("wb") as handle:
        handle.truncate(64 * MAX_BYTES)
    with pytest.raises(BundleError, match="at most"):
        open_bundle(large, public(key, tmp_path))
    with pytest.raises(ConfigError, match="cannot be read: FileNotFoundError"):
        open_bundle(tmp_path / "absent.bundle", tmp_path / "trusted.pub")


def test_a_signed_program_that_cannot_run_is_refused(bundle: Bundle):
    """Absent, garbage, without its method, or of another size than promised: a BundleError says which program."""
    with pytest.raises(BundleError, match=r"must hold a program 'embed\.pte', got \['predict\.pte'\]"):
        EmbedProgram(Bundle(bundle.manifest, {"predict.pte": b""}))
    with pytest.raises(BundleError, match=r"program 'embed\.pte' does not load"):
        EmbedProgram(Bundle(bundle.manifest, {"embed.pte": b"garbage" * 100}))
    without_method = bundle.programs["embed.pte"].replace(b"forward", b"farward")
    with pytest.raises(BundleError, match=r"program 'embed\.pte' does not load"):
        EmbedProgram(Bundle(bundle.manifest, {"embed.pte": without_method}))
    wider = bundle.manifest.model_copy(update={"device_embedding": 5})
    program = EmbedProgram(Bundle(wider, bundle.programs))
    with pytest.raises(BundleError, match=r"must return \(1, 5\) finite numbers"):
        program.embed(np.zeros((1, 3), np.float32))
