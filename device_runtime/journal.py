"""What a device remembers of how far it came: one row for each version and week, and whether it told.

Nothing is dated more finely than its week, and no row is kept for longer than it can be asked about. The words are
those of `hybrid.journal`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from device_runtime import schema
from device_runtime.encrypted import Database
from hybrid.journal import UNTRIED, Noted, Phase
from hybrid.week import at, last_week, week_of


@dataclass(frozen=True)
class Journal:
    """One device's, in its store; get it from `device_runtime.store.Store.journal`.

    Attributes:
        device: whose.
    """

    device: int
    _db: Database = field(repr=False)

    def note(self, version: int, phase: Phase, reason: str | None, now_ms: int) -> None:
        """Notes that the device came to a phase with a version this week.

        The furthest phase stays, with the latest reason; that nothing was tried takes no other reason's place.

        Args:
            version: which.
            phase: that was reached.
            reason: why no further, of `hybrid.journal.STOPS`; None for the last phase.
            now_ms: the device's time.

        Raises:
            StoreError: there is no space.
        """
        now = at(now_ms)
        with self._db.transaction():
            weeks = (self.device, week_of(now), last_week(now))
            self._db.run("DELETE FROM journal WHERE device = ? AND week NOT IN (?, ?)", weeks)
            self._db.run(
                "INSERT INTO journal VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
                "SET phases_left = excluded.phases_left, reason = excluded.reason "
                "WHERE excluded.phases_left < phases_left OR (excluded.phases_left = phases_left AND ? <> ?)",
                (self.device, week_of(now), version, phase.left, reason, reason or "", UNTRIED),
            )

    def of(self, week: str) -> Noted | None:
        """What is noted of the newest version of a week; None: nothing is."""
        sql = (
            "SELECT version, phases_left, reason FROM journal WHERE device = ? AND week = ? "
            "ORDER BY version DESC LIMIT 1"
        )
        for version, left, reason in self._db.all(sql, (self.device, week)):
            return Noted(version, Phase.with_left(left), reason)
        return None

    def due(self, week: str, drawn_ms: int) -> int | None:
        """When the device is to report about a week, in Unix milliseconds.

        Args:
            week: the last one.
            drawn_ms: for a device that was not asked about it before, which remembers it.

        Returns:
            None where it has reported about it, or about a later one.
        """
        with self._db.transaction():
            self._db.run(
                "INSERT INTO reports VALUES (?, ?, ?, 0) ON CONFLICT DO UPDATE "
                "SET week = excluded.week, due_ms = excluded.due_ms, begun = 0 WHERE excluded.week > week",
                (self.device, week, drawn_ms),
            )
            sql = "SELECT due_ms FROM reports WHERE device = ? AND week = ? AND NOT begun"
            found = self._db.all(sql, (self.device, week))
        return found[0][0] if found else None

    def begin(self, week: str) -> bool:
        """Notes that the device reports about a week; False, and nothing is noted, where it did, or is not due."""
        sql = "UPDATE reports SET begun = 1 WHERE device = ? AND week = ? AND NOT begun"
        return self._db.run(sql, (self.device, week)) == 1

    def forget(self) -> None:
        """Deletes all rows. That it reported stays: else forgetting would let a person be counted twice."""
        if schema.has(self._db, "journal"):  # the disk was too full to make it
            self._db.run("DELETE FROM journal WHERE device = ?", (self.device,))
