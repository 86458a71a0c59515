"""How a device's update travels: as float32, or in 8 bits a weight.

The body of an upload is 8 bytes of header, which encoding in ASCII and how many weights as
little-endian uint32, and then

    "f32 "  the weights, little-endian float32
    "i8  "  a float32 scale of each block of 256 weights, the last block perhaps shorter; then an int8 of each weight

A weight of the second form is its int8 times its block's scale. Rounding is by chance, so that each weight is right on
average and sums over a cohort are too. Who receives an update clips it again: rounding can lengthen it, and a
device can lie.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import UpdateError

Upload = Literal["float32", "int8"]
BLOCK = 256
MOST = 127  # of an int8, either way
_HEADER = struct.Struct("<4sI")
_NAMES: dict[Upload, bytes] = {"float32": b"f32 ", "int8": b"i8  "}


def length(parameters: int, upload: Upload) -> int:
    """Bytes of an update's body.

    >>> length(6000, "float32"), length(6000, "int8")
    (24008, 6104)
    """
    body = 4 * parameters if upload == "float32" else 4 * _blocks(parameters) + parameters
    return _HEADER.size + body


def head(parameters: int, upload: Upload) -> bytes:
    """What an update's body begins with.

    >>> head(513, "int8").hex(" ")
    '69 38 20 20 01 02 00 00'
    """
    return _HEADER.pack(_NAMES[upload], parameters)


def encode(update: NDArray[np.float32], upload: Upload, rng: np.random.Generator) -> bytes:
    """An update as it travels.

    Args:
        update: (p,) finite.
        upload: as the plan says.
        rng: rounds; its state must be nothing that others know.
    """
    assert update.ndim == 1
    assert np.isfinite(update).all()
    header = head(len(update), upload)
    if upload == "float32":
        return header + np.ascontiguousarray(update, "<f4").tobytes()
    values, scales = quantise(update[None], rng)
    return header + scales.astype("<f4").tobytes() + values.tobytes()


def decode(data: bytes, parameters: int) -> NDArray[np.float32]:
    """An update that came, (parameters,) finite; whoever sums it clips it again.

    Args:
        data: the body, from anybody.
        parameters: how many weights the plan has.

    Raises:
        UpdateError: it is of an unknown encoding, of another length, or holds numbers that are not finite.
    """
    if len(data) < _HEADER.size:
        raise UpdateError(f"an update must have at least {_HEADER.size} bytes, got {len(data)}")
    name, count = _HEADER.unpack_from(data)
    upload = next((upload for upload, known in _NAMES.items() if known == name), None)
    if upload is None:
        raise UpdateError("an update must be encoded as float32 or int8, got another encoding")
    if count != parameters or len(data) != length(parameters, upload):
        raise UpdateError(
            f"an update of {parameters} weights as {upload} must have {length(parameters, upload)} bytes and say so, "
            f"got {len(data)} bytes for {count} weights"
        )
    if upload == "float32":
        update = np.frombuffer(data, "<f4", offset=_HEADER.size).astype(np.float32)
    else:
        scales = np.frombuffer(data, "<f4", count=_blocks(parameters), offset=_HEADER.size).astype(np.float32)
        values = np.frombuffer(data, np.int8, offset=_HEADER.size + scales.nbytes)
        with np.errstate(over="ignore", invalid="ignore"):
            update = dequantise(values[None], scales[None])[0]
        if not (scales >= 0).all():
            raise UpdateError("an update's scales must be finite and >= 0")
    if not np.isfinite(update).all():
        raise UpdateError("an update must hold finite numbers only")
    return update


def quantise(updates: NDArray[Any], rng: np.random.Generator) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rounds each weight to a multiple of its block's scale, up or down by chance: right on average.

    Args:
        updates: (k, p) finite, one row a device.
        rng: draws a float32 a weight.

    Returns:
        (k, p) values in [-127, 127], and (k, blocks) scales >= 0.

    Source:
        Alistarh et al., NeurIPS 2017 (QSGD), section 3.1, with the largest magnitude in place of the norm.
        https://arxiv.org/abs/1610.02132
    """
    rows, size = updates.shape
    blocks = _in_blocks(np.asarray(updates, np.float32))
    largest = np.abs(blocks).max(axis=2, initial=0.0)
    scales = (largest / np.float32(MOST)).astype(np.float32)
    # Rounded down, a scale would leave the largest weight above 127 of them.
    scales = np.where(scales * np.float64(MOST) < largest, np.nextafter(scales, np.float32(np.inf)), scales)
    steps = blocks / np.where(scales > 0, scales, np.float32(1))[:, :, None]
    whole = np.floor(steps)
    whole += rng.random(steps.shape, dtype=np.float32) < steps - whole
    return whole.astype(np.int8).reshape(rows, -1)[:, :size], scales


def dequantise(values: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """(k, p) values and (k, blocks) scales -> (k, p) weights."""
    rows, size = values.shape
    weights: NDArray[np.float32] = _in_blocks(values.astype(np.float32)) * scales[:, :, None]
    return weights.reshape(rows, -1)[:, :size]


def _blocks(parameters: int) -> int:
    return -(-parameters // BLOCK)


def _in_blocks(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(k, p) -> (k, blocks, BLOCK), the last block filled up with zeros."""
    count, size = rows.shape
    blocks = _blocks(size)
    padded = np.pad(rows, ((0, 0), (0, blocks * BLOCK - size))) if size % BLOCK else rows
    return padded.reshape(count, blocks, BLOCK)
