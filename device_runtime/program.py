"""A verified bundle's programs, loaded in ExecuTorch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.bundle import MAX_BYTES, Bundle, read_bundle, trusted_key
from hybrid.errors import BundleError, ConfigError
from hybrid.features import Features


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
    return read_bundle(data, trusted)


class DeviceProgram:
    """A program of a bundle: raw columns -> inputs -> what it computes, one row at a time as on a device.

    Args:
        bundle: verified.
        name: of the program.

    Raises:
        BundleError: the program is absent, or ExecuTorch does not load it.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        self._features: Features = bundle.manifest.features
        # The program owns the bytes that its method reads, so it is kept as long as the method.
        self._program, self._method = _load(bundle, name)

    def inputs(self, columns: Mapping[str, Sequence[Any]]) -> NDArray[np.float32]:
        """Raw device features by name, each (n,) -> (n, features) inputs.

        Raises:
            BadRequest: a column is absent, or holds values of the wrong type.
        """
        return self._features.inputs(columns)

    def _run(self, *arrays: NDArray[np.float32]) -> NDArray[np.float32]:
        # ExecuTorch's Python wheel takes torch's tensors only, and has imported torch to do so.
        from torch import from_numpy

        output: NDArray[np.float32] = self._method.execute([from_numpy(array) for array in arrays])[0].numpy().copy()
        return output


class EmbedProgram(DeviceProgram):
    """The device tower. See `DeviceProgram`."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "embed.pte")
        self._size = bundle.manifest.device_embedding

    def embed(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(1, features) inputs -> (1, device_embedding), before any release.

        Raises:
            BundleError: the program gives another shape than its manifest says, or no finite numbers.
        """
        embedding = self._run(inputs)
        if embedding.shape != (1, self._size) or not np.isfinite(embedding).all():
            raise BundleError(f"program 'embed.pte' must return (1, {self._size}) finite numbers")
        return embedding


class PredictProgram(DeviceProgram):
    """The merge on the device: device tower, then head over the server's embedding. See `DeviceProgram`."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "predict.pte")
        self._size = bundle.manifest.server_embedding

    def predict(self, inputs: NDArray[np.float32], server: NDArray[np.float32]) -> float:
        """(1, features) inputs, (1, server_embedding) finite -> a probability; NaN where the head overflows.

        Raises:
            BundleError: the program gives no one number, or none in [0, 1].
        """
        assert server.shape == (1, self._size)
        try:
            prediction = self._run(inputs, server)
        except RuntimeError as error:
            raise BundleError(f"program 'predict.pte' does not take (1, {self._size}) numbers of the server") from error
        if prediction.shape != (1,) or not (np.isnan(prediction[0]) or 0 <= prediction[0] <= 1):
            raise BundleError("program 'predict.pte' must return one probability")
        return float(prediction[0])


def program_of(bundle: Bundle) -> EmbedProgram | PredictProgram:
    """The program that an inference runs: the tower alone where the server merges, else the merge."""
    return EmbedProgram(bundle) if bundle.manifest.merge == "server" else PredictProgram(bundle)


def _load(bundle: Bundle, name: str) -> tuple[Any, Any]:
    """A program and its method."""
    if name not in bundle.programs:
        raise BundleError(f"the bundle must hold a program {name!r}, got {sorted(bundle.programs)}")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the chatter of ExecuTorch's imports
    try:
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(bundle.programs[name])
        return program, program.load_method("forward")
    except (RuntimeError, KeyError) as error:
        raise BundleError(f"program {name!r} does not load in ExecuTorch: {error!r}") from None
    finally:
        logging.disable(disabled)
