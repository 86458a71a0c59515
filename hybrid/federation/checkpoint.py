"""Where a training stands after a round: one file, whole or not there, from which it goes on to the same bits."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid.errors import ConfigError, NotFound
from hybrid.files import write_whole

FILE = "checkpoint.npz"
STEP, STATE = "step", "state"  # names in the file, beside those of weights, "part.name"
SHARE = 0.02  # of a training's time that its checkpoints may take
_DIGEST = hashlib.sha256().digest_size


class Stateful(Protocol):
    """A part of a training that remembers something from round to round."""

    def state(self) -> Any:
        """Numbers, text, arrays and tensors, in dicts, lists and tuples: all that the next round needs of it."""
        ...

    def restore(self, state: Any) -> None:
        """Goes on from what `state` returned, to the last bit."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Where a training stands.

    Attributes:
        step: rounds, or epochs, that are done.
        weights: of the network, "part.name" -> array: what the model is.
        state: what else the next round needs, as `Stateful.state` gives it; None where none will come.
    """

    step: int
    weights: Mapping[str, NDArray[Any]] = field(repr=False)
    state: Any = field(default=None, repr=False)

    def write(self, folder: Path) -> None:
        """Puts it in the place of the one before, at once, and on the disk before this returns.

        Raises:
            OSError: the disk does not take it; the one before is still there.
        """
        arrays: dict[str, NDArray[Any]] = {STEP: np.int64(self.step), **self.weights}  # type: ignore[dict-item]
        arrays[STATE] = np.frombuffer(json.dumps(_packed(self.state, arrays)).encode(), dtype=np.uint8)
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        content.write(hashlib.sha256(content.getbuffer()).digest())  # behind its end, where readers of npz do not look
        write_whole(folder / FILE, content.getbuffer())

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Reads what `write` wrote, all of it checked.

        Raises:
            NotFound: there is none.
            ConfigError: it is damaged, or nothing that `write` wrote.
        """
        try:
            content = (folder / FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"run {folder.name!r} has no checkpoint") from None
        archive, recorded = content[:-_DIGEST], content[-_DIGEST:]
        if hashlib.sha256(archive).digest() != recorded:
            raise ConfigError(
                f"the checkpoint of run {folder.name!r} is damaged, or of another release: start another run"
            )
        with np.load(io.BytesIO(archive), allow_pickle=False) as written:
            arrays = dict(written)
        state = _unpacked(json.loads(arrays.pop(STATE).tobytes()), arrays)
        weights = {name: array for name, array in arrays.items() if "." in name}
        return cls(int(arrays[STEP]), weights, state)


class Checkpoints:
    """Writes a training's checkpoints: as often as they take a small share of its time.

    Which rounds have one changes nothing but how many are done again after a kill.

    Args:
        folder: of the run.
        weights: gives what the model is now.
        parts: name -> what else is in it.
        share: of the time that they may take, in (0, 1].
        clock: seconds, that only grow.
    """

    def __init__(
        self,
        folder: Path,
        weights: Callable[[], Mapping[str, NDArray[Any]]],
        parts: Mapping[str, Stateful],
        *,
        share: float = SHARE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder, self._weights, self._parts = folder, weights, parts
        self._share, self._clock, self._due = share, clock, clock()

    def after(self, step: int, *, now: bool = False) -> None:
        """Writes one where it is time to, or must be."""
        began = self._clock()
        if began < self._due and not now:
            return
        state = {name: part.state() for name, part in self._parts.items()}
        Checkpoint(step, self._weights(), state).write(self._folder)
        ended = self._clock()
        self._due = ended + (ended - began) / self._share

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts every part where it was."""
        for name, part in self._parts.items():
            part.restore(checkpoint.state[name])


def digest(arrays: Iterable[NDArray[Any]]) -> str:
    """SHA-256 of what arrays hold, their shapes and types included, in hex."""
    found = hashlib.sha256()
    for array in arrays:
        content = np.ascontiguousarray(array)
        found.update(f"{content.dtype.str} {np.shape(array)}\n".encode())
        found.update(content.data.cast("B") if content.size else b"")
    return found.hexdigest()


def machine() -> dict[str, str]:
    """What decides the last bit of a sum: a round computed again where these are the same is the same number."""
    return {
        "hybrid": version("hybrid-towers"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "libc": " ".join(platform.libc_ver()),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(models)) or f"{platform.machine()} {platform.processor()}"


def _packed(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """As JSON values, which hold a float64 to the last bit; arrays go beside them under names of their own."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        name = f"{STATE}{len(arrays)}"
        arrays[name] = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        kind = next(k for k, t in _ARRAYS.items() if isinstance(value, t))
        return {kind: name}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(item, arrays)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_packed(item, arrays) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds numbers, text, arrays and tensors, not {type(value).__name__}")


_ARRAYS = {"array": np.ndarray, "scalar": np.generic, "tensor": torch.Tensor}


def _unpacked(value: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _unpacked(item, arrays) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpacked(item, arrays) for item in content]
        return items if kind == "list" else tuple(items)
    array = arrays[content]
    return torch.from_numpy(array) if kind == "tensor" else array[()] if kind == "scalar" else array
