"""Answering a query on a device: its own rows, counted and clipped to one short vector."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from device_runtime.answers import slots_of
from device_runtime.program import Engine, PredictProgram
from hybrid.bundle import Bundle, Manifest
from hybrid.errors import BadRequest, ConfigError
from hybrid.journal import LEFT, TEXTS, Noted
from hybrid.plan import QueryPlan
from hybrid.privacy.mechanisms import clip_rows
from hybrid.query import LABEL, SCORE, Query, contributions

Float32 = NDArray[np.float32]


class Rows(Protocol):
    """Rows of one device, the oldest first: see `device_runtime.store.Asked`."""

    @property
    def columns(self) -> Mapping[str, Sequence[Any]]:
        """Device and request features by name, each (n,) raw, None where missing; "label" 0, 1 or None."""
        ...

    @property
    def features(self) -> Mapping[str, Sequence[Any]]:
        """The device features alone."""
        ...

    @property
    def server(self) -> Float32:
        """(n, server_embedding) as the server side contributed it to this version; NaN where it did not."""
        ...

    @property
    def predicted(self) -> Float32:
        """(n,) what this version predicted; NaN where it did not."""
        ...


@dataclass(frozen=True)
class Readable:
    """What a query may read on a device with this bundle.

    Attributes:
        manifest: of the bundle.
    """

    manifest: Manifest

    @property
    def texts(self) -> dict[str, bool]:
        """Column -> whether it holds text. Of a device and a request feature of one name it is the device's."""
        request = {name: kind == "text" for name, kind in self.manifest.request.items()}
        device = {name: transform.text for name, transform in self.manifest.features.transforms.items()}
        return request | device | {LABEL: False, SCORE: False}

    def lacks(self, query: Query) -> list[str]:
        """Columns that the query reads and the bundle does not declare, or not as what a part takes them for."""
        return lacks(query, self.texts)


def lacks(query: Query, texts: Mapping[str, bool]) -> list[str]:
    """Columns that a query reads and that are not there, or not as what a part takes them for.

    Args:
        query: which.
        texts: column that is there -> whether it holds text.
    """
    by = [] if query.by is None else [(query.by.column, True)]
    read = [(name, part.text) for part in query.parts for name in part.reads] + by
    return list(dict.fromkeys(name for name, text in read if texts.get(name) is not text))


def reported(plan: QueryPlan, noted: Noted | None) -> Float32:
    """What a device sends of its journal: zeros where nothing is noted.

    Args:
        plan: of a query about journals, which reads `hybrid.journal.TEXTS`.
        noted: of its newest version in the query's week.

    Returns:
        (plan.parameters,) of L2 norm `plan.clip` at most.
    """
    columns: dict[str, list[Any]] = {name: [] for name in TEXTS} if noted is None else noted.columns
    return _sent(plan, columns, len(columns[LEFT]))


def _sent(plan: QueryPlan, columns: Mapping[str, Any], rows: int, payload: Float32 | None = None) -> Float32:
    """One person's contribution, clipped."""
    (contribution,) = np.concatenate(list(contributions(plan.query, columns, np.array([0, rows]), payload)))
    return _as_float32(clip_rows(contribution[None], plan.clip)[0], plan.clip)


class _GivenUp(Exception):
    """Why a query is not answered."""


class Answerer:
    """Answers queries with one bundle; nothing of an answer is left in it but why it gave up.

    Args:
        bundle: verified.
        engine: what predicts, where a query reads scores: see `device_runtime.program.DeviceProgram`.
        clock: seconds that only go forward.

    Attributes:
        gave_up: why the last query was not answered, without anything of the person's; None: it was.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bundle, self._engine, self._clock = bundle, engine, clock
        self.gave_up: str | None = None

    def answer(self, plan: QueryPlan, payload: Float32, rows: Rows, go_on: Callable[[], bool]) -> Float32 | None:
        """What one person sends, computed as a simulation computes everybody's.

        Args:
            plan: for this bundle, whose columns its query reads.
            payload: (plan.attached,).
            rows: of the device; there may be none: then it sends zeros.
            go_on: asked before each prediction; False ends it.

        Returns:
            (plan.parameters,) of L2 norm `plan.clip` at most; None where `go_on` said stop, it took longer than plan or
            bundle allow, or the store holds values of another type than the bundle declares.

        Raises:
            BundleError: the bundle has no program that predicts, or it gives no probability.
        """
        self.gave_up = None
        seconds = min(plan.seconds, self._bundle.manifest.keeping.max_seconds)
        ends_s = self._clock() + seconds

        def check() -> None:
            if not go_on():
                raise _GivenUp("it was told to stop")
            if self._clock() >= ends_s:
                raise _GivenUp(f"it took more than {seconds:g} s")

        try:
            columns = self._columns(plan.query, rows, check)
            sent = _sent(plan, columns, len(columns[LABEL]), payload)
            check()
        except _GivenUp as why:
            self.gave_up = str(why)
            return None
        except (BadRequest, ConfigError):  # of its text nothing: it may quote a value
            self.gave_up = "the store holds other values than the bundle declares"
            return None
        return sent

    def _columns(self, query: Query, rows: Rows, check: Callable[[], None]) -> dict[str, Any]:
        """What the query reads, scores where it reads them."""
        columns: dict[str, Any] = {**rows.columns, LABEL: np.array(rows.columns[LABEL], np.float64)}  # None: NaN
        return columns | {SCORE: self._scores(rows, check)} if SCORE in query.reads else columns

    def _scores(self, rows: Rows, check: Callable[[], None]) -> Float32:
        """(n,) probabilities; NaN where the server contributed nothing to this version.

        Where devices train the server tower too they hold slots in place of embeddings, and no program that takes
        those: the score is then what was predicted when the row was served.
        """
        if slots_of(self._bundle.manifest):
            return rows.predicted
        scores = np.full(len(rows.server), np.nan, np.float32)
        known = np.flatnonzero(np.isfinite(rows.server).all(axis=1))
        if len(known):
            inputs = self._bundle.manifest.features.inputs(rows.features)
            for row in known:
                check()
                scores[row] = self._program.predict(inputs[row : row + 1], rows.server[row : row + 1])
        return scores

    @cached_property
    def _program(self) -> PredictProgram:
        return PredictProgram(self._bundle, self._engine)


def _as_float32(exact: NDArray[np.float64], clip: float) -> Float32:
    """Rounded to the nearest, or, where that would be longer than the clip, every number of it towards zero."""
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
    if np.linalg.norm(near.astype(np.float64)) <= clip:
        return near
    lower: Float32 = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    return lower
