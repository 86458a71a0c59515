"""What commands found and released, kept in the folder of a run, so that a report can show it at no cost.

A number that costs privacy is paid for once; whoever looks at it again reads it here. Each file is one answer, written
all or nothing, and never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hybrid.errors import ConfigError
from hybrid.files import write_whole

FOLDER = "results"  # in a run's
SPEND = {"epsilon", "delta", "purpose", "releases", "run"}
Kind = Annotated[str, Field(pattern=r"[a-z][a-z-]*")]
Mark = Literal["noised", "public", "oracle"]
"""What a number that is shown may be: released and in a ledger; known to the server or to everybody anyway; or computed
from pooled data, as only a simulation can."""


class Result(BaseModel):
    """One answer of one command.

    Attributes:
        kind: of what found it, e.g. "analyze".
        model: whose.
        time: when it was found.
        mark: of its numbers.
        spend: what it cost, as the command says it: "epsilon", "delta", "purpose", and how many "releases" of the
            ledger of which "run" paid for it, at least. None where it cost nothing: not noised.
        shown: the answer, as the command's --json has it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    model: str
    time: AwareDatetime
    mark: Mark
    spend: dict[str, Any] | None
    shown: dict[str, Any]

    @model_validator(mode="after")
    def _paid(self) -> Self:
        if (self.mark == "noised") != (self.spend is not None):
            raise ValueError("spend must be there where numbers are noised, and only there")
        missing = [] if self.spend is None else sorted(SPEND - self.spend.keys())
        if missing:
            raise ValueError(f"spend must have {', '.join(missing)}")
        return self


def describe(run: Path, model: str, kind: str, **about: Any) -> None:
    """Says whose a run is, where nothing says it yet: by its config.json `hybrid privacy` finds what a model spent."""
    config = run / "config.json"
    if not config.exists():
        write_whole(config, json.dumps({"model": model, "kind": kind, **about}, indent=2).encode())


def cells_of(shown: Mapping[str, Any]) -> tuple[str, ...]:
    """What the cells of an answer of `hybrid analyze` are called, in order, but for missing values."""
    return bins_of(shown["edges"]) if shown["kind"] == "histogram" else tuple(shown["values"])


def bins_of(edges: Sequence[float]) -> tuple[str, ...]:
    """What bins are called.

    Args:
        edges: ascending, at least one.

    >>> bins_of([1, 24.0])
    ('below 1', '1 to 24', 'from 24')
    """
    ends = [readable(edge, 5) for edge in edges]
    return (f"below {ends[0]}", *(f"{low} to {high}" for low, high in pairwise(ends)), f"from {ends[-1]}")


def keep(
    run: Path,
    kind: str,
    shown: Mapping[str, Any],
    *,
    mark: Mark,
    spend: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> Path:
    """Keeps an answer in the folder of the run that paid for it, or that it is about.

    Args:
        run: its folder; made where it is missing.
        kind: see `Result`.
        shown: the answer, with "model". What is not finite becomes null.
        mark: see `Result`.
        spend: see `Result`; None: what `shown` has under that name.
        now: when; None: now.

    Returns:
        The file, `results/<kind>-<number>.json`; a number is never used twice.
    """
    paid = shown.get("spend") if spend is None else dict(spend)
    result = Result(
        kind=kind,
        model=shown["model"],
        time=datetime.now(UTC) if now is None else now,
        mark=mark,
        spend=paid,
        shown=dict(shown),
    )
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=folder, prefix=".draft-") as draft:
        draft.write(result.model_dump_json(indent=2).encode())
        draft.flush()
        os.fsync(draft.fileno())
        number = 1
        while True:
            file = folder / f"{kind}-{number:04}.json"
            try:
                os.link(draft.name, file)  # fails where it exists: two commands may keep at once
            except FileExistsError:
                number += 1
            else:
                return file


def read(runs: Path, model: str) -> list[tuple[str, Result]]:
    """Every answer about a model, the oldest first, each with the name of its run's folder.

    Args:
        runs: folder of all runs.
        model: its name.

    Raises:
        ConfigError: a file cannot be read.
    """
    every = [(file.parents[1].name, _result(file, runs)) for file in sorted(runs.glob(f"*/{FOLDER}/*.json"))]
    return sorted((one for one in every if one[1].model == model), key=lambda one: one[1].time)


class Kept:
    """Answers of one kind about a model, those that come later among them; each file is read once.

    Args:
        runs: folder of all runs.
        model, kind: see `Result`.
    """

    def __init__(self, runs: Path, model: str, kind: str) -> None:
        self._runs, self._model, self._kind = runs, model, kind
        self._read: dict[Path, Result] = {}

    def all(self) -> list[Result]:
        """Every one so far, the oldest first.

        Raises:
            ConfigError: a file cannot be read.
        """
        for file in self._runs.glob(f"*/{FOLDER}/{self._kind}-*.json"):
            if file not in self._read:
                self._read[file] = _result(file, self._runs)
        ours = (one for one in self._read.values() if (one.model, one.kind) == (self._model, self._kind))
        return sorted(ours, key=lambda one: one.time)


def _result(file: Path, runs: Path) -> Result:
    try:
        return Result.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        said = error.strerror if isinstance(error, OSError) else error.errors(include_url=False)[0]["msg"]
        raise ConfigError(
            f"{file.relative_to(runs.parent)} must be an answer as a command keeps it: {said}; move it elsewhere"
        ) from None


def readable(value: float, digits: int = 4) -> str:
    """A number as people read it in a table: to so many digits, and whole, not as a power of ten, from 10,000 on.

    >>> [readable(value) for value in (0.00002, 56.1943, -30197.4, 1e16)]
    ['2e-05', '56.19', '-30,197', '1e+16']
    """
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.{digits}g}"
