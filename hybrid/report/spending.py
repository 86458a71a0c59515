"""How much epsilon ledgers had seen, when, and what for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from hybrid.privacy.accountant import Event, epsilon
from hybrid.privacy.ledger import Account, AnyEntry, costs

TOGETHER = "all together"
STOPS = 12  # of one purpose of one run: composing takes up to a second each

Points = Sequence[tuple[datetime, float]]


@dataclass(frozen=True)
class Spending:
    """Epsilon over time.

    Attributes:
        title: whose.
        delta: at which all of it is.
        budget: of the run; None where several runs are composed, whose budgets are their own.
        lines: purpose -> (time, epsilon after it), what each costs alone, the first point 0; `TOGETHER` is all of them
            composed, which is less than their sum.
    """

    title: str
    delta: float
    budget: float | None
    lines: dict[str, Points]


def over_time(title: str, accounts: Sequence[Account], *, delta: float, budget: float | None) -> Spending | None:
    """Composes what ledgers held at several times; None where they hold nothing.

    A release that cannot be read counts from the beginning, since nobody knows when it was made.

    Args:
        title: see `Spending`.
        accounts: of one run, or of several for a person who was in all.
        delta: of the composition.
        budget: see `Spending`.
    """
    entries = [entry for account in accounts for entry in account.entries]
    if not entries:
        return None
    purposes = list(dict.fromkeys(entry.purpose for entry in sorted(entries, key=_time)))
    begin = min(map(_time, entries))
    lines: dict[str, Points] = {}
    stops: set[datetime] = set()
    for purpose in purposes:
        own = [[entry for entry in account.entries if entry.purpose == purpose] for account in accounts]
        times = sorted({time for part in own for time in _thinned([entry.time for entry in part])})
        stops.update(times)
        lines[purpose] = [(begin, 0.0), *((time, _spent(own, time, delta)) for time in times)]
    lost = [event for account in accounts for event in account.lost]
    if len(purposes) > 1 or lost:
        every = [list(account.entries) for account in accounts]
        before = epsilon(lost, delta).epsilon
        lines[TOGETHER] = [(begin, before), *((time, _spent(every, time, delta, lost)) for time in sorted(stops))]
    return Spending(title, delta, budget, lines)


def _spent(parts: Sequence[Sequence[AnyEntry]], until: datetime, delta: float, lost: Sequence[Event] = ()) -> float:
    events = [event for part in parts for event in costs(entry for entry in part if entry.time <= until)]
    return epsilon([*lost, *events], delta).epsilon


def _thinned(times: Sequence[datetime]) -> list[datetime]:
    """Some of them, the last among them."""
    if len(times) <= STOPS:
        return list(times)
    return [times[round((place + 1) * len(times) / STOPS) - 1] for place in range(STOPS)]


def _time(entry: AnyEntry) -> datetime:
    return entry.time
