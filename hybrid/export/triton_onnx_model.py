"""Triton's Python backend running one ONNX model: copied beside each `model.onnx` as `model.py`.

It runs inside Triton, in an environment that has NumPy 1.26 and ONNX Runtime
and nothing of this project. Tensor names come from the ONNX file.
"""

import contextlib
import os
import select
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """The class that the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the version's file, once."""
        end_with_parent()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        (self.output,) = [tensor.name for tensor in self.session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Runs what the dynamic batcher gathered as one batch and hands each request its rows."""
        columns = {
            name: [triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self.inputs
        }
        output = self.session.run([self.output], {name: np.concatenate(parts) for name, parts in columns.items()})[0]
        ends = np.cumsum([len(part) for part in columns[self.inputs[0]]])[:-1]
        return [triton.InferenceResponse([triton.Tensor(self.output, rows)]) for rows in np.split(output, ends)]


def end_with_parent() -> None:
    """Ends this process when the server that started it has ended, however it did.

    The backend watches for that itself, but waits for a lock in shared memory to
    do so: a server that is killed while it holds the lock leaves it waiting for ever.
    """
    parent = os.getppid()
    with contextlib.suppress(AttributeError):  # before Linux 5.3 the backend's own watch is all there is
        threading.Thread(target=_end_after, args=(os.pidfd_open(parent), parent), daemon=True).start()


def _end_after(descriptor: int, parent: int) -> None:
    if os.getppid() == parent:  # else it ended before the descriptor was opened, which may be of another process
        select.select([descriptor], [], [])
    os._exit(1)
