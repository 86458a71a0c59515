"""Questions to people's devices: what one person contributes to each, as a short vector of bounded L2 norm.

The sum over people, noised, is all that leaves the aggregator; estimates are made of it (`hybrid.analytics`).
`contributions` computes the vectors of many people at once in a simulation, and of one on a device: the same code.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from hybrid.errors import ConfigError
from hybrid.features import UNUSED, Categorical, Numeric, as_text, murmur3_32
from hybrid.journal import TEXTS
from hybrid.week import Week

Floats = NDArray[np.float64]
Cells = tuple[NDArray[np.int64], Floats]
"""Of n rows: places (n, m), -1 where a row adds nothing, and what it adds there, (n, m)."""

LABEL, SCORE, AGAINST = "label", "score", "score_against"
"""Columns beside the features: 0, 1 or NaN, and the probabilities that one version predicts, and another."""
PEOPLE_A_CHUNK = 4096
CELLS_A_CHUNK = 1 << 22  # 32 MiB
MOST_CELLS = 1 << 20
MOST_VALUES, MOST_GROUPS = 4096, 1024  # of a vocabulary that is counted by, and of what is grouped by
SPELLED_BYTES, CHECK_BITS, CHECK_SEED = 32, 32, 1
SPELLED_BITS = 8 * SPELLED_BYTES + CHECK_BITS
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # a terminal that such a text is shown in would obey it
FEW_PEOPLE = 8  # whose cells are encoded without the matrix, which a device need not hold: 128 MiB for 4,096 cells


class Part(BaseModel, ABC):
    """One kind of count over a person's rows.

    Attributes:
        text: whether its column is text.
        cumulative: whether its ordered cells travel encoded, so that sums of neighbouring cells have little noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    text: ClassVar[bool] = False
    cumulative: bool = False

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers that it takes of the vector."""

    @property
    def ordered(self) -> tuple[int, ...]:
        """Lengths of the runs of ordered cells that `size` begins with."""
        return ()

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Columns that it needs."""

    @property
    def row_norm(self) -> float:
        """L2 norm of what one row adds, at most."""
        return max((float(np.linalg.norm(_roots(n))) for n in self.ordered), default=1.0) if self.cumulative else 1.0

    @abstractmethod
    def cells(self, columns: Mapping[str, NDArray[Any]]) -> Cells:
        """What n rows add, and where."""

    def encode(self, counts: Floats) -> Floats:
        """(k, size) counts -> (k, size) as they are summed and noised."""
        return self._by_run(counts, _rooted)

    def decode(self, total: Floats) -> Floats:
        """(k, size) encoded -> (k, size) counts."""
        return self._by_run(total, lambda run: run @ _root_inverse(run.shape[1]).T)

    def decode_transposed(self, gradient: Floats) -> Floats:
        """(k, size) of functions of counts -> (k, size) of the same as functions of what was noised."""
        return self._by_run(gradient, lambda run: run @ _root_inverse(run.shape[1]))

    def _by_run(self, rows: Floats, change: Any) -> Floats:
        if not self.cumulative:
            return rows
        begin, parts = 0, []
        for length in self.ordered:
            parts.append(change(rows[:, begin : begin + length]))
            begin += length
        return np.concatenate([*parts, rows[:, begin:]], axis=1)


class Moments(Part):
    """Of numbers: how many, their sum and their sum of squares, of x = (value - low) / (high - low) kept in [0, 1].

    A missing value adds nothing.

    Attributes:
        column: a numeric feature.
        low, high: bounds, in its own unit.
        scale: "log1p": of log(1 + max(value, 0)), bounds included.
    """

    kind: Literal["moments"] = "moments"
    column: str
    low: FiniteFloat
    high: FiniteFloat
    scale: Literal["linear", "log1p"] = "linear"

    @model_validator(mode="after")
    def _order(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.cumulative:
            raise ValueError("cumulative must be left out: moments have no order")
        return self

    @property
    def size(self) -> int:
        """Count, sum, sum of squares."""
        return 3

    @property
    def reads(self) -> tuple[str, ...]:
        """The feature."""
        return (self.column,)

    @property
    def row_norm(self) -> float:
        """Of (1, 1, 1)."""
        return math.sqrt(3.0)

    @property
    def range(self) -> tuple[float, float]:
        """Of what x stands for: the bounds, on the scale."""
        if self.scale == "linear":
            return self.low, self.high
        return math.log1p(max(self.low, 0.0)), math.log1p(max(self.high, 0.0))

    def cells(self, columns: Mapping[str, NDArray[Any]]) -> Cells:
        """See `Part`."""
        values = columns[self.column].astype(np.float64)
        if self.scale == "log1p":
            values = np.log1p(np.maximum(values, 0.0))
        low, high = self.range
        x = np.clip((values - low) / (high - low), 0.0, 1.0)
        known = ~np.isnan(x)
        places = np.where(known[:, None], np.arange(3), -1)
        x = np.where(known, x, 0.0)
        return places, np.stack([np.ones_like(x), x, x * x], axis=1)


class Histogram(Part):
    """Rows by bin of a number: below the first edge, between edges, from the last on; and, last, those without one.

    Attributes:
        column: a numeric feature, or "score".
        edges: ascending, at least one.
    """

    kind: Literal["histogram"] = "histogram"
    column: str
    edges: Annotated[tuple[FiniteFloat, ...], Field(min_length=1, max_length=4096)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        _check_ascending("edges", self.edges)
        return self

    @property
    def size(self) -> int:
        """Bins, and one for missing values."""
        return len(self.edges) + 2

    @property
    def ordered(self) -> tuple[int, ...]:
        """The bins."""
        return (len(self.edges) + 1,)

    @property
    def reads(self) -> tuple[str, ...]:
        """The feature."""
        return (self.column,)

    def cells(self, columns: Mapping[str, NDArray[Any]]) -> Cells:
        """See `Part`."""
        values = columns[self.column].astype(np.float64)
        place = np.searchsorted(np.asarray(self.edges), values, side="right")
        place = np.where(np.isnan(values), len(self.edges) + 1, place)
        return place[:, None].astype(np.int64), np.ones((len(values), 1))


class Categories(Part):
    """Rows by text: each of some values, then all others, then those without one.

    Attributes:
        column: a text feature.
        values: distinct after Unicode NFC.
    """

    kind: Literal["categories"] = "categories"
    text: ClassVar[bool] = True
    column: str
    values: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_VALUES)]

    @model_validator(mode="after")
    def _plain(self) -> Self:
        assert Categorical(vocabulary=self.values)  # and its checks
        if self.cumulative:
            raise ValueError("cumulative must be left out: categories have no order")
        return self

    @property
    def size(self) -> int:
        """The values, others, missing."""
        return len(self.values) + 2

    @property
    def reads(self) -> tuple[str, ...]:
        """The feature."""
        return (self.column,)

    def cells(self, columns: Mapping[str, NDArray[Any]]) -> Cells:
        """See `Part`."""
        place = Categorical(vocabulary=self.values).inputs(columns[self.column]).astype(np.int64)
        return place[:, None], np.ones((len(place), 1))


class Hashed(Part):
    """Rows by a hash of their text: what is frequent is found in it, before anybody knows what there is.

    A text that cannot be spelled (see `Spelled`), and a missing one, add nothing.

    Attributes:
        column: a text feature.
        buckets: of MurmurHash3 x86_32 of the NFC UTF-8 bytes.
    """

    kind: Literal["hashed"] = "hashed"
    text: ClassVar[bool] = True
    column: str
    buckets: Annotated[int, Field(ge=2, le=MOST_CELLS)]

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if self.cumulative:
            raise ValueError("cumulative must be left out: hashes have no order")
        return self

    @property
    def size(self) -> int:
        """The buckets."""
        return self.buckets

    @property
    def reads(self) -> tuple[str, ...]:
        """The feature."""
        return (self.column,)

    def cells(self, columns: Mapping[str, NDArray[Any]]) -> Cells:
        """See `Part`."""
        text = as_text(columns[self.column])
        found = {value: bucket_of(value, self.buckets) for value in set(text)}
        place = np.fromiter((found[value] for value in text), dtype=np.int64, count=len(text))
        return place[:, None], np.ones((len(place), 1))


class Spelled(Part):
    """The bits of texts, summed for each of some buckets: where one text is frequent, the signs of the sums spell it.

    A text is its NFC UTF-8 bytes, `SPELLED_BYTES` of them, zeros behind its end, and 32 bits of a second hash. Each
    bit counts as 1 or -1 over the root of how many there are, so that a row's vector has the norm 1, whatever its
    text. A longer text adds nothing, nor does one of another bucket, one that holds a control character, or
    `hybrid.features.UNUSED`.

    Attributes:
        column: a text feature.
        buckets: of `Hashed`.
        survivors: those of them that are spelled, distinct.
    """

    kind: Literal["spelled"] = "spelled"
    text: ClassVar[bool] = True
    column: str
    buckets: Annotated[int, Field(ge=2, le=MOST_CELLS)]
    survivors: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if len(set(self.survivors)) < len(self.survivors) or max(self.survivors) >= self.buckets:
            raise ValueError("survivors must be distinct buckets")
        if self.cumulative:
            raise ValueError("cumulative must be left out: bits have no order")
        return self

    @property
    def size(self) -> int:
        """The bits of each bucket."""
        return len(self.survivors) * SPELLED_BITS

    @property
    def reads(self) -> tuple[str, ...]:
        """The feature."""
        return (self.column,)

    def cells(self, columns: Mapping[str, NDArray[Any]]) -> Cells:
        """See `Part`."""
        text = as_text(columns[self.column])
        distinct = sorted({value for value in text if value is not None})
        first = {bucket: SPELLED_BITS * place for place, bucket in enumerate(self.survivors)}
        begin = {value: first.get(bucket_of(value, self.buckets), -1) for value in distinct}
        spelled = [value for value in distinct if begin[value] >= 0]
        places, signs = np.full((len(spelled) + 1, SPELLED_BITS), -1), np.zeros((len(spelled) + 1, SPELLED_BITS))
        for row, value in enumerate(spelled):
            places[row], signs[row] = begin[value] + np.arange(SPELLED_BITS), spelling(value)
        number = {value: row for row, value in enumerate(spelled)}
        of_row = np.fromiter((number.get(value, len(spelled)) for value in text), dtype=np.int64, count=len(text))
        return places[of_row], signs[of_row] / math.sqrt(SPELLED_BITS)


class Labels(Part):
    """Rows with the label 0, and rows with the label 1."""

    kind: Literal["labels"] = "labels"

    @property
    def size(self) -> int:
        """Negatives, positives."""
        return 2

    @property
    def reads(self) -> tuple[str, ...]:
        """The label."""
        return (LABEL,)

    def cells(self, columns: Mapping[str, NDArray[Any]]) -> Cells:
        """See `Part`."""
        return (columns[LABEL] == 1).astype(np.int64)[:, None], np.ones((len(columns[LABEL]), 1))


class Scores(Part):
    """Rows by label and predicted probability, for ranking and calibration.

    A row is shared between the two nodes beside its score, in proportion to how near it is. So sums over nodes of
    anything linear between them are exact (the mean score is), and those of what is smooth nearly. A score outside
    the nodes counts at the last one.

    Attributes:
        nodes: ascending probabilities, at least two.
        column: with the scores; another one where two versions are compared.
    """

    kind: Literal["scores"] = "scores"
    column: str = SCORE
    nodes: Annotated[tuple[Annotated[FiniteFloat, Field(ge=0, le=1)], ...], Field(min_length=2, max_length=2048)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        _check_ascending("nodes", self.nodes)
        return self

    @property
    def size(self) -> int:
        """Nodes of the negatives, then those of the positives."""
        return 2 * len(self.nodes)

    @property
    def ordered(self) -> tuple[int, ...]:
        """Both runs of nodes."""
        return len(self.nodes), len(self.nodes)

    @property
    def reads(self) -> tuple[str, ...]:
        """Score and label."""
        return LABEL, self.column

    def cells(self, columns: Mapping[str, NDArray[Any]]) -> Cells:
        """See `Part`."""
        nodes, score = np.asarray(self.nodes), columns[self.column].astype(np.float64)
        known = ~np.isnan(score)
        score = np.clip(np.where(known, score, nodes[0]), nodes[0], nodes[-1])
        left = np.clip(np.searchsorted(nodes, score, side="right") - 1, 0, len(nodes) - 2)
        share = (score - nodes[left]) / (nodes[left + 1] - nodes[left])
        begin = left + len(nodes) * (columns[LABEL] == 1)
        places = np.where(known[:, None], begin[:, None] + np.arange(2), -1)
        return places.astype(np.int64), np.stack([1.0 - share, share], axis=1)


class Residuals(Part):
    """How far predictions are off in the large: sums of label - score, and of scores by shifted logits.

    The first says by how many rows; the others, with all logits shifted by -1, 0 and 1,
    how fast a shift changes that. Where a label is rare one person adds little to any, so that they may
    be clipped low, and have little noise, where counts by score would have much.
    """

    kind: Literal["residuals"] = "residuals"

    @property
    def size(self) -> int:
        """The four sums."""
        return 4

    @property
    def reads(self) -> tuple[str, ...]:
        """Score and label."""
        return LABEL, SCORE

    @property
    def row_norm(self) -> float:
        """Of (-1, 1, 1, 1): a label of 0 with a score of 1."""
        return 2.0

    def cells(self, columns: Mapping[str, NDArray[Any]]) -> Cells:
        """See `Part`."""
        score = columns[SCORE].astype(np.float64)
        known = ~np.isnan(score)
        score = np.clip(np.where(known, score, 0.0), 0.0, 1.0)[:, None]
        odds = score * np.exp([-1.0, 0.0, 1.0])
        shifted = odds / (1.0 - score + odds)
        residual = (columns[LABEL] == 1)[:, None] - score
        return np.where(known[:, None], np.arange(4), -1), np.concatenate([residual, shifted], axis=1)


class By(BaseModel):
    """Groups, by a column that the server knows of each row: what it says of a person is nothing new to it.

    Attributes:
        column: a text column, e.g. a request feature.
        values: of the groups, distinct; a row with another value counts nowhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    column: str
    values: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_GROUPS)]

    @model_validator(mode="after")
    def _plain(self) -> Self:
        assert Categorical(vocabulary=self.values)  # and its checks
        return self


AnyPart = Annotated[
    Moments | Histogram | Categories | Hashed | Spelled | Labels | Scores | Residuals, Field(discriminator="kind")
]


class Query(BaseModel):
    """What each person is asked once: one vector of `size` numbers, of L2 norm `clip` at most.

    Attributes:
        parts: counted over the same rows; their cells one after another.
        rows: of a person, at most.
        take: which of them, where a person has more: the last or the first ones. Where a part reads the label, rows
            without one are not counted among them.
        by: counted by group, the groups' vectors one after another; None: all together.
        clip: largest L2 norm of a person's vector. None: the largest that so many rows can have, so that nothing is
            scaled down. Lower is less noise, and a bias where people have more.
        spread: where it is not None, the query asks for squares in place of counts: see `squares`. One cap for each
            statistic, > 0.
        week: where it is not None, the query is about devices' journals of that week (`hybrid.journal`), of which each
            device has one row, and about nothing else.

    Raises:
        ValueError: (pydantic's) a field is out of range, there are more than 2^20 cells, or a query about journals
            reads something else too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: Annotated[tuple[AnyPart, ...], Field(min_length=1, max_length=256)]
    rows: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    take: Literal["last", "first"] = "last"
    by: By | None = None
    clip: Annotated[FiniteFloat, Field(gt=0)] | None = None
    spread: tuple[Annotated[FiniteFloat, Field(gt=0)], ...] | None = None
    week: Week | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.counts > MOST_CELLS:
            raise ValueError(f"parts x groups must have at most {MOST_CELLS} cells, got {self.counts}")
        return self

    @model_validator(mode="after")
    def _of_journals_alone(self) -> Self:
        if self.week is None:
            return self
        other = sorted(set(self.reads) - set(TEXTS))
        if other:
            raise ValueError(f"a query about journals must read {', '.join(TEXTS)} alone, got {other}")
        if self.rows != 1 or self.spread is not None:
            raise ValueError("a query about journals must have rows=1 and no spread: a device has one row")
        return self

    @property
    def groups(self) -> int:
        """How many, at least 1."""
        return 1 if self.by is None else len(self.by.values)

    @property
    def counts(self) -> int:
        """Cells of all groups."""
        return self.groups * sum(part.size for part in self.parts)

    @property
    def size(self) -> int:
        """Numbers that a person sends."""
        return self.counts if self.spread is None else len(self.spread)

    @property
    def bound(self) -> float:
        """L2 norm of the vector of a person with `rows` rows, at most."""
        return self.rows * math.hypot(*(part.row_norm for part in self.parts))

    @property
    def norm(self) -> float:
        """L2 norm by which one person moves the sum, at most: the device clips to it, and so does the aggregator."""
        if self.spread is not None:
            return math.sqrt(len(self.spread))
        return self.bound if self.clip is None else min(self.clip, self.bound)

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that it needs, each once."""
        found = [name for part in self.parts for name in part.reads]
        return tuple(dict.fromkeys(found if self.by is None else [*found, self.by.column]))

    @property
    def texts(self) -> frozenset[str]:
        """Those of them that hold text."""
        found = {name for part in self.parts if part.text for name in part.reads}
        return frozenset(found if self.by is None else {*found, self.by.column})

    def encode(self, counts: Floats) -> Floats:
        """(k, counts) -> the same, as it travels."""
        return self._by_part(counts, "encode")

    def decode(self, total: Floats) -> Floats:
        """(k, counts) as it travelled -> counts."""
        return self._by_part(total, "decode")

    def decode_transposed(self, gradient: Floats) -> Floats:
        """(k, counts) gradients of functions of the counts -> those of the same functions of what travelled."""
        return self._by_part(gradient, "decode_transposed")

    def _by_part(self, rows: Floats, change: str) -> Floats:
        if not any(part.cumulative for part in self.parts):
            return rows
        begin, done = 0, []
        for part in self.parts * self.groups:
            done.append(getattr(part, change)(rows[:, begin : begin + part.size]))
            begin += part.size
        return np.concatenate(done, axis=1)

    @cached_property
    def _group_of(self) -> Categorical | None:
        return None if self.by is None else Categorical(vocabulary=self.by.values)


def contributions(
    query: Query,
    columns: Mapping[str, ArrayLike],
    offsets: NDArray[np.integer],
    payload: NDArray[np.floating] | None = None,
) -> Iterator[Floats]:
    """What each person contributes, unclipped: whoever sends or sums it clips it to `query.norm`.

    Args:
        query: what is asked.
        columns: `query.reads` at least, each (n,): raw values of features, a missing one None or NaN; "label" 0, 1
            or NaN; "score" a probability.
        offsets: (people + 1,) person u has the rows offsets[u] to offsets[u + 1], the oldest first.
        payload: for a query with `spread`: see `squares`.

    Yields:
        (k, size) float64, of the next k people, those without rows among them.

    Raises:
        BadRequest: a column holds values of another type.
        ConfigError: a column is absent, or the payload is not the query's.
    """
    missing = [name for name in query.reads if name not in columns]
    if missing:
        raise ConfigError(f"the query reads the columns {missing}, which are not there")
    read = {name: _read(columns[name], text=name in query.texts) for name in query.reads}
    people = max(1, min(PEOPLE_A_CHUNK, CELLS_A_CHUNK // query.counts))
    for begin in range(0, len(offsets) - 1, people):
        here = offsets[begin : begin + people + 1]
        rows = {name: column[here[0] : here[-1]] for name, column in read.items()}
        yield _as_sent(query, _counts(query, rows, here - here[0]), payload)


def squares(query: Query, counts: Floats, payload: NDArray[np.floating]) -> Floats:
    """Of each person and statistic, the square of its influence, as a share of its cap's: in [0, 1].

    A statistic f of the summed counts has the gradient g; a person with the counts x moves it by about g x - c. The
    sum of squares over people is the sampling variance of f, clustered by person.

    Args:
        query: with `spread`, a cap for each of the m statistics.
        counts: (k, counts) of k people.
        payload: (m x (counts + 1),) g, then c, of each statistic.

    Returns:
        (k, m).

    Raises:
        ConfigError: the payload is of another length.
    """
    assert query.spread is not None
    statistics = len(query.spread)
    if payload is None or payload.shape != (statistics * (query.counts + 1),):
        raise ConfigError(f"the payload must have {statistics * (query.counts + 1)} numbers")
    table = payload.astype(np.float64).reshape(statistics, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        influence = (counts @ table[:, :-1].T - table[:, -1]) / np.asarray(query.spread)
    shares: Floats = np.minimum(np.nan_to_num(influence, nan=0.0, posinf=1.0, neginf=1.0) ** 2, 1.0)
    return shares


def plain(query: Query) -> Query:
    """The query whose counts a query with `spread` squares."""
    return query.model_copy(update={"spread": None})


def _as_sent(query: Query, counts: Floats, payload: NDArray[np.floating] | None) -> Floats:
    encoded = query.encode(counts)
    if query.spread is None:
        return encoded
    norm = np.linalg.norm(encoded, axis=1)  # people whose counts were scaled down have as much less influence
    clip = plain(query).norm
    return squares(query, counts * (clip / np.maximum(norm, clip))[:, None], payload)  # type: ignore[arg-type]


def _counts(query: Query, rows: Mapping[str, NDArray[Any]], offsets: NDArray[np.integer]) -> Floats:
    """(people, counts)."""
    people, cells = len(offsets) - 1, query.counts // query.groups
    person = np.repeat(np.arange(people), np.diff(offsets))
    taken = _taken(query, rows, person, people)
    person, rows = person[taken], {name: column[taken] for name, column in rows.items()}
    group = np.zeros(len(person), np.int64)
    if query.by is not None and query._group_of is not None:
        group = query._group_of.inputs(rows[query.by.column]).astype(np.int64)
    first, flat, added = (person * query.groups + group) * cells, [], []
    for part in query.parts:
        places, values = part.cells(rows)
        use = (places >= 0) & (group < query.groups)[:, None]
        flat.append((first[:, None] + places)[use])
        added.append(values[use])
        first = first + part.size
    total = np.bincount(np.concatenate(flat), weights=np.concatenate(added), minlength=people * query.counts)
    return np.asarray(total, np.float64).reshape(people, query.counts)


def _taken(query: Query, rows: Mapping[str, NDArray[Any]], person: NDArray[np.int64], people: int) -> NDArray[np.int64]:
    """Which rows count: of each person the last or the first ones."""
    usable = np.arange(len(person))
    if LABEL in rows:
        usable = np.flatnonzero((rows[LABEL] == 0) | (rows[LABEL] == 1))
    owner = person[usable]
    many = np.bincount(owner, minlength=people)
    begin = np.concatenate([[0], np.cumsum(many)])[:-1]
    place = np.arange(len(usable)) - begin[owner]
    if query.take == "last":
        place = many[owner] - 1 - place
    taken: NDArray[np.int64] = usable[place < query.rows]
    return taken


def _read(column: ArrayLike, *, text: bool) -> NDArray[Any]:
    return np.asarray(column, dtype=object) if text else Numeric().inputs(column)


@lru_cache(maxsize=16)
def _roots(size: int) -> Floats:
    """First column of the square root of the (size, size) matrix of running sums: 1, 1/2, 3/8, 5/16, ...

    Sums of neighbouring cells, decoded, have noise that grows with log(size) in place of its root.

    Source:
        Fichtenberger, Henzinger and Upadhyay, ICML 2023, theorem 1. https://arxiv.org/abs/2202.11205
    """
    k = np.arange(1, size)
    roots: Floats = np.cumprod(np.concatenate([[1.0], (2 * k - 1) / (2 * k)]))
    return roots


def _rooted(run: Floats) -> Floats:
    """(k, n) by the root of running sums."""
    size = run.shape[1]
    if len(run) > FEW_PEOPLE:
        return np.asarray(run @ _root(size).T)
    return np.array([np.convolve(row, _roots(size))[:size] for row in run]).reshape(run.shape)


@lru_cache(maxsize=16)
def _root(size: int) -> Floats:
    return _toeplitz(_roots(size))


@lru_cache(maxsize=16)
def _root_inverse(size: int) -> Floats:
    """Of the root: 1, -1/2, -1/8, -1/16, ..., the coefficients of (1 - x)^(1/2)."""
    k = np.arange(1, size)
    return _toeplitz(np.cumprod(np.concatenate([[1.0], (2 * k - 3) / (2 * k)])))


def _toeplitz(first: Floats) -> Floats:
    """Lower triangular."""
    behind = np.arange(len(first))[:, None] - np.arange(len(first))
    return np.where(behind >= 0, first[np.maximum(behind, 0)], 0.0)


def bucket_of(text: str | None, buckets: int) -> int:
    """Of an NFC text, by `hybrid.features.murmur3_32`; -1 for a missing one, and one that cannot be spelled."""
    if text is None or UNUSED in text or _CONTROL.search(text) or len(text.encode()) > SPELLED_BYTES:
        return -1
    return murmur3_32(text.encode()) % buckets


def spelling(text: str) -> NDArray[np.int8]:
    """(SPELLED_BITS,) of 1 and -1: an NFC text of at most `SPELLED_BYTES`, and a second hash of it."""
    content = text.encode()
    check = murmur3_32(content, CHECK_SEED).to_bytes(CHECK_BITS // 8, "little")
    whole = content.ljust(SPELLED_BYTES, b"\0") + check
    bits: NDArray[np.int8] = 2 * np.unpackbits(np.frombuffer(whole, np.uint8)).astype(np.int8) - 1
    return bits


def _check_ascending(name: str, values: Sequence[float]) -> None:
    if any(a >= b for a, b in pairwise(values)):
        raise ValueError(f"{name} must ascend")
