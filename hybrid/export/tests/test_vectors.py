import json
import math

import numpy as np
import onnxruntime
import pytest
import torch

from hybrid.export.tests.conftest import Promoted
from hybrid.export.vectors import NUMBERS, TEXTS, Vectors, vectors


@pytest.fixture(scope="module", params=["coupon", "every"])
def promoted(request) -> Promoted:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def shared(promoted: Promoted) -> Vectors:
    """1,000 rows of the exported network."""
    return vectors(promoted.network, rows=1000)


def executorch(data: bytes, name: str, *arrays: np.ndarray) -> np.ndarray:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(data)
    method = program.load_method(name)
    rows = zip(*(torch.from_numpy(array).split(1) for array in arrays), strict=True)
    return np.concatenate([method.execute(list(row))[0].numpy().copy() for row in rows])


def onnx(data: bytes, *arrays: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))[0]


@pytest.mark.parametrize("part", ["embed", "predict"])
def test_every_program_agrees_with_torch_and_with_the_other_runtime(promoted: Promoted, shared: Vectors, part: str):
    """To 1e-5, absolute and relative, on 1,000 rows: random, missing, unseen, extreme and non-ASCII raw values."""
    bundle = promoted.bundle
    expected = shared.embedding if part == "embed" else shared.prediction
    given = [shared.inputs] if part == "embed" else [shared.inputs, shared.server]
    pte = executorch(bundle.programs["device.pte"], part, *given)
    portable = onnx(bundle.programs[f"{part}.onnx"], *given)
    assert len(expected) == 1000
    np.testing.assert_allclose(pte, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(portable, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(portable, pte, rtol=1e-5, atol=1e-5)


def test_each_edge_value_of_each_feature_is_among_them(shared: Vectors):
    """Missing and non-ASCII text, numbers missing, infinite and at the ends of float32, and values beside each edge."""
    for name, transform in shared.features.transforms.items():
        got = {repr(value) for value in shared.raw[name]}
        assert {repr(value) for value in (TEXTS if transform.text else NUMBERS)} <= got
    hours = shared.raw.get("own_hours")
    if hours is not None:  # its edges are 1, 24 and 168, at which float32's steps are 2^-23, 2^-19 and 2^-16
        assert {1.0, 1 + 2**-23, 1 - 2**-24, 24.0, 24 + 2**-19, 168 - 2**-16} <= {v for v in hours if v is not None}


def test_the_shared_file_reads_back_as_the_same_numbers(shared: Vectors):
    """Strict JSON, without NaN or Infinity as bare words; float32 values come back exactly by way of float64."""

    def refuse(word: str):
        raise AssertionError(word)

    document = json.loads(shared.to_json(), parse_constant=refuse)
    read = np.array([[float(value) for value in row] for row in document["inputs"]], np.float32)
    np.testing.assert_array_equal(read, shared.inputs)
    np.testing.assert_array_equal(np.array(document["embedding"], np.float32), shared.embedding)
    np.testing.assert_array_equal(np.array(document["prediction"], np.float32), shared.prediction)
    assert document["features"] == shared.features.model_dump(mode="json")
    for name, transform in shared.features.transforms.items():
        back = [v if transform.text or v is None else float(v) for v in document["raw"][name]]
        same = (a == b or (a != a and b != b) for a, b in zip(back, shared.raw[name], strict=True))
        assert all(same)
    assert all(math.isfinite(value) for row in document["server"] for value in row)
