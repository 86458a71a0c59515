"""The Open Inference Protocol v2 over HTTP: bytes to typed rows and back, and nothing else.

JSON and the binary tensor extension, both ways, so that any client of the
protocol (`tritonclient.http`, curl) can ask. Everything a caller can get wrong
is found here, once; what comes out needs no further check. `read` checks the
tensors of gRPC too.

Source: https://github.com/kserve/open-inference-protocol (inference_rest.md) and
Triton's extension_binary_data.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from hybrid.deployment import Deployment
from hybrid.errors import BadRequest, ServingError
from hybrid.protocol import (
    DEVICE_EMBEDDING,
    ENTITY,
    EXPIRES_MS,
    FALLBACK,
    FEATURE_AGE_MS,
    HEADER_LENGTH,
    MERGED,
    OUTPUTS,
    PREDICTION,
    SERVER_EMBEDDING,
    SERVER_SLOTS,
    STATUS,
    TRANSPORT,
    VERSION,
)

MAX_ROWS = 1024  # of one request
MAX_ENTITY_BYTES = 256
MAX_TEXT = 1024  # characters
_NUMPY: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}


@dataclass(frozen=True)
class Rows:
    """What one request asks about.

    Attributes:
        entity: (n,) join keys as text.
        request: (n, r) request features as slots.
        embedding: (n, d) as released by the device, finite; all NaN where the request came without; (n, 0) where
            the device merges.
        contribution: numbers of the server's embedding that each row is to be answered with; 0: it is not wanted.
        slots: the same of the server tower's slots.
    """

    entity: NDArray[np.object_]
    request: NDArray[np.float32]
    embedding: NDArray[np.float32]
    contribution: int = 0
    slots: int = 0

    def __len__(self) -> int:
        return len(self.entity)

    @property
    def nbytes(self) -> int:
        """Of all numbers, and of those that come back for `contribution` and `slots`."""
        return self.request.nbytes + self.embedding.nbytes + 4 * len(self) * (self.contribution + self.slots)


@dataclass(frozen=True)
class Infer:
    """One inference request.

    Attributes:
        id: the caller's, echoed; None if there was none.
        rows: what it asks about.
        outputs: wanted output -> whether as binary.
        timeout_s: how long the caller waits; None if it did not say.
    """

    id: str | None
    rows: Rows
    outputs: Mapping[str, bool]
    timeout_s: float | None = None


@dataclass(frozen=True)
class Answers:
    """What answers one request, (n,) each; every row has a prediction, or what a device predicts from.

    Attributes:
        prediction: probabilities; meaningless where the device merges.
        feature_age_ms: of the server's features; -1 where there were none.
        status: "ok", or why a side is missing.
        fallback: what answered then; else "none".
        expires_ms: as in `Predictions`; None where nobody may ask for it.
        server_embedding: (n, a) as in `Predictions`; None likewise.
        server_slots: (n, s + r) the same.
    """

    prediction: NDArray[np.float32]
    feature_age_ms: NDArray[np.int64]
    status: Sequence[str]
    fallback: Sequence[str]
    expires_ms: NDArray[np.int64] | None = None
    server_embedding: NDArray[np.float32] | None = None
    server_slots: NDArray[np.float32] | None = None


def inputs_of(deployment: Deployment) -> list[dict[str, Any]]:
    """Names, datatypes and shapes of what a request holds."""
    inputs = {name: (datatype, [-1]) for name, datatype in _scalars(deployment).items()}
    if deployment.merge == "server":
        inputs[DEVICE_EMBEDDING] = ("FP32", [-1, deployment.device_embedding])
    return [{"name": n, "datatype": d, "shape": s} for n, (d, s) in inputs.items()]


def outputs_of(deployment: Deployment) -> list[str]:
    """What a request is answered with where it names no outputs."""
    others = {PREDICTION} if deployment.merge == "device" else {SERVER_EMBEDDING, EXPIRES_MS}
    return [name for name in OUTPUTS if name not in {SERVER_SLOTS, *others}]


def allowed_outputs(deployment: Deployment) -> list[str]:
    """What a request may name: beside those the server's contribution, where the model declares it."""
    given = outputs_of(deployment)
    if deployment.serving.contribution and SERVER_EMBEDDING not in given:
        given.append(SERVER_EMBEDDING)
    return [*given, SERVER_SLOTS] if deployment.server_slots else given


def wanted(names: Iterable[str], deployment: Deployment) -> list[str]:
    """The outputs that a request names, or all that are given where it names none.

    Raises:
        BadRequest: the model has no such output, or gives it to nobody.
    """
    asked, allowed = list(names), allowed_outputs(deployment)
    for name in asked:
        if name not in allowed:
            what = "unknown output"
            if name == SERVER_SLOTS and deployment.contributes != "slots":
                what = "devices do not train the server tower of this version, so there is no output"
            elif name in {SERVER_EMBEDDING, SERVER_SLOTS}:
                what = "serving.contribution is not declared, so nobody is given output"
            elif name == PREDICTION:
                what = "the device predicts (merge='device'), so there is no output"
            raise BadRequest(f"{what} {_short(name)}; {deployment.model} gives {allowed}")
    return asked or outputs_of(deployment)


def model_metadata(deployment: Deployment, versions: Sequence[int]) -> dict[str, Any]:
    """What `GET /v2/models/{name}` answers.

    Args:
        deployment: whose tensors.
        versions: that are served.
    """
    outputs = allowed_outputs(deployment)
    return {
        "name": deployment.model,
        "versions": [str(version) for version in versions],
        "platform": "hybrid",
        "inputs": inputs_of(deployment),
        "outputs": [{"name": n, "datatype": OUTPUTS[n], "shape": shape(n, -1, deployment)} for n in outputs],
    }


def shape(output: str, rows: int, deployment: Deployment) -> list[int]:
    """Of an output of so many rows."""
    wide = {SERVER_EMBEDDING: deployment.server_embedding, SERVER_SLOTS: deployment.server_slots}
    return [rows, wide[output]] if output in wide else [rows]


def decode(body: bytes, header_length: str | None, deployment: Deployment) -> Infer:
    """Reads the body of an inference request.

    Args:
        body: JSON, followed by raw tensors where `header_length` says so.
        header_length: value of the `Inference-Header-Content-Length` header; None without it.
        deployment: the model that is asked.

    Raises:
        BadRequest: anything is not as the model's metadata says. The message
            names the input, what it must be and what it got; it holds no value.
    """
    document, raw = _split(body, header_length)
    inputs, outputs = _by_name(document.get("inputs"), "inputs"), _wanted(document, deployment)
    rows = read(inputs, _chunks(inputs, raw), outputs, deployment)
    return Infer(_id(document), rows, outputs, timeout_s(_parameters(document).get("timeout")))


def read(
    inputs: Mapping[str, Mapping[str, Any]],
    chunks: Mapping[str, memoryview | None],
    outputs: Iterable[str],
    deployment: Deployment,
) -> Rows:
    """Checks the tensors of a request, whichever way they came.

    Args:
        inputs: name -> the protocol's tensor object: name, datatype, shape, and data where that is not raw.
        chunks: name -> its raw bytes; None where its values are in the object.
        outputs: wanted.
        deployment: the model that is asked.

    Raises:
        BadRequest: see `decode`.
    """
    scalars = _scalars(deployment)
    expected = [tensor["name"] for tensor in inputs_of(deployment)]
    needed = scalars if deployment.serving.missing_device != "error" else expected
    if DEVICE_EMBEDDING in inputs and DEVICE_EMBEDDING not in expected:
        raise BadRequest(
            f"input {DEVICE_EMBEDDING!r} must not be sent: {deployment.model} merges on the device, where it stays; "
            f"{deployment.model} takes {expected}"
        )
    unknown, missing = [n for n in inputs if n not in expected], [n for n in needed if n not in inputs]
    if unknown:
        raise BadRequest(f"unknown input {_short(unknown[0])}; {deployment.model} takes {expected}")
    if missing:
        raise BadRequest(f"inputs {missing} are missing; {deployment.model} takes {expected}")
    rows = _rows_of(inputs[ENTITY])
    values = {n: _tensor(inputs[n], d, (rows,), chunks[n], n in deployment.request.names) for n, d in scalars.items()}
    for name, datatype in scalars.items():
        if datatype == "BYTES":
            _check_lengths(name, values[name])
    embedding = np.full((rows, deployment.sent_embedding), np.nan, np.float32)
    if DEVICE_EMBEDDING in inputs:
        embedding = _tensor(inputs[DEVICE_EMBEDDING], "FP32", embedding.shape, chunks[DEVICE_EMBEDDING])
        if not np.isfinite(embedding).all():
            raise BadRequest(f"input {DEVICE_EMBEDDING!r} must be finite, got NaN or infinity")
    request = deployment.request.slots(deployment.request.inputs(values)).reshape(rows, len(deployment.request))
    entity = _entities(values[ENTITY], deployment.join_key_type)
    gives_server = deployment.merge == "device" or SERVER_EMBEDDING in outputs
    contribution = deployment.server_embedding if gives_server else 0
    return Rows(entity, request, embedding, contribution, deployment.server_slots if SERVER_SLOTS in outputs else 0)


def timeout_s(given: object) -> float | None:
    """The request parameter `timeout`, microseconds as Triton has it, in seconds; None where it is absent or 0.

    Raises:
        BadRequest: it is not a whole number >= 0.
    """
    return _count(0 if given is None else given, "parameter timeout") / 1e6 or None


def columns(n: int, answers: Answers, deployment: Deployment) -> dict[str, Any]:
    """Every output of `n` rows, by name; a matrix row by row."""
    return {
        PREDICTION: answers.prediction,
        VERSION: np.full(n, deployment.version),
        FEATURE_AGE_MS: answers.feature_age_ms,
        EXPIRES_MS: answers.expires_ms,
        SERVER_EMBEDDING: _flattened(answers.server_embedding),
        SERVER_SLOTS: _flattened(answers.server_slots),
        MERGED: [deployment.merge] * n,
        TRANSPORT: [deployment.serving.transport] * n,
        STATUS: answers.status,
        FALLBACK: answers.fallback,
    }


def _flattened(matrix: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    return None if matrix is None else matrix.ravel()


def encode(infer: Infer, answers: Answers, deployment: Deployment) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON part if raw tensors follow it."""
    n = len(infer.rows)
    values = columns(n, answers, deployment)
    outputs, raw = [], []
    for name, binary in infer.outputs.items():
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": shape(name, n, deployment)}
        if binary:
            raw.append(to_binary(values[name], OUTPUTS[name]))
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = values[name]
        outputs.append(output)
    document = {"model_name": deployment.model, "model_version": str(deployment.version), "outputs": outputs}
    if infer.id is not None:
        document["id"] = infer.id
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return header + b"".join(raw), len(header) if raw else None


def to_binary(values: Any, datatype: str) -> bytes:
    """A column as the protocol's raw bytes: little endian; each text behind its length in 4 bytes."""
    if datatype == "BYTES":
        return b"".join(len(text).to_bytes(4, "little") + text for text in map(str.encode, values))
    return np.ascontiguousarray(values, dtype=_NUMPY[datatype]).tobytes()


def encode_error(error: ServingError) -> bytes:
    """The protocol's error object, with the reason as one stable word."""
    return orjson.dumps({"error": str(error), "code": error.code})


def _scalars(deployment: Deployment) -> dict[str, str]:
    """Inputs with one value per row, and their datatypes."""
    request = {n: "BYTES" if t.text else "FP32" for n, t in deployment.request.transforms.items()}
    return {ENTITY: "BYTES", **request}


def _split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON document, and the raw bytes behind it."""
    length = len(body) if header_length is None else _count(header_length, HEADER_LENGTH)
    if length > len(body):
        raise BadRequest(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    try:
        document = orjson.loads(body[:length])
    except orjson.JSONDecodeError:
        raise BadRequest("the request must be JSON in UTF-8 without NaN, and is not") from None
    if not isinstance(document, dict):
        raise BadRequest(f"the request must be a JSON object, got {type(document).__name__}")
    return document, memoryview(body)[length:]


def _count(value: object, what: str) -> int:
    """A whole number >= 0, from text or JSON."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise BadRequest(f"{what} must be a whole number >= 0")


def _by_name(tensors: object, what: str) -> dict[str, dict[str, Any]]:
    """Tensor objects by their names, in order."""
    named = isinstance(tensors, list) and all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in tensors)
    if not isinstance(tensors, list) or not named:
        raise BadRequest(f"{what} must be a list of objects with a name")
    found = {tensor["name"]: tensor for tensor in tensors}
    if len(found) < len(tensors):
        raise BadRequest(f"{what} must have distinct names")
    return found


def _parameters(owner: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest("parameters must be an object")
    return parameters


def _chunks(inputs: Mapping[str, Mapping[str, Any]], raw: memoryview) -> dict[str, memoryview | None]:
    """Each input's raw bytes, which lie in the order of the inputs; None where its data is in the JSON."""
    chunks: dict[str, memoryview | None] = {}
    place = 0
    for name, tensor in inputs.items():
        chunks[name], size = None, _parameters(tensor).get("binary_data_size")
        if size is not None:
            end = place + _count(size, f"binary_data_size of input {name!r}")
            chunks[name], place = raw[place:end], end
    if place != len(raw):
        raise BadRequest(f"the inputs' binary_data_size add up to {place}, but {len(raw)} bytes follow the JSON")
    return chunks


def _rows_of(tensor: Mapping[str, Any]) -> int:
    shape = tensor.get("shape")
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or not 1 <= shape[0] <= MAX_ROWS:
        raise BadRequest(f"input {ENTITY!r} must have shape [n] with 1 <= n <= {MAX_ROWS}, got {_short(shape)}")
    return shape[0]


def _tensor(
    tensor: Mapping[str, Any], datatype: str, shape: tuple[int, ...], chunk: memoryview | None, missing: bool = False
) -> NDArray[Any]:
    """One input's values, checked to be of `datatype` and `shape`.

    `chunk` is its raw bytes, None where its data is in the JSON; `missing` allows
    null there (a request feature may be missing).
    """
    name = tensor["name"]
    if tensor.get("datatype") != datatype:
        raise BadRequest(f"input {name!r} must have datatype {datatype}, got {_short(tensor.get('datatype'))}")
    if tensor.get("shape") != list(shape):
        raise BadRequest(f"input {name!r} must have shape {list(shape)}, got {_short(tensor.get('shape'))}")
    size = math.prod(shape)
    if chunk is None:
        return _from_json(name, tensor.get("data"), datatype, size, missing).reshape(shape)
    if datatype == "BYTES":
        return _texts(name, chunk, size)
    if len(chunk) != 4 * size:
        raise BadRequest(f"input {name!r} must have {4 * size} bytes, got {len(chunk)}")
    return np.frombuffer(chunk, dtype=_NUMPY[datatype]).reshape(shape)


def _from_json(name: str, data: object, datatype: str, size: int, missing: bool) -> NDArray[Any]:
    """(size,) values, flat or nested in row-major order."""
    if not isinstance(data, list):
        raise BadRequest(f"input {name!r} must have data as a list, or a binary_data_size")
    values = list(_flat(data)) if any(type(value) is list for value in data) else data
    if len(values) != size:
        raise BadRequest(f"input {name!r} must have {size} values, got {len(values)}")
    allowed = ({str} if datatype == "BYTES" else {int, float}) | ({type(None)} if missing else set())
    wrong = sorted({type(value).__name__ for value in values if type(value) not in allowed})
    if wrong:
        what = "strings" if datatype == "BYTES" else "numbers"
        raise BadRequest(f"input {name!r} must hold {what}, got {', '.join(wrong)}")
    if datatype == "BYTES":
        return np.array(values, dtype=object)
    with np.errstate(over="ignore"):  # past float32 is infinite, which is refused or counts as missing
        return np.array(values, dtype=np.float64).astype(np.float32)


def _flat(data: Sequence[Any], depth: int = 1) -> Iterator[Any]:
    if depth > 2:
        raise BadRequest("data must be nested no deeper than its shape")
    for value in data:
        if isinstance(value, list):
            yield from _flat(value, depth + 1)
        else:
            yield value


def _texts(name: str, chunk: memoryview, size: int) -> NDArray[np.object_]:
    """(size,) texts, each behind its length (4 bytes, little endian)."""
    texts, place = [], 0
    for _ in range(size):
        end = place + 4 + int.from_bytes(chunk[place : place + 4], "little")
        if place + 4 > len(chunk) or end > len(chunk):
            raise BadRequest(f"input {name!r} must hold {size} strings, each behind its length, and ends before")
        texts.append(text(name, bytes(chunk[place + 4 : end])))
        place = end
    if place != len(chunk):
        raise BadRequest(f"input {name!r} must hold {size} strings, but {len(chunk) - place} bytes follow them")
    return np.array(texts, dtype=object)


def text(name: str, data: bytes) -> str:
    """One value of a BYTES input; raises BadRequest if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"input {name!r} must be UTF-8 text") from None


def _check_lengths(name: str, texts: NDArray[np.object_]) -> None:
    """Before anything looks at a text's characters: to bring one into its normal form can take time quadratic in it."""
    if max((len(text) for text in texts if text is not None), default=0) > MAX_TEXT:
        raise BadRequest(f"input {name!r} must have at most {MAX_TEXT} characters in each row")


def _entities(texts: NDArray[np.object_], join_key_type: str) -> NDArray[np.object_]:
    for text in texts:
        if not 0 < len(text.encode()) <= MAX_ENTITY_BYTES:
            raise BadRequest(f"input {ENTITY!r} must have 1 to {MAX_ENTITY_BYTES} bytes of UTF-8 in each row")
        if join_key_type == "integer" and not _is_int64(text):
            raise BadRequest(f"input {ENTITY!r} must hold whole numbers of 64 bits, as text")
    return texts


def _is_int64(text: str) -> bool:
    """Whether `text` is a signed whole number of 64 bits in ASCII digits."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 20 and -(2**63) <= int(text) < 2**63


def _id(document: Mapping[str, Any]) -> str | None:
    given = document.get("id")
    if given is not None and not isinstance(given, str):
        raise BadRequest(f"id must be text, got {type(given).__name__}")
    return given


def _wanted(document: Mapping[str, Any], deployment: Deployment) -> dict[str, bool]:
    """The outputs asked for, all that are given where none are named, and whether each goes out as binary."""
    by_default = _parameters(document).get("binary_data_output") is True
    if not document.get("outputs"):
        return dict.fromkeys(outputs_of(deployment), by_default)
    asked = _by_name(document["outputs"], "outputs")
    wanted(asked, deployment)
    return {name: _parameters(output).get("binary_data", by_default) is True for name, output in asked.items()}


def _short(value: object) -> str:
    """Names and shapes as the caller wrote them, cut where they are long."""
    try:
        text = repr(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 80 else f"{text[:77]}..."
