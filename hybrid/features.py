"""Features and the transforms that turn them into what a tower reads.

A value passes four forms, the same on a device, on the server and in training:

    raw      as people and tables hold it: text or a number, perhaps missing
    input    float32, one per feature: text replaced by its table index (NaN: missing number)
    slot     float32, one per feature: the numeric transform applied, buckets numbered
    encoded  float32, dense, what a tower takes: numbers, one-hot indices, missing flags

Strings cannot enter a device program, so raw -> input runs in the host
language; input -> slot -> encoded is compiled into the program
(`hybrid.network.Encoder` is its torch form, these classes its NumPy reference,
and a conformance test holds the two together). Feast serves packed slots.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from hybrid.errors import BadRequest, ConfigError

Float32 = NDArray[np.float32]
UNUSED = "\uffff"  # a place of a vocabulary that no text was found for begins with it: Unicode says it is no character


def _held_by_float32(value: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        held = np.float32(value)
    if not np.isfinite(held) or (held == 0) != (value == 0):
        raise ValueError(f"must be a number that float32 holds, the precision of every side, got {value!r}")
    return value


Constant = Annotated[FiniteFloat, AfterValidator(_held_by_float32)]


class Transform(BaseModel):
    """How one feature becomes columns of a tower's input.

    Attributes:
        text: whether the raw value is text (else a number).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    text: ClassVar[bool] = False

    @property
    def pending(self) -> bool:
        """Whether its constants are to be learned by a query: until they are, it can turn no value into anything."""
        return False

    @property
    def cardinality(self) -> int:
        """How many indices the slot can hold; 0 where it is a number."""
        return 0

    @property
    def width(self) -> int:
        """How many columns the feature takes once encoded."""
        return self.cardinality

    def inputs(self, raw: ArrayLike) -> Float32:
        """(n,) raw values -> (n,) inputs; a missing number is NaN.

        Raises:
            BadRequest: a value is of the wrong type for this transform.
            ConfigError: its vocabulary is not learned yet.
        """
        if self.text:
            return self._indices(as_text(raw))
        return _as_numbers(raw)

    def slots(self, inputs: Float32) -> Float32:
        """(n,) inputs -> (n,) slots."""
        return inputs

    def encode(self, slots: Float32) -> Float32:
        """(n,) slots -> (n, width) columns."""
        onehot: Float32 = (slots[:, None] == np.arange(self.cardinality, dtype=np.float32)).astype(np.float32)
        return onehot

    def _indices(self, text: NDArray[np.object_]) -> Float32:
        """(n,) NFC text, or None where missing -> (n,) indices, looked up once per distinct text."""
        table = {value: self._index(value) for value in set(text)}
        return np.fromiter((table[value] for value in text), dtype=np.float32, count=len(text))

    def _index(self, value: str | None) -> int:
        raise TypeError(f"{type(self).__name__} takes numbers")


class Numeric(Transform):
    """Number -> (x - mean) / std, kept within `clip` standard deviations.

    Missing and infinite values become the mean (0 once normalised), with a flag
    of their own.

    Args:
        mean, std: in the feature's own unit. Written by hand, or left out with `normalise`.
        clip: bound on the normalised value.
        normalise: "federated": mean and std are learned by a query that the ledger of a training pays for, and are
            part of the version. For device features. None: they are those above.
        low, high: with it, bounds of the raw value that are known before anybody is asked; what lies beyond counts as
            the bound. The closer they are, the less noise there is in what is learned.

    >>> temperature = Numeric(mean=60.0, std=20.0)
    >>> temperature.encode(temperature.slots(temperature.inputs([80, None]))).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    kind: Literal["numeric"] = "numeric"
    mean: Constant = 0.0
    std: Annotated[Constant, Field(gt=0)] = 1.0
    clip: Annotated[Constant, Field(gt=0)] = 10.0
    normalise: Literal["federated"] | None = None
    low: Constant | None = None
    high: Constant | None = None

    @model_validator(mode="after")
    def _learned_or_written(self) -> Self:
        bounds = (self.low, self.high)
        if self.normalise is None:
            if bounds != (None, None):
                raise ValueError(f"low and high must be left out without normalise='federated', got {bounds}")
            return self
        if self.model_fields_set & {"mean", "std"}:
            raise ValueError("mean and std must be left out with normalise='federated', which learns them")
        if self.low is None or self.high is None or not self.scaled(self.low) < self.scaled(self.high):
            raise ValueError(
                "low and high must be given with normalise='federated', low below high as this transform scales "
                f"float32: bounds of the raw value that are known before anybody is asked, got {bounds}"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_declared(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what does not apply: constants written by hand look as if nothing could be learned."""
        apart = {"normalise", "low", "high"} if self.normalise is None else {"mean", "std"}
        return {name: value for name, value in fields(self).items() if name not in apart}

    @property
    def pending(self) -> bool:
        """See `Transform.pending`."""
        return self.normalise is not None

    def learned(self, mean: float, std: float) -> Self:
        """With these constants, as if they had been written by hand. They are of the scaled value, see `scaled`."""
        return type(self)(mean=mean, std=std, clip=self.clip)

    def scaled(self, value: float) -> float:
        """The number that is normalised for one raw number."""
        return float(self.scale(np.array([value], np.float32))[0])

    @property
    def width(self) -> int:
        """The number, and whether it was missing."""
        return 2

    def slots(self, inputs: Float32) -> Float32:
        """(n,) numbers -> (n,) normalised; NaN where missing.

        Raises:
            ConfigError: mean and std are not learned yet.
        """
        check_learned({self.kind: self})
        finite = np.where(np.isfinite(inputs), inputs, np.float32(np.nan))
        with np.errstate(over="ignore"):  # past float32 it is clipped anyway
            normal = (self.scale(finite) - np.float32(self.mean)) / np.float32(self.std)
        bounded: Float32 = np.clip(normal, np.float32(-self.clip), np.float32(self.clip))
        return bounded

    def encode(self, slots: Float32) -> Float32:
        """(n,) slots -> (n, 2): the value or 0, 1 where it is missing."""
        missing = np.isnan(slots)
        return np.stack([np.where(missing, np.float32(0), slots), missing.astype(np.float32)], axis=1)

    def scale(self, values: Float32) -> Float32:
        """(n,) numbers -> (n,) what is normalised of them."""
        return values


class Log1p(Numeric):
    """Number -> log(1 + max(x, 0)), then normalised like `Numeric` (mean and std are of the logarithm)."""

    kind: Literal["log1p"] = "log1p"  # type: ignore[assignment]

    def scale(self, values: Float32) -> Float32:
        """(n,) numbers -> (n,) their logarithms."""
        return np.log1p(np.maximum(values, np.float32(0)))


class Bucketize(Transform):
    """Number -> index of the bucket it falls in.

    Args:
        edges: ascending lower edges, in the feature's own unit; at least one.

    >>> hours_since_open = Bucketize(edges=(1.0, 24.0, 168.0))
    >>> hours_since_open.slots(hours_since_open.inputs([0.5, 24.0, None])).tolist()
    [0.0, 2.0, 4.0]
    """

    kind: Literal["bucketize"] = "bucketize"
    edges: Annotated[tuple[Constant, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        # The device program compares in float32, so edges must differ there too.
        if not all(np.float32(a) < np.float32(b) for a, b in pairwise(self.edges)):
            raise ValueError(f"edges must ascend as float32, got {self.edges!r}")
        return self

    @property
    def cardinality(self) -> int:
        """One bucket more than edges, and one for a missing value."""
        return len(self.edges) + 2

    def slots(self, inputs: Float32) -> Float32:
        """(n,) numbers -> (n,) in [0, k]; NaN, a missing value, -> k + 1."""
        index = np.searchsorted(np.asarray(self.edges, dtype=np.float32), inputs, side="right")
        return np.where(np.isnan(inputs), len(self.edges) + 1, index).astype(np.float32)


class Categorical(Transform):
    """Text -> its place in a vocabulary; unseen text -> v, missing -> v + 1.

    Args:
        vocabulary: distinct texts; compared after Unicode NFC. Written by hand, or left out with `discover`.
        discover: the vocabulary is learned by a query that the ledger of a training pays for, and is part of the
            version: frequent texts, so many at most. For device features. There are places for all of them, whatever
            is found, so that a tower can be built before: v = `discover`. None: it is the one above.

    >>> Categorical(vocabulary=("1d", "2h")).inputs(["2h", "3w", None]).tolist()
    [1.0, 2.0, 3.0]
    """

    kind: Literal["categorical"] = "categorical"
    text: ClassVar[bool] = True
    vocabulary: tuple[str, ...] = ()
    discover: Annotated[int, Field(ge=1, le=1000)] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if bool(self.vocabulary) == (self.discover is not None):
            raise ValueError(
                "vocabulary must hold at least one text, or be left out with discover, which learns it, got "
                f"{len(self.vocabulary)} texts and discover={self.discover}"
            )
        if len({unicodedata.normalize("NFC", word) for word in self.vocabulary}) < len(self.vocabulary):
            raise ValueError("vocabulary must hold distinct texts (after Unicode NFC)")
        return self

    @property
    def cardinality(self) -> int:
        """The vocabulary, unseen, missing."""
        return (self.discover or len(self.vocabulary)) + 2

    @model_serializer(mode="wrap")
    def _as_declared(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what does not apply: see `Numeric`."""
        apart = "discover" if self.discover is None else "vocabulary"
        return {name: value for name, value in fields(self).items() if name != apart}

    @property
    def pending(self) -> bool:
        """See `Transform.pending`."""
        return self.discover is not None

    def learned(self, texts: Sequence[str]) -> Categorical:
        """With this vocabulary, as if it had been written by hand; its other places stay unused.

        Args:
            texts: distinct; at most `discover`.
        """
        unused = (f"{UNUSED}{place}" for place in range(len(texts), self.cardinality - 2))
        return Categorical(vocabulary=(*texts, *unused))

    @cached_property
    def _table(self) -> dict[str | None, int]:
        words = (unicodedata.normalize("NFC", word) for word in self.vocabulary)
        return {**{word: place for place, word in enumerate(words)}, None: len(self.vocabulary) + 1}

    def _indices(self, text: NDArray[np.object_]) -> Float32:
        check_learned({self.kind: self})
        get, unseen = self._table.get, len(self.vocabulary)
        return np.fromiter((get(value, unseen) for value in text), dtype=np.float32, count=len(text))


class Hash(Transform):
    """Text -> one of `buckets` by MurmurHash3 x86_32 of its NFC UTF-8 bytes; missing -> `buckets`.

    Args:
        buckets: how many; 2 to 2^20 (indices are carried as float32, exact to 2^24).
        seed: of the hash; another seed is another transform.
    """

    kind: Literal["hash"] = "hash"
    text: ClassVar[bool] = True
    buckets: Annotated[int, Field(ge=2, le=1 << 20)]
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0

    @property
    def cardinality(self) -> int:
        """The buckets, and one for a missing value."""
        return self.buckets + 1

    def _index(self, value: str | None) -> int:
        return self.buckets if value is None else murmur3_32(value.encode(), self.seed) % self.buckets


AnyTransform = Annotated[Numeric | Log1p | Bucketize | Categorical | Hash, Field(discriminator="kind")]


class Features(BaseModel):
    """An ordered set of named features: the columns of one tower's input.

    Attributes:
        transforms: by feature name, in the order of the slots.

    >>> features = Features.of({"hour": Categorical(vocabulary=("7AM", "2PM")), "rate": Numeric()})
    >>> features.names, features.width
    (('hour', 'rate'), 6)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    transforms: dict[str, AnyTransform]

    @classmethod
    def of(cls, transforms: Mapping[str, Transform]) -> Features:
        """Builds it from a mapping of names to transforms."""
        return cls(transforms=dict(transforms))

    def __len__(self) -> int:
        return len(self.transforms)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the slots."""
        return tuple(self.transforms)

    @property
    def pending(self) -> tuple[str, ...]:
        """Features whose constants are to be learned."""
        return tuple(name for name, transform in self.transforms.items() if transform.pending)

    @property
    def width(self) -> int:
        """Columns once encoded."""
        return sum(transform.width for transform in self.transforms.values())

    @property
    def schema_hash(self) -> str:
        """16 hex digits that change with any name, order, constant or vocabulary."""
        text = json.dumps([[n, t.model_dump(mode="json")] for n, t in self.transforms.items()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def inputs(self, columns: Mapping[str, ArrayLike]) -> Float32:
        """Raw columns by name, each (n,) -> (n, features) inputs.

        Raises:
            BadRequest: a column is absent, or holds values of the wrong type.
        """
        missing = [name for name in self.transforms if name not in columns]
        if missing:
            raise BadRequest(f"features {missing} are missing; expected {list(self.transforms)}")
        return self._by_column(lambda name, t: _named(name, t, columns[name]))

    def slots(self, inputs: Float32) -> Float32:
        """(n, features) inputs -> (n, features) slots."""
        place = {name: column for column, name in enumerate(self.transforms)}
        return self._by_column(lambda name, t: t.slots(inputs[:, place[name]]), rows=len(inputs))

    def encode(self, slots: Float32) -> Float32:
        """(n, features) slots -> (n, width) for a tower."""
        parts = [t.encode(slots[:, column]) for column, t in enumerate(self.transforms.values())]
        return np.concatenate([np.zeros((len(slots), 0), np.float32), *parts], axis=1)

    def _by_column(self, compute: Any, rows: int = 0) -> Float32:
        check_learned(self.transforms)
        parts = [compute(name, transform) for name, transform in self.transforms.items()]
        return np.stack(parts, axis=1) if parts else np.zeros((rows, 0), np.float32)


def check_learned(transforms: Mapping[str, Transform]) -> None:
    """Raises: ConfigError: constants of a transform are not learned yet; nothing stands in their place."""
    pending = [name for name, transform in transforms.items() if transform.pending]
    if pending:
        raise ConfigError(
            f"the constants of {', '.join(pending)} are not learned yet: `hybrid train` learns them, and they are part "
            "of the version that it gives"
        )


def murmur3_32(data: bytes, seed: int = 0) -> int:
    """MurmurHash3_x86_32 of `data`: the one hash by which text becomes a bucket.

    Source: A. Appleby, smhasher, MurmurHash3.cpp (public domain).

    >>> hex(murmur3_32(b"hello")), hex(murmur3_32(b"hello", 1))
    ('0x248bfa47', '0xbb4abcad')
    """
    mask, h = 0xFFFFFFFF, seed
    body = len(data) - len(data) % 4
    for start in range(0, body, 4):
        h ^= _murmur_mix(int.from_bytes(data[start : start + 4], "little"))
        h = (((h << 13 | h >> 19) & mask) * 5 + 0xE6546B64) & mask
    if data[body:]:
        h ^= _murmur_mix(int.from_bytes(data[body:], "little"))
    h ^= len(data)
    h = ((h ^ h >> 16) * 0x85EBCA6B) & mask
    h = ((h ^ h >> 13) * 0xC2B2AE35) & mask
    return h ^ h >> 16


def _murmur_mix(k: int) -> int:
    k = (k * 0xCC9E2D51) & 0xFFFFFFFF
    return ((k << 15 | k >> 17) & 0xFFFFFFFF) * 0x1B873593 & 0xFFFFFFFF


def _named(name: str, transform: Transform, raw: ArrayLike) -> Float32:
    try:
        return transform.inputs(raw)
    except BadRequest as error:
        raise BadRequest(f"feature {name!r}: {error}") from None


def as_text(raw: ArrayLike) -> NDArray[np.object_]:
    """(n,) of str, bytes in UTF-8, None or NaN -> NFC str, or None where missing."""
    values = np.asarray(raw, dtype=object)
    return np.array([_text(value) for value in values.ravel()] + [None], dtype=object)[:-1]


def _text(value: object) -> str | None:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise BadRequest("text must be UTF-8") from None
    if not isinstance(value, str):
        raise BadRequest(f"must be text, got {type(value).__name__}")
    try:
        value.encode()  # what is hashed; half of a surrogate pair has no UTF-8, and a browser would send another text
    except UnicodeEncodeError:
        raise BadRequest("text must be Unicode: it has half of a surrogate pair") from None
    return unicodedata.normalize("NFC", value)


def _as_numbers(raw: ArrayLike) -> Float32:
    """(n,) of numbers, None or NaN -> float32 with NaN where missing."""
    values = np.asarray(raw)
    if values.dtype == object:
        bad: Sequence[str] = sorted({type(v).__name__ for v in values.ravel() if not _is_number(v)})
        if bad:
            raise BadRequest(f"must be numbers, got {', '.join(bad)}")
    elif values.dtype.kind not in "biuf":
        raise BadRequest(f"must be numbers, got {values.dtype}")
    with np.errstate(over="ignore"):  # past float32 is infinite, which counts as missing
        return values.astype(np.float32).ravel()


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float | np.number | np.bool_)
