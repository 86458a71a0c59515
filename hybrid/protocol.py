"""What gateway and devices call things in the Open Inference Protocol v2.

Source: https://github.com/kserve/open-inference-protocol (inference_rest.md) and
Triton's extension_binary_data.md.
"""

from __future__ import annotations

import ipaddress
from typing import Any

HEADER_LENGTH = "Inference-Header-Content-Length"  # of the JSON, where raw tensors follow it

# Inputs; each request feature is one more, by its own name.
ENTITY = "entity"  # BYTES (n,), join keys as text
DEVICE_EMBEDDING = "device_embedding"  # FP32 (n, d), as released

PREDICTION = "prediction"  # a probability; of models that merge on the server
SERVER_EMBEDDING = "server_embedding"  # (n, a), of the server tower: what the server contributed
SERVER_SLOTS = "server_slots"  # (n, s + r), server and request features: the same, where devices train the tower
VERSION = "version"  # that predicted
FEATURE_AGE_MS = "feature_age_ms"  # of the server's features when merged
EXPIRES_MS = (
    "expires_ms"  # Unix time in UTC, after which a device must not use the server's embedding; -1: nothing ages
)
MERGED = "merged"  # where the embeddings met
TRANSPORT = "transport"  # how the request reached the models: "kafka" or "direct"
STATUS = "status"  # OK, or why one side is missing where a fallback answers
FALLBACK = "fallback"  # what answers in place of both sides as they are now: one of FALLBACKS
OUTPUTS = {  # (n,) each but the two with a width; `serving.oip.outputs_of` says which of them a model gives
    PREDICTION: "FP32",
    SERVER_EMBEDDING: "FP32",
    SERVER_SLOTS: "FP32",
    VERSION: "INT64",
    FEATURE_AGE_MS: "INT64",
    EXPIRES_MS: "INT64",
    MERGED: "BYTES",
    TRANSPORT: "BYTES",
    STATUS: "BYTES",
    FALLBACK: "BYTES",
}

OK = "ok"
NONE, DEVICE_ONLY, SERVER_ONLY, CACHED, CONSTANT = "none", "device-only", "server-only", "cached", "constant"
FALLBACKS = frozenset({NONE, DEVICE_ONLY, SERVER_ONLY, CACHED, CONSTANT})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost counts as reached by all."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def answered(status: Any, fallback: Any) -> Any:
    """Whether a row has a prediction, or what a device predicts from: of one row, or of (n,) arrays of them."""
    return (status == OK) | (fallback != NONE)
