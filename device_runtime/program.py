"""A verified bundle's programs, loaded in one of two engines.

"executorch" is what phones run. Its Python wheel takes torch's tensors alone, so a process that uses it pays for
torch: seconds and half a gigabyte. "onnx" is ONNX Runtime, which needs neither; its programs compute the same to 1e-5
(`hybrid/export/tests/test_vectors.py`).
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from device_runtime import RUNTIME
from hybrid.bundle import MAX_BYTES, Bundle, read_bundle, trusted_key
from hybrid.errors import BundleError, ConfigError
from hybrid.features import Features

Engine = Literal["executorch", "onnx"]
# Arrays in the order of the program's inputs -> its outputs, which share no memory with it. RuntimeError: other shapes.
Run = Callable[..., list[NDArray[np.float32]]]
TRIAL_S = 10.0  # of the one inference that a bundle makes before it is installed
_NEEDS: Mapping[Engine, tuple[str, ...]] = {"executorch": ("executorch", "torch"), "onnx": ("onnxruntime",)}
_ENDINGS: Mapping[Engine, str] = {"executorch": ".pte", "onnx": ".onnx"}


def default_engine() -> Engine:
    """ExecuTorch, as on phones, where it is installed with the torch that it needs; else ONNX Runtime.

    Raises:
        ConfigError: neither is installed.
    """
    return _engines()[0]


def open_bundle(file: Path, trust: Path) -> Bundle:
    """Reads and verifies a bundle file.

    Args:
        file: the bundle.
        trust: the host app's public key (PEM), never one that came with the bundle.

    Raises:
        BundleError: it is not what that key signed, or cannot be run here.
        ConfigError: a file cannot be read.
    """
    trusted = trusted_key(trust)
    try:
        with file.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)  # one more than is taken, so that a larger one is refused
    except OSError as error:
        raise ConfigError(f"bundle {str(file)!r} cannot be read: {type(error).__name__}") from None
    return read_bundle(data, trusted, runtime=RUNTIME)


class DeviceProgram:
    """A program of a bundle: raw columns -> inputs -> what it computes, one row at a time as on a device.

    Args:
        bundle: verified.
        name: "embed" or "predict".
        engine: what runs it; None: `default_engine`.
        limit_s: of one run, in ONNX Runtime; ExecuTorch's cannot be ended. None: none.

    Attributes:
        engine: that runs it.
        label: what messages call it.

    Raises:
        BundleError: the program is absent, or the engine does not load it.
        ConfigError: the engine is not installed.
    """

    def __init__(
        self, bundle: Bundle, name: str, engine: Engine | None = None, *, limit_s: float | None = None
    ) -> None:
        self.engine: Engine = default_engine() if engine is None else engine
        file = "device.pte" if self.engine == "executorch" else f"{name}.onnx"
        self.label = f"{file}:{name}" if self.engine == "executorch" else file
        self._features: Features = bundle.manifest.features
        self._run = load_program(bundle, file, name, limit_s=limit_s)

    def inputs(self, columns: Mapping[str, Sequence[Any]]) -> NDArray[np.float32]:
        """Raw device features by name, each (n,) -> (n, features) inputs.

        Raises:
            BadRequest: a column is absent, or holds values of the wrong type.
        """
        return self._features.inputs(columns)


class EmbedProgram(DeviceProgram):
    """The device tower. See `DeviceProgram`."""

    def __init__(self, bundle: Bundle, engine: Engine | None = None, *, limit_s: float | None = None) -> None:
        super().__init__(bundle, "embed", engine, limit_s=limit_s)
        self._size = bundle.manifest.device_embedding

    def embed(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(1, features) inputs -> (1, device_embedding), before any release.

        Raises:
            BundleError: the program gives another shape than its manifest says, or no finite numbers.
        """
        try:
            (embedding,) = self._run(inputs)
        except RuntimeError:  # of its text nothing: an index that a table lacks is in it, and that is a feature
            raise BundleError(f"program {self.label!r} does not take {inputs.shape} inputs") from None
        if embedding.shape != (1, self._size) or not np.isfinite(embedding).all():
            raise BundleError(f"program {self.label!r} must return (1, {self._size}) finite numbers")
        return embedding


class PredictProgram(DeviceProgram):
    """The merge on the device: device tower, then head over the server's embedding. See `DeviceProgram`."""

    def __init__(self, bundle: Bundle, engine: Engine | None = None, *, limit_s: float | None = None) -> None:
        super().__init__(bundle, "predict", engine, limit_s=limit_s)
        self._size = bundle.manifest.server_embedding

    def predict(self, inputs: NDArray[np.float32], server: NDArray[np.float32]) -> float:
        """(1, features) inputs, (1, server_embedding) finite -> a probability; NaN where the head overflows.

        Raises:
            BundleError: the program gives no one number, or none in [0, 1].
        """
        assert server.shape == (1, self._size)
        try:
            (prediction,) = self._run(inputs, server)
        except RuntimeError:  # as in `EmbedProgram.embed`
            raise BundleError(f"program {self.label!r} does not take (1, {self._size}) numbers of the server") from None
        if prediction.shape != (1,) or not (np.isnan(prediction[0]) or 0 <= prediction[0] <= 1):
            raise BundleError(f"program {self.label!r} must return one probability")
        return float(prediction[0])


def program_of(bundle: Bundle, engine: Engine | None = None) -> EmbedProgram | PredictProgram:
    """The program that an inference runs: the tower alone where the server merges, else the merge."""
    return (EmbedProgram if bundle.manifest.merge == "server" else PredictProgram)(bundle, engine)


def check_programs(bundle: Bundle, engine: Engine | None = None) -> None:
    """Loads every program of an engine, and runs once the one that an inference needs.

    Args:
        bundle: verified.
        engine: whose programs; None: of each that is installed. Nothing here runs the others'.

    Raises:
        BundleError: one does not load, for an operator that its engine lacks for example, does not give what its
            manifest says, or takes longer than `TRIAL_S`.
        ConfigError: no engine is installed, or this one is not.
    """
    manifest = bundle.manifest
    nothing = np.array([None], dtype=object)
    missing = manifest.features.inputs(dict.fromkeys(manifest.features.names, nothing))
    for each in (engine,) if engine else _engines():
        for file in (name for name in bundle.programs if name.endswith(_ENDINGS[each])):
            load_program(bundle, file, None)
        if manifest.merge == "server":
            EmbedProgram(bundle, each, limit_s=TRIAL_S).embed(missing)
        else:
            server = np.zeros((1, manifest.server_embedding), np.float32)
            PredictProgram(bundle, each, limit_s=TRIAL_S).predict(missing, server)


def load_program(bundle: Bundle, file: str, method: str | None = "forward", *, limit_s: float | None = None) -> Run:
    """A program in the engine that its file's ending names.

    Args:
        bundle: verified.
        file: the program's.
        method: of an ExecuTorch program, which may have several; None: all are loaded, and the last one returned.
        limit_s: see `DeviceProgram`; a run that takes longer raises BundleError.

    Raises:
        BundleError: it is absent, or does not load.
        ConfigError: the engine is not installed.
    """
    if file not in bundle.programs:
        raise BundleError(f"the bundle must hold a program {file!r}, got {sorted(bundle.programs)}")
    engine: Engine = "onnx" if file.endswith(_ENDINGS["onnx"]) else "executorch"
    if not _installed(engine):
        raise ConfigError(f"engine {engine!r} needs {' and '.join(_NEEDS[engine])}, which are not installed here")
    data = bundle.programs[file]
    try:
        return _onnx(file, data, limit_s) if engine == "onnx" else _executorch(data, method)
    except RuntimeError as error:
        raise BundleError(f"program {file!r} does not load in {engine}: {error}") from None


def _installed(engine: Engine) -> bool:
    return all(importlib.util.find_spec(name) for name in _NEEDS[engine])


def _engines() -> list[Engine]:
    """Those that are installed, the one to prefer first."""
    found = [engine for engine in _NEEDS if _installed(engine)]
    if not found:
        raise ConfigError("a device needs ONNX Runtime, or ExecuTorch and torch: install hybrid-towers[device]")
    return found


def _executorch(data: bytes, name: str | None) -> Run:
    from torch import from_numpy  # first: the next line needs its libraries

    # isort: split
    # `executorch.runtime` is this and, for the class of a warning, the whole exporter: five seconds more.
    from executorch.extension.pybindings import _C

    program = _C._load_program_from_buffer(data)
    names = [program.get_method_name(i) for i in range(program.num_methods())] if name is None else [name]
    method = [program.load_method(each) for each in names][-1]

    # A method reads memory that its program owns, and the program reads the bytes: they live as long as this function.
    def run(*arrays: NDArray[np.float32], _alive: object = (program, data)) -> list[NDArray[np.float32]]:
        return [output.numpy().copy() for output in method([from_numpy(array) for array in arrays])]

    return run


def _onnx(file: str, data: bytes, limit_s: float | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # One row of a small tower: threads would cost more than they compute, and spin while they wait.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, and is ours to word
    # Constants may lie in files beside the program. It has no files: else it could read those of the device, from the
    # working directory on, and what it computes of them would leave as an embedding.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes share no base of their own
        raise RuntimeError(_first_line(error)) from None
    names = [tensor.name for tensor in session.get_inputs()]

    def run(*arrays: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        asked = onnxruntime.RunOptions()
        try:
            with nullcontext() if limit_s is None else _ended(asked, limit_s):
                return list(session.run(None, dict(zip(names, arrays, strict=True)), asked))
        except Exception as error:
            if asked.terminate:
                raise BundleError(f"program {file!r} takes more than {limit_s:g} s for one row") from None
            raise RuntimeError(_first_line(error)) from None

    return run


@contextmanager
def _ended(asked: Any, limit_s: float) -> Iterator[None]:
    """Within, a run with these options ends with an error once so many seconds have passed."""
    timer = threading.Timer(limit_s, setattr, (asked, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
