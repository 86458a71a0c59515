"""Shared vectors: raw device features -> inputs -> embedding and prediction, as torch computes them.

Every runtime of a bundle is held to them at `conformance.TOLERANCE`: ExecuTorch and ONNX Runtime in
`hybrid/export/tests/test_vectors.py`, a browser by the file that `Vectors.to_json` gives:

    {"format": 1,
     "features": {...},                 as in the manifest
     "raw": {NAME: [...]},              (n,) each: text, a number, or null where missing
     "inputs": [[...], ...],            (n, features) float32
     "server": [[...], ...],            (n, server_embedding) float32
     "embedding": [[...], ...],         (n, device_embedding) float32
     "prediction": [...]}               (n,) float32

JSON has no word for some numbers. Among `raw` numbers and in `inputs` they are the texts "NaN", "Infinity" and
"-Infinity", which JavaScript's Number() reads; a feature that is a number has no other texts. Numbers are written with
all their digits: float32 values are read back exactly by way of float64 (Math.fround). Text is any Unicode but lone
surrogates, in no normal form.

    vectors(Network.build(load_model(file)), rows=1000).to_json()
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid.export.programs import device_parts
from hybrid.features import Bucketize, Categorical, Features, Transform
from hybrid.network import Network

# Missing and unseen; composed, decomposed and compatibility forms of one text; scripts, signs, controls; long.
TEXTS: tuple[str | None, ...] = (
    None,
    "",
    " ",
    "unseen",
    "\u00e9t\u00e9",
    "e\u0301te\u0301",
    "\u212bngstr\u00f6m",
    "\ufb01n",
    "\u0130stanbul",
    "stra\u00dfe",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u3053\u3093\u306b\u3061\u306f",
    "\ud55c\uae00",
    "\u1112\u1161\u11ab",
    "\U0001f469\u200d\U0001f680",
    "a\u0000b",
    "\r\n\t",
    "\U0010fffd",
    "x" * 4096,
)
# Missing, infinite (past float32 too), the ends of float32 and what lies below, both zeros.
NUMBERS: tuple[float | None, ...] = (
    None,
    math.nan,
    math.inf,
    -math.inf,
    1e39,
    -1e300,
    3.4028234663852886e38,
    -3.4028234663852886e38,
    1.1754943508222875e-38,
    1e-45,
    0.0,
    -0.0,
    -1.0,
    1.0,
    16777217.0,
)


@dataclass(frozen=True)
class Vectors:
    """Rows that every runtime must agree on: see the module for each one's form.

    Attributes:
        features: the device features.
        raw: by feature, (n,) str or float, None where missing.
        inputs: (n, features).
        server: (n, server_embedding), finite.
        embedding: (n, device_embedding), torch's.
        prediction: (n,), torch's.
    """

    features: Features
    raw: dict[str, list[Any]]
    inputs: NDArray[np.float32]
    server: NDArray[np.float32]
    embedding: NDArray[np.float32]
    prediction: NDArray[np.float32]

    def to_json(self) -> str:
        """The file that other languages' tests read."""
        return json.dumps(
            {
                "format": 1,
                "features": self.features.model_dump(mode="json"),
                "raw": {name: [_plain(value) for value in values] for name, values in self.raw.items()},
                "inputs": [[_plain(value) for value in row] for row in self.inputs.tolist()],
                "server": self.server.tolist(),
                "embedding": self.embedding.tolist(),
                "prediction": self.prediction.tolist(),
            },
            allow_nan=False,
        )


def vectors(network: Network, *, rows: int = 1000, seed: int = 0) -> Vectors:
    """Random rows, in which each edge value of each feature stands at least once.

    Args:
        network: with the weights of the bundle under test.
        rows: > 0; more come out where the edge values alone are more.
        seed: of the random ones.
    """
    random = np.random.default_rng(seed)
    features = network.model.device_features
    edges = {name: _edges(transform) for name, transform in features.transforms.items()}
    n = max(rows, *(len(values) for values in edges.values()))
    raw = {
        name: _shuffled([*edges[name], *_random(transform, n - len(edges[name]), random)], random)
        for name, transform in features.transforms.items()
    }
    inputs = features.inputs(raw)
    scale = random.choice([0.0, 1.0, 1.0, 1.0, 100.0], size=(n, 1))
    server = (random.normal(size=(n, network.server_embedding)) * scale).astype(np.float32)
    given = {"inputs": torch.from_numpy(inputs), "server": torch.from_numpy(server)}
    with torch.no_grad():
        embedding, prediction = (
            part.program(*(given[name] for name in part.probes)).numpy() for part in device_parts(network).values()
        )
    return Vectors(features, raw, inputs, server, embedding, prediction)


def _edges(transform: Transform) -> list[Any]:
    """Raw values of one feature that are easily got wrong."""
    if isinstance(transform, Categorical):
        words = transform.vocabulary
        return [*TEXTS, *words, *(unicodedata.normalize("NFD", word) for word in words), *(f"{w} " for w in words)]
    if transform.text:
        return list(TEXTS)
    edges = transform.edges if isinstance(transform, Bucketize) else ()
    held = [np.float32(edge) for edge in edges]
    beside = [float(np.nextafter(edge, to)) for edge in held for to in (np.float32(-np.inf), np.float32(np.inf))]
    return [*NUMBERS, *map(float, held), *beside]


def _random(transform: Transform, n: int, random: np.random.Generator) -> list[Any]:
    """(n,) ordinary raw values of one feature."""
    if not transform.text:
        scale = 10.0 ** random.integers(-3, 6, size=n)
        numbers: list[Any] = (random.normal(size=n) * scale).tolist()
        return numbers
    known = transform.vocabulary if isinstance(transform, Categorical) else ()
    return [_text(known, random) for _ in range(n)]


def _text(known: Sequence[str], random: np.random.Generator) -> str:
    if known and random.random() < 0.8:
        return str(random.choice(np.array(known, dtype=object)))
    # Letters of one and of several UTF-8 bytes, combining marks among them; no surrogates.
    blocks = ((0x20, 0x7F), (0xA0, 0x370), (0x4E00, 0x4F00), (0x1F300, 0x1F600))
    places = (blocks[i] for i in random.integers(len(blocks), size=random.integers(1, 12)))
    return "".join(chr(random.integers(*place)) for place in places)


def _shuffled(values: list[Any], random: np.random.Generator) -> list[Any]:
    return [values[i] for i in random.permutation(len(values))]


def _plain(value: Any) -> Any:
    """A value as JSON has it; see the module."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
