"""Rows of devices as columns, and the columns that a bundle's features have in the store."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.bundle import Manifest
from hybrid.errors import ConfigError

REQUEST, DEVICE = "request.", "device."
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

    def one(self, place: int) -> Rows:
        """One of them, by its place."""
        at = slice(place, place + 1)
        request, features = (
            {name: values[at] for name, values in columns.items()} for columns in (self.request, self.features)
        )
        return Rows(self.device[at], self.row[at], self.entity[at], request, features)


def feature_columns(manifest: Manifest) -> dict[str, str]:
    """Feature, as "request.NAME" or "device.NAME" -> SQLite type."""
    request = {f"{REQUEST}{name}": _TYPES[kind] for name, kind in manifest.request.items()}
    transforms = manifest.features.transforms.items()
    return request | {f"{DEVICE}{name}": _TYPES["text" if t.text else "number"] for name, t in transforms}


def quoted(feature: str) -> str:
    """A feature's column in SQL. SQLite takes "Bar" and "bar" for one name, a declaration for two."""
    return '"' + re.sub("[A-Z^]", lambda c: f"^{c[0].lower()}", feature).replace('"', '""') + '"'


def feature_of(column: str) -> str:
    """The feature of a column: the reverse of `quoted`, of its name as SQLite gives it.

    >>> feature_of(quoted("device.Bar^").strip('"'))
    'device.Bar^'
    """
    return re.sub(r"\^(.)", lambda c: c[1].upper(), column)


def values(rows: Rows, columns: Mapping[str, str]) -> list[list[Any]]:
    """Device, row, entity, then the features, each as a list of what SQLite stores.

    Args:
        rows: to be stored.
        columns: of `feature_columns`.

    Raises:
        ConfigError: columns are absent or of different lengths, or a value is of the wrong type.
    """
    given: dict[str, Sequence[Any]] = {f"{REQUEST}{name}": found for name, found in rows.request.items()}
    given |= {f"{DEVICE}{name}": found for name, found in rows.features.items()}
    if set(given) != set(columns):
        missing, extra = [n for n in columns if n not in given], [n for n in given if n not in columns]
        raise ConfigError(f"rows must have the bundle's columns; missing {missing}, not the bundle's {extra}")
    kinds = {"entity": "TEXT", **columns}
    given["entity"] = rows.entity
    uneven = {name: len(found) for name, found in given.items() if len(found) != len(rows)} | (
        {} if len(rows.row) == len(rows) else {"row": len(rows.row)}
    )
    if uneven:
        raise ConfigError(f"columns must have {len(rows)} values like 'device', got {uneven}")
    checked = [[plain(name, value, kind) for value in given[name]] for name, kind in kinds.items()]
    return [rows.device.tolist(), rows.row.tolist(), *checked]


def plain(name: str, value: Any, kind: str) -> str | float | None:
    """What SQLite stores; STRICT alone would turn the text "12" into a number.

    Raises:
        ConfigError: the value is of another type than `kind`, or cannot be stored.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str if kind == "TEXT" else int | float):
        wanted = "text" if kind == "TEXT" else "numbers"
        raise ConfigError(f"column {name!r} must hold {wanted}, got {type(value).__name__}")
    try:
        if isinstance(value, str):
            value.encode()
            return value
        return float(value)
    except (UnicodeEncodeError, OverflowError) as error:
        raise ConfigError(f"column {name!r} holds a value that cannot be stored: {type(error).__name__}") from None
