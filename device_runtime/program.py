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


class EmbedProgram:
    """The device tower: raw columns -> inputs -> embeddings, one row at a time as on a device.

    Args:
        bundle: verified.

    Raises:
        BundleError: the program is absent, or ExecuTorch does not load it.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._features: Features = bundle.manifest.features
        self._size = bundle.manifest.device_embedding
        # The program owns the bytes that its method reads, so it is kept as long as the method.
        self._program, self._method = _load(bundle, "embed")

    def inputs(self, columns: Mapping[str, Sequence[Any]]) -> NDArray[np.float32]:
        """Raw device features by name, each (n,) -> (n, features) inputs.

        Raises:
            BadRequest: a column is absent, or holds values of the wrong type.
        """
        return self._features.inputs(columns)

    def embed(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(1, features) inputs -> (1, device_embedding), before any release.

        Raises:
            BundleError: the program gives another shape than its manifest says, or no finite numbers.
        """
        # ExecuTorch's Python wheel takes torch's tensors only, and has imported torch to do so.
        from torch import from_numpy

        embedding: NDArray[np.float32] = self._method.execute([from_numpy(inputs)])[0].numpy().copy()
        if embedding.shape != (1, self._size) or not np.isfinite(embedding).all():
            raise BundleError(f"program 'embed' must return (1, {self._size}) finite numbers")
        return embedding


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
