"""ISO weeks, in UTC: the time over which budgets and journals count."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import Field

Week = Annotated[str, Field(pattern=r"^\d{4}-W(0[1-9]|[1-4]\d|5[0-3])$")]
"""Such as "2026-W53"; weeks sort as texts do."""
WEEK_S = 7 * 86_400.0


def week_of(now: datetime) -> str:
    """The ISO week.

    >>> week_of(datetime(2027, 1, 3, tzinfo=UTC))
    '2026-W53'
    """
    year, week, _ = now.isocalendar()
    return f"{year}-W{week:02d}"


def last_week(now: datetime) -> str:
    """The last one that is over.

    >>> last_week(datetime(2027, 1, 4, tzinfo=UTC))
    '2026-W53'
    """
    return week_of(now - timedelta(days=7))


def begin_of(now: datetime) -> datetime:
    """When the week of a time in UTC began.

    >>> begin_of(datetime(2027, 1, 3, 12, tzinfo=UTC)).isoformat()
    '2026-12-28T00:00:00+00:00'
    """
    return now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=now.weekday())


def at(ms: int) -> datetime:
    """The time in UTC of Unix milliseconds; of a clock that is far off, the nearest that a calendar has."""
    return datetime.fromtimestamp(min(max(ms / 1000, 0.0), 2.5e11), UTC)
