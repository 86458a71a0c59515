"""The tables of a device's store, and how they follow the bundle's features."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from device_runtime.encrypted import FORMAT, Database
from device_runtime.rows import DEVICE, REQUEST, feature_columns, feature_of, quoted
from hybrid.bundle import Manifest
from hybrid.errors import StoreError

EVENT = (
    *("id", "device", "row", "at_ms", "entity"),
    *("version", "server", "feature_age_ms", "prediction", "label", "label_ms"),
)  # the columns of an event beside its features
_TURNS = """CREATE TABLE turns (
    device INTEGER NOT NULL, training TEXT NOT NULL, next_step INTEGER NOT NULL, PRIMARY KEY (device, training)
) STRICT, WITHOUT ROWID"""
_HELD = """CREATE TABLE tokens (
    device INTEGER NOT NULL, scope TEXT NOT NULL, number INTEGER NOT NULL, asked BLOB NOT NULL,
    expires_ms INTEGER NOT NULL, token BLOB, PRIMARY KEY (device, scope)
) STRICT"""
_JOURNAL = """CREATE TABLE journal (
    device INTEGER NOT NULL, week TEXT NOT NULL, version INTEGER NOT NULL, phases_left INTEGER NOT NULL, reason TEXT,
    PRIMARY KEY (device, week, version)
) STRICT, WITHOUT ROWID"""
_REPORTS = """CREATE TABLE reports (
    device INTEGER PRIMARY KEY, week TEXT NOT NULL, due_ms INTEGER NOT NULL, begun INTEGER NOT NULL
) STRICT"""
_ADDED = {"turns": _TURNS, "tokens": _HELD, "journal": _JOURNAL, "reports": _REPORTS}  # since the first release
_COLUMNS = {
    "version": "INTEGER NOT NULL DEFAULT 0",
    "policy": "TEXT NOT NULL DEFAULT '{}'",  # of an update that waited before it kept its plan's: the strictest
    "reports": "INTEGER NOT NULL DEFAULT 0",
}  # the same, of updates that wait
_TABLES = f"""
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    device INTEGER NOT NULL, row INTEGER NOT NULL, at_ms INTEGER NOT NULL, entity TEXT NOT NULL,
    version INTEGER, server BLOB, feature_age_ms INTEGER, prediction REAL,
    label INTEGER, label_ms INTEGER,
    UNIQUE (device, row)
) STRICT;
CREATE INDEX events_by_age ON events (at_ms);
CREATE INDEX events_of_device ON events (device, at_ms);
CREATE TABLE versions (version INTEGER PRIMARY KEY, definition TEXT NOT NULL) STRICT;
CREATE TABLE participations (
    device INTEGER NOT NULL, plan TEXT NOT NULL, at_ms INTEGER NOT NULL, took_part INTEGER NOT NULL,
    PRIMARY KEY (device, plan)
) STRICT, WITHOUT ROWID;
CREATE TABLE uploads (
    device INTEGER NOT NULL, plan TEXT NOT NULL, upload TEXT NOT NULL, body BLOB NOT NULL, expires_ms INTEGER NOT NULL,
    PRIMARY KEY (device, plan)
) STRICT;
CREATE TABLE halted (
    model TEXT NOT NULL, version INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (model, version)
) STRICT, WITHOUT ROWID;
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
PRAGMA user_version = {FORMAT}
"""
_EXISTS = "SELECT 1 FROM sqlite_master WHERE name = 'events'"


def prepare(database: Database, manifest: Manifest, name: str) -> None:
    """Makes the tables, or brings them to the bundle's features, in one transaction.

    Raises:
        StoreError: it is another model's store, or there is no space. Nothing is changed.
    """
    if not database.all(_EXISTS):
        with database.transaction():
            _make(database, manifest)
    (model,) = database.one("SELECT value FROM about WHERE name = 'model'")
    if model != manifest.model:
        raise StoreError(f"store {name!r} must be of model {manifest.model!r}, it is of {model!r}")
    _note_version(database, manifest)
    complete(database)
    if columns(database) != feature_columns(manifest):
        with database.transaction():
            _migrate(database, feature_columns(manifest))
    rewrite(database)


def complete(database: Database) -> None:
    """Adds the tables and columns that came after the first release.

    Raises:
        StoreError: there is no space for them.
    """
    if not _lacking(database) and all(has(database, table) for table in _ADDED):
        return
    with database.transaction():
        for table in _ADDED.values():
            database.all(table.replace("TABLE", "TABLE IF NOT EXISTS"))
        for name in _lacking(database):  # another process may have added some since
            database.all(f"ALTER TABLE uploads ADD COLUMN {name} {_COLUMNS[name]}")


def _lacking(database: Database) -> list[str]:
    """Columns of updates that wait."""
    here = {name for (name,) in database.all("SELECT name FROM pragma_table_info('uploads')")}
    return [name for name in _COLUMNS if name not in here]


def columns(database: Database) -> dict[str, str]:
    """The features that the store has, as `feature_columns` gives them; none where it has no tables."""
    found = database.all("SELECT name, type FROM pragma_table_info('events')")
    return {feature_of(name): kind for name, kind in found if name.startswith((REQUEST, DEVICE))}


def has(database: Database, table: str) -> bool:
    """Whether it is of a release that knows a table."""
    return bool(database.all("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)))


def rewrite(database: Database) -> None:
    """Overwrites the copies that deleting left, if that is due; without space or a turn for it, it stays due."""
    with suppress(StoreError):
        if database.all("SELECT 1 FROM about WHERE name = 'rewrite'"):
            database.rewrite()
            database.run("DELETE FROM about WHERE name = 'rewrite'")


def rewrite_later(database: Database) -> None:
    """Makes it due."""
    database.run("INSERT OR REPLACE INTO about VALUES ('rewrite', 'due')")


def _make(database: Database, manifest: Manifest) -> None:
    if database.all(_EXISTS):
        return  # by another process, since we looked
    for statement in _TABLES.split(";\n"):
        database.all(statement)
    for feature, kind in feature_columns(manifest).items():
        database.all(f"ALTER TABLE events ADD COLUMN {quoted(feature)} {kind}")
    database.run("INSERT INTO about VALUES ('model', ?)", (manifest.model,))


def _note_version(database: Database, manifest: Manifest) -> None:
    """Remembers the definition of each version that was here; a number that came back for another loses its past."""
    version, definition = manifest.version, manifest.definition_hash
    known = database.all("SELECT definition FROM versions WHERE version = ?", (version,))
    if known == [(definition,)]:
        return
    with database.transaction():
        database.run("INSERT OR REPLACE INTO versions VALUES (?, ?)", (version, definition))
        if known:
            database.run("UPDATE events SET server = NULL WHERE version = ?", (version,))


def _migrate(database: Database, wanted: Mapping[str, str]) -> None:
    has = columns(database)
    gone = [feature for feature, kind in has.items() if wanted.get(feature) != kind]
    for feature in gone:
        database.all(f"ALTER TABLE events DROP COLUMN {quoted(feature)}")
    for feature, kind in wanted.items():
        if has.get(feature) != kind:
            database.all(f"ALTER TABLE events ADD COLUMN {quoted(feature)} {kind}")
    if gone:
        rewrite_later(database)
