"""State as values: a dataclass or a NamedTuple taken apart, and put together again exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

Record = TypeVar("Record")


def values_of(record: Any) -> dict[str, Any]:
    """A dataclass's or NamedTuple's values by their names, records in it alike: what `Stateful.state` may return."""
    names = getattr(record, "_fields", None) or [each.name for each in fields(record)]
    values = {name: getattr(record, name) for name in names}
    return {name: values_of(value) if _is_record(value) else value for name, value in values.items()}


def with_values(record: Record, values: Mapping[str, Any]) -> Record:
    """What `values_of` took apart, put together as `record` is: the same types in the same places.

    >>> from hybrid.privacy.mechanisms import AggregationState
    >>> state = AggregationState(round=3, size=2, clip=0.1)
    >>> with_values(replace(state, round=0, clip=1.0), values_of(state)) == state
    True
    """
    changes = {
        name: with_values(getattr(record, name), value) if _is_record(getattr(record, name)) else value
        for name, value in values.items()
    }
    if isinstance(record, tuple):
        return record._replace(**changes)  # type: ignore[attr-defined, no-any-return]
    return replace(record, **changes)  # type: ignore[type-var]


def _is_record(value: Any) -> bool:
    return (is_dataclass(value) and not isinstance(value, type)) or (
        isinstance(value, tuple) and hasattr(value, "_fields")
    )
