"""The rows that a device keeps: one SQLite file, with the rows of many devices where one process stands for many.

Table `rows`: `device` and `row` (the key), `entity`, then one column per
feature, `request.NAME` as sent with a request and `device.NAME`, which stays
here: TEXT or REAL as the bundle's features want, NULL where missing.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.bundle import Manifest
from hybrid.errors import ConfigError

_TYPES = {"text": "TEXT", "number": "REAL"}


@dataclass(frozen=True)
class Rows:
    """Rows of one or more devices, columnar.

    Attributes:
        device, row: (n,) whose row it is, and which of its rows.
        entity: (n,) join keys of the server's features, as text.
        request: request feature -> (n,) str or float, None where missing.
        features: device feature -> (n,) raw values, str or float, None where missing.
    """

    device: NDArray[np.int64]
    row: NDArray[np.int64]
    entity: Sequence[str]
    request: Mapping[str, Sequence[Any]]
    features: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.device)


def write_rows(file: Path, rows: Rows, manifest: Manifest) -> None:
    """Adds rows to a store, which it makes at first use; all of them or none.

    Raises:
        ConfigError: columns are absent or of different lengths, a value is of
            the wrong type, or a (device, row) is already there.
    """
    columns = _columns(manifest)
    data = _data(rows, columns)
    try:
        with closing(sqlite3.connect(file)) as database, database:
            database.execute(_create(columns))
            _check_columns(database, file, columns)
            names, marks = ", ".join(map(_quoted, columns)), ", ".join("?" * len(columns))
            database.executemany(f"INSERT INTO rows ({names}) VALUES ({marks})", zip(*data, strict=True))  # noqa: S608
    except sqlite3.IntegrityError as error:
        # SQLite's text names the column, and never the value.
        raise ConfigError(f"store {file.name!r} refuses a row: {error}") from None
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"store {file.name!r} cannot be written: {error}") from None


def read_rows(file: Path, manifest: Manifest, *, devices: range | None = None, batch: int = 256) -> Iterator[Rows]:
    """Yields the rows of the bundle's features in batches, by device and row.

    Args:
        file: the store; read only.
        manifest: of the bundle whose features are read.
        devices: only these (step 1); None: all.
        batch: most rows at once.

    Raises:
        ConfigError: no store there, or its columns are not the bundle's.
    """
    columns = _columns(manifest)
    if not file.is_file():
        raise ConfigError(f"store {str(file)!r} does not exist")
    first, last = (devices.start, devices.stop - 1) if devices is not None else (0, 2**63 - 1)
    names = ", ".join(map(_quoted, columns))
    query = f"SELECT {names} FROM rows WHERE device BETWEEN ? AND ? ORDER BY device, row"  # noqa: S608
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            _check_columns(database, file, columns)
            cursor = database.execute(query, (first, last))
            while found := cursor.fetchmany(batch):
                yield _rows(dict(zip(columns, zip(*found, strict=True), strict=True)), manifest)
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"store {file.name!r} cannot be read: {error}") from None


def _columns(manifest: Manifest) -> dict[str, str]:
    """Column -> SQLite type, in the order of a new table."""
    request = {f"request.{name}": _TYPES[kind] for name, kind in manifest.request.items()}
    transforms = manifest.features.transforms.items()
    features = {f"device.{name}": _TYPES["text" if t.text else "number"] for name, t in transforms}
    return {"device": "INTEGER", "row": "INTEGER", "entity": "TEXT", **request, **features}


def _create(columns: Mapping[str, str]) -> str:
    listed = [f"{_quoted(n)} {t}{' NOT NULL' if n in ('device', 'row', 'entity') else ''}" for n, t in columns.items()]
    return f"CREATE TABLE IF NOT EXISTS rows ({', '.join(listed)}, PRIMARY KEY (device, row)) STRICT, WITHOUT ROWID"


def _check_columns(database: sqlite3.Connection, file: Path, columns: Mapping[str, str]) -> None:
    found = {name: kind for _, name, kind, *_ in database.execute("PRAGMA table_info(rows)")}
    missing = [name for name in columns if name not in found]
    if missing:
        raise ConfigError(f"store {file.name!r} must have columns {missing} in its table 'rows'; it has {list(found)}")
    for name, kind in columns.items():
        if found[name] != kind:
            raise ConfigError(f"store {file.name!r}: column {name!r} must be {kind}, got {found[name]}")


def _data(rows: Rows, columns: Mapping[str, str]) -> list[list[Any]]:
    given: dict[str, Any] = {"device": rows.device.tolist(), "row": rows.row.tolist(), "entity": rows.entity}
    given |= {f"request.{name}": values for name, values in rows.request.items()}
    given |= {f"device.{name}": values for name, values in rows.features.items()}
    if set(given) != set(columns):
        missing, extra = [n for n in columns if n not in given], [n for n in given if n not in columns]
        raise ConfigError(f"rows must have the bundle's columns; missing {missing}, not the bundle's {extra}")
    uneven = {name: len(given[name]) for name in columns if len(given[name]) != len(rows)}
    if uneven:
        raise ConfigError(f"columns must have {len(rows)} values like 'device', got {uneven}")
    return [[_plain(name, value, columns[name]) for value in given[name]] for name in columns]


def _plain(name: str, value: Any, kind: str) -> str | float | int | None:
    """What SQLite stores; STRICT alone would turn the text "12" into a number."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str if kind == "TEXT" else int | float):
        wanted = "text" if kind == "TEXT" else "numbers"
        raise ConfigError(f"column {name!r} must hold {wanted}, got {type(value).__name__}")
    return value


def _rows(columns: Mapping[str, Sequence[Any]], manifest: Manifest) -> Rows:
    return Rows(
        device=np.array(columns["device"], dtype=np.int64),
        row=np.array(columns["row"], dtype=np.int64),
        entity=columns["entity"],
        request={name: columns[f"request.{name}"] for name in manifest.request},
        features={name: columns[f"device.{name}"] for name in manifest.features.names},
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
