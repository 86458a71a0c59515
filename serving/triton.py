"""Triton over gRPC: one long-lived client, a time limit on every call, a budget for retries."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Protocol, Self

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from hybrid.errors import Unavailable
from serving.connection import Token, TritonAddress

log = logging.getLogger(__name__)
Float32 = NDArray[np.float32]
FIRST_PAUSE_S = 0.02
_MOST_BYTES = 2**31 - 1  # of a message, as tritonclient says without arguments of ours
_CHANNEL = [
    # Calls go in turn to all addresses that the name has, as the pods of a headless Service, and round one that ends.
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.max_send_message_length", _MOST_BYTES),
    ("grpc.max_receive_message_length", _MOST_BYTES),
    # Pings only while a call waits: Triton closes connections that ping when idle.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]


class Models(Protocol):
    """Networks by name and version."""

    def infer(
        self, model: str, version: int, inputs: Mapping[str, Float32], output: str, until_s: float = math.inf
    ) -> Float32:
        """Runs a model on (n, ...) inputs, all of the same n >= 1.

        Args:
            model: its name.
            version: its version.
            inputs: by name.
            output: its name.
            until_s: `time.monotonic` at which nobody waits for the answer any more.

        Raises:
            Unavailable: it did not answer in time, or refused.
        """


class Triton:
    """A Triton server, or several of one name that have the same models.

    Kafka's topics are at least once, so a repeated call does no harm.

    Args:
        address: its gRPC endpoint, and what is shown to it.
        timeout_s: of one call, all its retries included, at most.
    """

    def __init__(self, address: TritonAddress, timeout_s: float = 2.0) -> None:
        self._timeout_s = timeout_s
        self._token = None if address.token_file is None else Token(address.token_file)
        self._lacking: str | None = None
        self._client = triton.InferenceServerClient(channel_args=_CHANNEL, **address.settings())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def ready(self) -> bool:
        """Whether the server and all its models answer; why not is logged once for each reason."""
        try:
            ready = self._client.is_server_ready(headers=self._headers(), client_timeout=self._timeout_s)
            lacking = None if ready else "not all models are loaded"
        except triton.InferenceServerException as error:
            lacking = str(error.status())
        if lacking is not None and lacking != self._lacking:
            log.warning("Triton is not ready: %s", lacking)
        self._lacking = lacking
        return lacking is None

    def infer(
        self, model: str, version: int, inputs: Mapping[str, Float32], output: str, until_s: float = math.inf
    ) -> Float32:
        """See `Models`. Only UNAVAILABLE is tried again: anything else would fail again or has run already."""
        tensors = [_tensor(name, values) for name, values in inputs.items()]
        wanted = [triton.InferRequestedOutput(output)]
        deadline, pause_s = min(time.monotonic() + self._timeout_s, until_s), FIRST_PAUSE_S
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise Unavailable(f"Triton model {model!r} version {version} was not asked: no time is left")
            try:
                answer = self._client.infer(
                    model, tensors, str(version), outputs=wanted, headers=self._headers(), client_timeout=left_s
                )
                return answer.as_numpy(output)  # type: ignore[no-any-return]
            except triton.InferenceServerException as error:
                if error.status() != "StatusCode.UNAVAILABLE" or time.monotonic() + pause_s >= deadline:
                    raise Unavailable(f"Triton model {model!r} version {version} failed: {error.status()}") from None
            time.sleep(pause_s)
            pause_s *= 2

    def _headers(self) -> dict[str, str] | None:
        return None if self._token is None else self._token.headers()


def _tensor(name: str, values: Float32) -> triton.InferInput:
    tensor = triton.InferInput(name, list(values.shape), "FP32")
    tensor.set_data_from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return tensor
