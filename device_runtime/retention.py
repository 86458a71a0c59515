"""What goes from a device's store: too old, too much, or forgotten; also where the disk is full."""

from __future__ import annotations

import math
from collections.abc import Sequence

from device_runtime.encrypted import PAGE, Database, Full
from hybrid.bundle import Keeping

HELD = 0.9  # share of `Keeping.bytes` that is left once they are passed, so that not every event deletes another
PART = 256  # events that are deleted at once where the disk is full


def enforce(database: Database, keeping: Keeping, now_ms: int) -> int:
    """Deletes what is too old, expired or too much, oldest first; returns how many events. Cheap where nothing is."""
    age_ms = int(keeping.seconds * 1000)
    outside, old = (now_ms - age_ms, now_ms + age_ms), "at_ms < ? OR at_ms > ?"
    gone = 0
    if database.all(f"SELECT 1 FROM events WHERE {old} LIMIT 1", outside):  # noqa: S608
        gone += delete_events(database, old, outside)
    if database.all("SELECT 1 FROM uploads WHERE expires_ms < ? LIMIT 1", (now_ms,)):
        with database.transaction():
            database.run("DELETE FROM uploads WHERE expires_ms < ?", (now_ms,))
            database.shrink()
    if _used(database) > keeping.bytes:
        gone += _delete_oldest(database, int(keeping.bytes * HELD))
    return gone


def delete_events(database: Database, condition: str, given: Sequence[object]) -> int:
    """Deletes events at once; where the disk is full, part by part, with the space that is reserved for this.

    Within a transaction there is one way only, since it cannot go on after an error.

    Raises:
        Full: even that space is not enough.
    """
    try:
        with database.transaction():
            gone = database.run(f"DELETE FROM events WHERE {condition}", given)  # noqa: S608
            database.shrink()
            return gone
    except Full:
        if database.in_transaction:
            raise
    with database.reserve():
        return _delete_in_parts(database, condition, given)


def _delete_in_parts(database: Database, condition: str, given: Sequence[object]) -> int:
    gone, part = 0, PART
    sql = f"DELETE FROM events WHERE id IN (SELECT id FROM events WHERE {condition} LIMIT ?)"  # noqa: S608
    while True:
        try:
            with database.transaction():
                found = database.run(sql, (*given, part))
                database.shrink()
        except Full:
            if part == 1:
                raise
            part //= 4
            continue
        gone += found
        if found < part:
            return gone


def _used(database: Database) -> int:
    """Bytes of the file, without those of updates that wait: a large one would cost all examples."""
    (updates,) = database.one("SELECT coalesce(sum(length(body)), 0) FROM uploads")
    return database.used * PAGE - int(updates)


def _delete_oldest(database: Database, most: int) -> int:
    """Deletes the oldest events until at most so many bytes are used, or no event is left."""
    gone = 0
    oldest = "SELECT id FROM events ORDER BY at_ms, id LIMIT ?"
    with database.transaction():
        while (used := _used(database)) > most:
            (events,) = database.one("SELECT count(*) FROM events")
            if not events:
                break
            part = math.ceil(events * (used - most) / used)
            gone += database.run(f"DELETE FROM events WHERE id IN ({oldest})", (part,))  # noqa: S608
        database.shrink()
    return gone
