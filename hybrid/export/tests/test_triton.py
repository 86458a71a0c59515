from pathlib import Path

import numpy as np
import onnxruntime
import torch

from hybrid.export.conformance import embedding_probes, slot_probes
from hybrid.export.triton import MAX_BATCH, export
from hybrid.network import Network


def files(repository: Path) -> set[str]:
    return {str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()}


def run(file: Path, **inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(file)
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def test_the_server_tower_in_triton_is_the_server_tower(either):
    """ONNX Runtime gives torch's embedding to 1e-5, missing and out-of-range slots included, at any batch size."""
    network = either.network
    file = either.workspace.triton / either.exported.deployment.server_tower / "2" / "model.onnx"
    slots = slot_probes(network.model.server_features)
    for rows in (1, 5, len(slots)):
        expected = network.server_program()(slots[-rows:]).detach().numpy()
        np.testing.assert_allclose(run(file, slots=slots[-rows:]), expected, rtol=1e-5, atol=1e-5)


def test_the_head_in_triton_gives_probabilities(every):
    """Its output is the sigmoid of the head's logit less the 1.5 of its correction, one column: Triton has no (n,)."""
    a, b = embedding_probes(3, 2)
    got = run(every.workspace.triton / "every_head" / "2" / "model.onnx", server=a, device=b)
    expected = 1 / (1 + np.exp(1.5 - every.network.head(a, b).detach().numpy()))
    assert got.shape == (len(a), 1)
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_batch_may_be_as_large_as_the_configuration_says(every):
    """4,096 rows, the batcher's maximum, run at once."""
    slots = torch.zeros(MAX_BATCH, len(every.network.model.server_features))
    file = every.workspace.triton / "every_server_tower" / "2" / "model.onnx"
    assert run(file, slots=slots).shape == (4096, 3)


def test_the_configuration_names_every_tensor(every):
    """5 server and 2 request slots -> 3; 3 and 2 -> 1; batches up to 4,096 after a short wait; every version."""
    text = (every.workspace.triton / "every_server_tower" / "config.pbtxt").read_text()
    assert 'input [ { name: "slots", data_type: TYPE_FP32, dims: [ 7 ] } ]' in text
    assert 'output [ { name: "embedding", data_type: TYPE_FP32, dims: [ 3 ] } ]' in text
    assert "max_batch_size: 4096" in text
    assert "dynamic_batching { max_queue_delay_microseconds: 200 }" in text
    assert "version_policy: { all: {} }" in text
    text = (every.workspace.triton / "every_head" / "config.pbtxt").read_text()
    assert '{ name: "server", data_type: TYPE_FP32, dims: [ 3 ] }, { name: "device"' in text
    assert 'output [ { name: "prediction", data_type: TYPE_FP32, dims: [ 1 ] } ]' in text


def test_versions_stand_beside_each_other_and_can_be_exported_again(every, tmp_path: Path):
    """Version 2 leaves version 1 as it is, a second export of 1 has the new weights, and no draft is left behind."""
    repository = tmp_path / "triton"
    export(every.network, 1, repository)
    first = (repository / "every_head" / "1" / "model.onnx").read_bytes()
    other = Network.build(every.network.model, seed=5)
    export(other, 2, repository)
    assert (repository / "every_head" / "1" / "model.onnx").read_bytes() == first
    export(other, 1, repository)
    slots = slot_probes(other.model.server_features)
    got = run(repository / "every_server_tower" / "1" / "model.onnx", slots=slots)
    np.testing.assert_allclose(got, other.server_program()(slots).detach().numpy(), rtol=1e-5, atol=1e-5)
    models = [f"every_{part}" for part in ("server_tower", "head")]
    versions = {f"{m}/{v}/{file}" for m in models for v in (1, 2) for file in ("model.onnx", "model.py")}
    assert files(repository) == versions | {f"{m}/config.pbtxt" for m in models}
    assert [folder.name for folder in tmp_path.iterdir()] == ["triton"]


def test_triton_s_own_onnx_backend_needs_no_python(every, tmp_path: Path):
    """For the official image the repository holds ONNX files and configurations alone."""
    export(every.network, 1, tmp_path / "triton", backend="onnxruntime")
    assert 'backend: "onnxruntime"' in (tmp_path / "triton" / "every_head" / "config.pbtxt").read_text()
    assert not list((tmp_path / "triton").rglob("*.py"))
