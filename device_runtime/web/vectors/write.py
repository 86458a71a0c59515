"""Writes what the browser device must agree on with Python: `python device_runtime/web/vectors/write.py`.

The Python tests hold the files to what Python computes now, the TypeScript tests what TypeScript computes to the files.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from device_runtime.client import request_body
from device_runtime.eligibility import Readings, decide
from hybrid.bundle import Alone, Keeping, Manifest, Parameter, Program, TrainProgram
from hybrid.deployment import Canary
from hybrid.errors import BadRequest
from hybrid.features import Bucketize, Categorical, Features, Hash, Log1p, Numeric, Transform, murmur3_32
from hybrid.plan import Halt, Local, Policy, TrainPlan, sign
from hybrid.rollout import Rollout

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 0x9747B28C, 0xFFFFFFFF)
TEXTS = (
    "",
    "a",
    "ab",
    "abc",
    "abcd",
    "The quick brown fox jumps over the lazy dog",
    "Café",
    "Cafe\u0301",  # the same in two code points
    "\u212b",  # ångström sign, which NFC makes a letter
    "한국어",
    "\u1112\u1161\u11ab국어",  # the first syllable in its parts
    "a\u0323\u0307",
    "a\u0307\u0323",  # the same marks in the other order
    "\ufb01",  # a ligature, which NFC keeps
    "İstanbul",
    "日本語テキスト",
    "👩\u200d👩\u200d👧\u200d👦",
    "\U0001f600",
    "\x00",
    " padded ",
)
NUMBERS = (0, -0.0, 1, -1, 0.1, 60, 1e-45, 1e-46, 16777217, 3.4028235e38, 3.5e38, -3.5e38, 1e300, True, False, None)
SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
LONE = ("\ud800", "a\udfffb", "\udc00\ud800")
TRANSFORMS: tuple[Transform, ...] = (
    Numeric(mean=60, std=20),
    Log1p(mean=8, std=2, clip=3),
    Bucketize(edges=(1.0, 24.0)),
    Categorical(vocabulary=("abc", "Cafe\u0301", "\u212b", "", "한국어", "ạ\u0307")),
    Hash(buckets=2),
    Hash(buckets=1009, seed=7),
    Hash(buckets=1 << 20, seed=0xFFFFFFFF),
)


def vectors() -> dict[str, Any]:
    """All of them, as JSON values."""
    return {
        "murmur3": [
            {"utf8": text.encode().hex(), "seed": seed, "hash": murmur3_32(text.encode(), seed)}
            for text in TEXTS
            for seed in SEEDS
        ],
        "inputs": [_inputs(transform) for transform in TRANSFORMS],
        "refused": [_refused(transform) for transform in TRANSFORMS],
        "manifest": json.loads(manifest().model_dump_json()),
        "eligibility": list(_eligibility()),
        "requests": [_request(entity) for entity in ("7", 'a "b" \\ \n é 日', "")],
        "rollout": _rollout(),
    }


def _rollout() -> dict[str, Any]:
    """What a gateway says, and which of it counts: not what another key signed, no other model's halt, no plan."""
    key, other = (Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2))
    plan = TrainPlan(
        id="0" * 32,
        model="meals",
        version=7,
        definition_hash="0" * 64,
        expires_ms=1,
        local=Local(steps=1, lr=0.1),
        clip=1,
        parameters=1,
    )
    signed = (
        sign(Halt(model="meals", versions=(5, 6), reason="recall fell – a lot"), key),
        sign(Halt(model="meals", versions=(8,), reason="it is another's word"), other),
        sign(Halt(model="parking", versions=(9,), reason="it is another model"), key),
        sign(plan, key, np.zeros(1, np.float32)),
    )
    halted = tuple(base64.b64encode(message).decode() for message in signed)
    told = Rollout(
        model="meals", default=7, canary=Canary(version=9, share=0.05), halted=(*halted, "no base64", "AAAA")
    )
    return {
        "trust": key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
        "told": told.model_dump_json(),
        "halts": [[version, reason] for version, reason in told.halts(key.public_key()).items()],
    }


def _eligibility() -> Iterator[dict[str, Any]]:
    """Each reading at its edges under a policy that asks for all and one that asks for little; then the history."""
    now, day = 1_800_000_000_000, 86_400_000
    good = Readings(
        consent=True, charging=True, battery=1.0, idle=True, metered=False, thermal="nominal", free_bytes=1 << 40
    )
    little = Policy(charging=False, battery=0, idle=False, unmetered=False, thermal="serious", free_mb=0)
    readings = [
        good,
        Readings(),
        Readings(consent=True),
        *(replace(good, charging=value) for value in (None, False)),
        *(replace(good, battery=value) for value in (None, 0.0, 0.29, 0.3, 1.5)),
        *(replace(good, idle=value) for value in (None, False)),
        *(replace(good, metered=value) for value in (None, True)),
        *(replace(good, thermal=value) for value in (None, "fair", "serious", "critical")),
        *(replace(good, free_bytes=value) for value in (None, 0, (64 << 20) - 1, 64 << 20)),
    ]
    often = Policy(separation_s=3600, participations=3)
    histories = [[now - day], [now - day + 1], [now], [now + 1], [now - day - 5, now - 3600_000, now - 7200_000]]
    cases: list[tuple[Policy, Readings, list[int]]]
    cases = [(policy, reading, []) for policy in (Policy(), little) for reading in readings]
    cases += [(policy, good, history) for policy in (Policy(), often) for history in histories]
    cases += [(often, good, [now - 3600_000, now - 3600_001, now - 3600_002])]
    for policy, reading, history in cases:
        yield {
            "policy": policy.model_dump(mode="json"),
            "readings": asdict(reading),
            "history": history,
            "now_ms": now,
            "reasons": [str(reason) for reason in decide(policy, reading, history, now).reasons],
        }


def manifest() -> Manifest:
    """One with every field, of a model that merges on the device."""
    return Manifest(
        model="meals",
        version=7,
        definition_hash="0" * 64,
        features=Features.of({f"feature {place}": transform for place, transform in enumerate(TRANSFORMS)}),
        request={"time": "text", "distance": "number"},
        server_embedding=2,
        device_embedding=4,
        merge="device",
        release=None,
        programs={"predict.onnx": Program(sha256="0" * 64, bytes=9)},
        alone=Alone(unavailable="device-only", stale_features="constant", missing_server=(0.5, -1.25), constant=0.25),
        train=TrainProgram(rows=8, server=2, missing=True, parameters=(Parameter(name="w", shape=(2, 3)),)),
        keeping=Keeping(label_window_s=60.0, label_absent=0),
        created_ms=1_700_000_000_000,
        expires_ms=1_800_000_000_000,
    )


def _inputs(transform: Transform) -> dict[str, Any]:
    raws = [*TEXTS, None] if transform.text else [*NUMBERS, *SPECIAL.values()]
    written = [*TEXTS, None] if transform.text else [*NUMBERS, *({"special": name} for name in SPECIAL)]
    inputs = [float(transform.inputs(np.array([raw], dtype=object))[0]) for raw in raws]
    return {
        "transform": transform.model_dump(mode="json"),
        "raw": written,
        "float32": [_float32(value) for value in inputs],
    }


def _refused(transform: Transform) -> dict[str, Any]:
    raws: list[Any] = [1, True, *LONE] if transform.text else ["1", ""]
    for raw in raws:
        try:
            transform.inputs(np.array([raw], dtype=object))
        except BadRequest:
            continue
        raise AssertionError(f"{transform!r} takes {raw!r}")
    return {"transform": transform.model_dump(mode="json"), "raw": raws}


def _request(entity: str) -> dict[str, Any]:
    request = {"time": "7AM", "distance": 2.5} if entity else {"time": None, "distance": None}
    released = None if entity else np.array([[0.1, -2.0, 1e-40, 3.4e38]], np.float32)
    outputs = ("prediction", "server_embedding") if entity else ()
    body, length = request_body(entity, request, {"time": "text", "distance": "number"}, released, outputs)
    return {
        "entity": entity,
        "request": request,
        "released": None if released is None else [float(value) for value in released[0]],
        "outputs": list(outputs),
        "json": json.loads(body[:length]),
        "raw": body[length:].hex(),
    }


def _float32(value: float) -> str | None:
    """Little-endian hex; None for NaN, of which there are many."""
    return None if math.isnan(value) else np.float32(value).tobytes().hex()


if __name__ == "__main__":
    (FOLDER / "device.json").write_text(json.dumps(vectors(), indent=1) + "\n")
