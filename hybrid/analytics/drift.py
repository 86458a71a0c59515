"""Whether what devices hold, and what a version makes of it, is still distributed as it was.

Everybody is asked one question about a period: of their last row in it, which cell of each feature is it in? The sums
are noised as one release, and kept with what they cost: whatever is compared with them later costs nothing again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from hybrid.analytics.asking import Ask
from hybrid.analytics.metrics import arcsine_nodes
from hybrid.analytics.psi import Noised, Psi, psi
from hybrid.analytics.results import bins_of
from hybrid.errors import ConfigError
from hybrid.features import Bucketize, Categorical, Log1p, Numeric, Transform
from hybrid.files import write_whole
from hybrid.query import MOST_VALUES, SCORE, AnyPart, Categories, Floats, Histogram, Query
from hybrid.week import week_of

SCORE_BINS = 20
NUMBER_EDGES = np.linspace(-2.0, 2.0, 9)  # standard deviations around the declared mean: ten bins


class Period(BaseModel):
    """Whose rows of when.

    Attributes:
        population: name of an imported one.
        imported: when it was, so that another of the same name is not taken for it.
        since, until: rows from the first on, and before the second; None: no end on that side.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    population: str
    imported: AwareDatetime
    since: AwareDatetime | None = None
    until: AwareDatetime | None = None

    def __str__(self) -> str:
        if self.since is None and self.until is None:
            return self.population
        ends = (f" {word} {time:%Y-%m-%d %H:%M}" for word, time in (("from", self.since), ("to", self.until)) if time)
        return self.population + "".join(ends).replace(" 00:00", "")


class Question(BaseModel):
    """What is asked of whom: two of them that are equal have one answer.

    Attributes:
        model: whose features.
        version: whose scores; None: none.
        period: of the rows.
        query: that everybody is asked, see `watched`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    version: int | None
    period: Period
    query: Query


class Counted(BaseModel):
    """The noised counts of one period, as released and kept.

    Attributes:
        question: that was asked.
        counts: (query.counts,).
        sd: standard deviation of the noise of each.
        people: who were asked (public).
        time: when.
        week: whose ledger paid.
        epsilon, delta: what it cost alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: Question
    counts: tuple[float, ...]
    sd: float
    people: int
    time: AwareDatetime
    week: str
    epsilon: float
    delta: float

    @property
    def columns(self) -> dict[str, Noised]:
        """By name: its cells."""
        ends = np.cumsum([part.size for part in self.question.query.parts])[:-1]
        parts = zip(self.question.query.parts, np.split(np.array(self.counts), ends), strict=True)
        return {part.reads[0]: Noised(cells, self.sd) for part, cells in parts}


@dataclass(frozen=True)
class Column:
    """How one feature, or the score, has moved.

    Attributes:
        name: of the feature, or "score".
        psi: how far.
        cells: their names, in order.
        reference, current: noised shares of the rows by cell, none below 0.
    """

    name: str
    psi: Psi
    cells: tuple[str, ...]
    reference: Floats
    current: Floats


def watched(transforms: Mapping[str, Transform], *, score: bool) -> Query:
    """What everybody is asked, of all columns together.

    A person counts once, by the last row: so nobody's many rows weigh more than another's one, the noise is the
    least, and rows that are counted are independent.

    Args:
        transforms: of the device features; those without cells are left out, see `unwatched`.
        score: whether a version's scores are asked too.

    Raises:
        ConfigError: nothing would be asked, or a feature is called like the scores.
    """
    if score and SCORE in transforms:
        raise ConfigError(f"a device feature cannot be called {SCORE!r} where scores are watched; choose no version")
    parts = [part for name, transform in transforms.items() if (part := _part(name, transform)) is not None]
    if score:
        nodes = arcsine_nodes(SCORE_BINS + 1)[1:-1]
        parts.append(Histogram(column=SCORE, edges=tuple(nodes.tolist())))
    if not parts:
        raise ConfigError("a model must have a device feature other than Hash to be watched; choose a version's score")
    return Query(parts=tuple(parts), rows=1, take="last")


def unwatched(transforms: Mapping[str, Transform]) -> tuple[str, ...]:
    """Features that no question is asked of."""
    return tuple(name for name, transform in transforms.items() if _part(name, transform) is None)


def _part(name: str, transform: Transform) -> AnyPart | None:
    """The cells of a feature, from its constants alone; none where they are not learned yet."""
    if transform.pending:
        return None
    match transform:
        case Categorical():
            return Categories(column=name, values=transform.vocabulary[:MOST_VALUES])  # the others count as unseen
        case Bucketize():
            # A device compares in float32.
            return Histogram(column=name, edges=tuple(np.asarray(transform.edges, np.float32).tolist()))
        case Numeric():
            return Histogram(column=name, edges=_number_edges(transform))
        case _:
            return None


def _number_edges(transform: Numeric) -> tuple[float, ...]:
    edges = transform.mean + transform.std * NUMBER_EDGES
    if isinstance(transform, Log1p):  # its numbers below 0 count as 0
        edges = np.expm1(np.minimum(edges[edges > 0], 80.0)) if edges[-1] > 0 else np.ones(1)
    return tuple(np.unique(edges).tolist())


def count(ask: Ask, question: Question, *, share: float, epsilon: float, delta: float, now: datetime) -> Counted:
    """Asks the people of a period.

    Args:
        ask: them.
        question: what.
        share: of what `ask` may spend.
        epsilon: what that costs alone.
        delta: at which it does.
        now: whose week pays.

    Raises:
        BudgetExceeded: the ledger has not enough left.
    """
    answer = ask(question.query, share=share)
    counts = tuple(answer.counts.ravel().tolist())
    about = {"time": now, "week": week_of(now), "epsilon": epsilon, "delta": delta}
    return Counted(question=question, counts=counts, sd=answer.sd, people=answer.people, **about)


def compare(reference: Counted, current: Counted) -> tuple[Column, ...]:
    """How far each column has moved; nothing is asked, and nothing is spent.

    Args:
        reference: what is compared with.
        current: what is compared; of the same query.
    """
    query = reference.question.query
    assert query == current.question.query
    before, after = reference.columns, current.columns
    found = []
    for part in query.parts:
        name, text = part.reads[0], isinstance(part, Categories)
        moved = psi(before[name], after[name], ordered=not text, apart=2 if text else 1)
        found.append(Column(name, moved, cells_of(part), before[name].shares, after[name].shares))
    return tuple(found)


def cells_of(part: AnyPart) -> tuple[str, ...]:
    """Their names, in order."""
    if isinstance(part, Categories):
        return (*part.values, "(unseen)", "(missing)")
    assert isinstance(part, Histogram)
    return (*bins_of(part.edges), "(missing)")


# What is kept: runs/<model>-drift-<week>/, one folder and one ledger for each ISO week.


def folder_of(runs: Path, model: str, week: str) -> Path:
    """Of one week's counts, and its ledger."""
    return runs / f"{model}-drift-{week}"


def keep(counted: Counted, folder: Path, number: int) -> Path:
    """Writes counts to a file of the folder; `number` is of the week's ledger."""
    file = folder / f"counted-{number}.json"
    write_whole(file, counted.model_dump_json().encode())
    return file


def kept(runs: Path, model: str) -> Iterable[Counted]:
    """All counts of a model that are kept, of any week.

    Raises:
        ConfigError: a file of them cannot be read.
    """
    for file in sorted(runs.glob(f"{model}-drift-*/counted-*.json")):
        try:
            yield Counted.model_validate_json(file.read_bytes())
        except ValidationError:
            raise ConfigError(
                f"{file.parent.name}/{file.name} cannot be read; remove it, and its period is asked and paid again"
            ) from None
