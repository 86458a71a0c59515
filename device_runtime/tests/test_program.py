import gc
import subprocess
import sys
import traceback
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_runtime import program as programs
from device_runtime.program import EmbedProgram, Engine, check_programs, default_engine, open_bundle
from device_runtime.store import Rows
from hybrid.bundle import MAX_BYTES, Bundle
from hybrid.errors import BadRequest, BundleError, ConfigError
from hybrid.network import Network

ENGINES: tuple[Engine, ...] = get_args(Engine)


def public(key: Ed25519PrivateKey, folder: Path) -> Path:
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "trusted.pub").write_bytes(key.public_key().public_bytes(encoding, form))
    return folder / "trusted.pub"


@pytest.mark.parametrize("engine", ENGINES)
def test_raw_columns_become_the_tower_s_embeddings(bundle: Bundle, network: Network, rows: Rows, engine: Engine):
    """Tables, transforms and tower give on the device what NumPy and torch give, missing values included."""
    program = EmbedProgram(bundle, engine)
    inputs = program.inputs(rows.features)
    got = np.concatenate([program.embed(inputs[i : i + 1]) for i in range(3)])
    features = network.model.device_features
    encoded = features.encode(features.slots(features.inputs(rows.features)))
    expected = network.device_tower(torch.from_numpy(encoded)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_embeddings_do_not_share_memory(bundle: Bundle, rows: Rows, engine: Engine):
    """A second call leaves the first one's answer as it was."""
    program = EmbedProgram(bundle, engine)
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


def changed(bundle: Bundle, file: str, program: bytes) -> Bundle:
    return Bundle(bundle.manifest, bundle.programs | {file: program})


@pytest.mark.parametrize(("engine", "file"), [("executorch", "device.pte"), ("onnx", "embed.onnx")])
def test_a_signed_program_that_cannot_run_is_refused(bundle: Bundle, engine: Engine, file: str):
    """Absent, garbage, or of another size than promised: a BundleError says which program."""
    without = {name: data for name, data in bundle.programs.items() if name != file}
    with pytest.raises(BundleError, match=f"must hold a program {file!r}, got "):
        EmbedProgram(Bundle(bundle.manifest, without), engine)
    for garbage in (b"", b"garbage" * 100, bundle.programs[file][:-100]):
        with pytest.raises(BundleError, match=f"program {file!r} does not load in {engine}"):
            EmbedProgram(changed(bundle, file, garbage), engine)
    wider = bundle.manifest.model_copy(update={"device_embedding": 5})
    with pytest.raises(BundleError, match=r"must return \(1, 5\) finite numbers"):
        EmbedProgram(Bundle(wider, bundle.programs), engine).embed(np.zeros((1, 3), np.float32))
    with pytest.raises(BundleError, match=r"does not take \(1, 4\) inputs"):
        EmbedProgram(bundle, engine).embed(np.zeros((1, 4), np.float32))


def onnx_program(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> bytes:
    """x (n, 3) -> y (n, 4), as the bundle's tower."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])
    graph = onnx.helper.make_graph(nodes, "tower", [x], [y], constants)
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def test_a_signed_program_reads_no_file_of_the_device(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ONNX lets constants lie in files; one of the app's own, read as weights, would leave as the embedding."""
    monkeypatch.chdir(tmp_path)
    Path("photo.raw").write_bytes(np.arange(12, dtype="<f4").tobytes())
    weights = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[3, 4], data_location="EXTERNAL")
    for name, value in {"location": "photo.raw", "offset": "0", "length": "48"}.items():
        weights.external_data.add(key=name, value=value)
    program = onnx_program([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], [weights])
    with pytest.raises(BundleError, match=r"'embed\.onnx' does not load in onnx"):
        EmbedProgram(changed(bundle, "embed.onnx", program), "onnx")


def test_an_engine_s_error_does_not_tell_a_feature(bundle: Bundle):
    """ONNX Runtime names an index that a table lacks, which is the feature; the error with all its causes does not."""
    table = onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [3, 4], [0.0] * 12)
    first = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0])
    nodes = [
        onnx.helper.make_node("Gather", ["x", "i"], ["column"], axis=1),
        onnx.helper.make_node("Cast", ["column"], ["index"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("GatherND", ["t", "index"], ["y"]),
    ]
    program = EmbedProgram(changed(bundle, "embed.onnx", onnx_program(nodes, [table, first])), "onnx")
    assert program.embed(np.array([[2, 0, 0]], np.float32)).shape == (1, 4)
    absent = np.array([[4711, 0, 0]], np.float32)
    with pytest.raises(BundleError, match="does not take") as caught:
        program.embed(absent)
    assert "4711" not in "".join(traceback.format_exception(caught.value))


def test_a_bundle_whose_program_does_not_end_does_not_pass(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    """Signed as it is, it would keep the folder's lock for ever, and with it the bundle that mends it."""
    monkeypatch.setattr(programs, "TRIAL_S", 0.2)
    helper, kind = onnx.helper, onnx.TensorProto
    values = [helper.make_tensor_value_info(name, kind.FLOAT, ["n", 4]) for name in ("a", "b")]
    truths = [helper.make_tensor_value_info(name, kind.BOOL, []) for name in ("c", "d")]
    number = helper.make_tensor_value_info("i", kind.INT64, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Tanh", ["a"], ["b"])],
        "body",
        [number, truths[0], values[0]],
        [truths[1], values[1]],
    )
    constants = [
        helper.make_tensor("times", kind.INT64, [], [2**62]),
        helper.make_tensor("true", kind.BOOL, [], [True]),
        helper.make_tensor("w", kind.FLOAT, [3, 4], [0.5] * 12),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["first"]),
        helper.make_node("Loop", ["times", "true", "first"], ["y"], body=body),
    ]
    with pytest.raises(BundleError, match=r"'embed\.onnx' takes more than 0\.2 s for one row"):
        check_programs(changed(bundle, "embed.onnx", onnx_program(nodes, constants)), "onnx")


def test_a_program_without_its_method_is_refused(bundle: Bundle):
    """An ExecuTorch program may hold other methods than the one that is run."""
    without_method = bundle.programs["device.pte"].replace(b"embed", b"limbs")
    with pytest.raises(BundleError, match=r"program 'device\.pte' does not load"):
        EmbedProgram(changed(bundle, "device.pte", without_method), "executorch")


@pytest.mark.parametrize(
    ("file", "operator", "unknown"), [("device.pte", b"aten::tanh", b"aten::tanz"), ("predict.onnx", b"Tanh", b"Tanz")]
)
def test_a_bundle_with_an_operator_that_the_engine_lacks_does_not_pass(
    bundle: Bundle, file: str, operator: bytes, unknown: bytes
):
    """Also in a program that an inference of this model does not run."""
    check_programs(bundle)
    assert operator in bundle.programs[file]
    with pytest.raises(BundleError, match=f"program {file!r} does not load"):
        check_programs(changed(bundle, file, bundle.programs[file].replace(operator, unknown)))


def test_a_bundle_whose_program_is_another_one_does_not_pass(bundle: Bundle):
    """It is run once: a merge in the tower's place takes another input."""
    with pytest.raises(BundleError, match=r"'embed\.onnx'"):
        check_programs(changed(bundle, "embed.onnx", bundle.programs["predict.onnx"]))
    on_device = bundle.manifest.model_copy(update={"merge": "device", "release": None})
    with pytest.raises(BundleError, match=r"'predict\.onnx'"):
        check_programs(Bundle(on_device, bundle.programs | {"predict.onnx": bundle.programs["embed.onnx"]}))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_program_outlives_its_bundle(bundle: Bundle, rows: Rows, engine: Engine):
    """ExecuTorch's methods point into memory of the program and of its bytes, which nobody else holds any more."""
    own = Bundle(bundle.manifest, {name: bytes(bytearray(data)) for name, data in bundle.programs.items()})
    program = EmbedProgram(own, engine)
    inputs = program.inputs(rows.features)[:1]
    before = program.embed(inputs)
    del own
    gc.collect()
    junk = [bytes(bytearray(b"\xff" * 30_000)) for _ in range(100)]
    np.testing.assert_array_equal(program.embed(inputs), before)
    del junk


FIRST_INFERENCE = """
import sys
from pathlib import Path
from device_runtime.program import EmbedProgram, open_bundle

opened = open_bundle(*map(Path, sys.argv[1:]))
program = EmbedProgram(opened, "onnx")
inputs = program.inputs({name: [None] for name in opened.manifest.features.names})
assert program.embed(inputs).shape == (1, 4)
print(*sys.modules)
"""
HEAVY = {"executorch", "flwr", "feast", "kafka", "mlflow", "opacus", "pandas", "pyarrow", "torch", "tritonclient"}
SERVERS = {"aiohttp", "fastapi", "flask", "grpc", "hypercorn", "starlette", "uvicorn", "serving", "feature_store"}


def test_an_inference_by_onnx_runtime_brings_neither_torch_nor_a_server(
    bundle_file: Path, key: Ed25519PrivateKey, tmp_path: Path
):
    """Of a process that verified a bundle and ran it once, all modules: no HEAVY one, none of SERVERS, no HTTP."""
    command = [sys.executable, "-c", FIRST_INFERENCE, str(bundle_file), str(public(key, tmp_path))]
    loaded = {name.split(".")[0] for name in subprocess.check_output(command, text=True).split()}
    assert "onnxruntime" in loaded
    assert not loaded & (HEAVY | SERVERS | {"httpx"})


def test_the_engine_is_the_phones_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, bundle: Bundle):
    """ExecuTorch with torch, else ONNX Runtime; with neither, and where an absent one is asked for, a sentence says."""
    absent: set[str] = set()
    found = programs.importlib.util.find_spec
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    assert default_engine() == "executorch"
    absent.add("torch")
    assert default_engine() == "onnx"
    assert EmbedProgram(bundle).engine == "onnx"
    with pytest.raises(ConfigError, match="engine 'executorch' needs executorch and torch"):
        EmbedProgram(bundle, "executorch")
    absent.add("onnxruntime")
    with pytest.raises(ConfigError, match="a device needs ONNX Runtime, or ExecuTorch and torch"):
        default_engine()
