"""What a report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hybrid.analytics.results import Result
from hybrid.report.spending import Spending
from hybrid.version import TrainingRecord

Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Facts:
    """Everything that a page shows.

    Attributes:
        model: its name.
        written: when.
        only: the run that answers and spending are of; None: all.
        device, request: names of features.
        label: its column.
        label_visible_to: "server" or "device".
        release: how a device's embedding leaves it, in words.
        budget: epsilon, delta and unit, as declared.
        aliases: alias -> version.
        trainings: version -> record.
        created: version -> when it was, in UTC.
        curves: version -> its curves, of the latest ones.
        results: (run, answer), the oldest first.
        unpaid: answers that are not shown, since no ledger holds what they say they cost.
        runs: of the ledgers, as `hybrid privacy --json` has them.
        scope: what a budget covers, in words.
        composed: for a person who was in all runs; None where a ledger is not whole, or there is none.
        spending: over time, of all runs together and of each.
    """

    model: str
    written: datetime
    device: Sequence[str]
    request: Sequence[str]
    label: str
    label_visible_to: str
    release: str
    budget: tuple[float, float, str]
    only: str | None = None
    aliases: Mapping[str, int] = field(default_factory=dict)
    trainings: dict[int, TrainingRecord] = field(default_factory=dict)
    created: Mapping[int, datetime] = field(default_factory=dict)
    curves: Mapping[int, Curves] = field(default_factory=dict)
    results: Sequence[tuple[str, Result]] = ()
    unpaid: Sequence[str] = ()
    runs: Sequence[Mapping[str, Any]] = ()
    scope: str = ""
    composed: Mapping[str, Any] | None = None
    spending: Sequence[Spending] = ()

    def of(self, kind: str) -> list[tuple[str, Result]]:
        """Answers of one kind, the latest first."""
        return [(run, result) for run, result in reversed(self.results) if result.kind == kind]
