"""What `values.schema.json` and `values.yaml` owe each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jsonschema_rs

Schema = Mapping[str, Any]


def disagreements(values: Mapping[str, Any], schema: Schema) -> list[str]:
    """What one of the two has and the other lacks, and where the schema takes what it does not know.

    A value may lack properties of the schema where it is empty, an override, and
    those that it shares with others through a definition in `$defs`: options that
    many have and nearly nobody sets. A property that is `deprecated` or
    `{"not": {}}` is one that was renamed: it is in the schema to name the new one,
    and not in the values.
    """
    wrong = [f"{path}: {what}" for path, what in _unlike(values, schema, schema, "")]
    wrong += [f"{path}: {what}" for path, what in _open(schema, "#")]
    for error in jsonschema_rs.validator_for(dict(schema)).iter_errors(dict(values)):
        wrong.append(
            f"{'.'.join(map(str, error.instance_path)) or 'the values'}: the default is refused: {error.message}"
        )
    return wrong


def unset(values: Mapping[str, Any], given: Sequence[Mapping[str, Any]], path: str = "") -> list[str]:
    """Paths of values that none of several files of values sets."""
    missing = []
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        found = [each[key] for each in given if key in each]
        if not found:
            missing.append(here)
        elif isinstance(value, dict) and value:
            missing += unset(value, [each for each in found if isinstance(each, dict)], here)
    return missing


def _unlike(value: Any, schema: Any, root: Schema, path: str) -> Iterator[tuple[str, str]]:
    properties = _properties(schema, root)
    if not isinstance(value, Mapping) or not properties:
        return
    for key in sorted(value.keys() | (_own(schema) if value else set())):
        here = f"{path}.{key}" if path else key
        if key not in properties:
            if _resolve(schema, root).get("additionalProperties", False) is False:
                yield here, "values.yaml has it, the schema does not"
        elif _is_renamed(properties[key], root):
            if key in value:
                yield here, "it was renamed, so values.yaml must not have it"
        elif key not in value:
            yield here, "the schema has it, values.yaml does not: give it its default and a comment"
        else:
            yield from _unlike(value[key], properties[key], root, here)


def _own(schema: Schema) -> set[str]:
    """Properties declared in place, no reference to one of a shared definition, nor `global`, which is Helm's own."""
    properties = schema.get("properties") or {}
    return {key for key, each in properties.items() if "/properties/" not in _reference(each)} - {"global"}


def _reference(schema: Any) -> str:
    return str(schema.get("$ref", "")) if isinstance(schema, Mapping) else ""


def _open(schema: Any, path: str, *, whole: bool = True) -> Iterator[tuple[str, str]]:
    """Subschemas of objects that do not say what they do with unknown keys.

    `whole` is False inside of conditions, which look at some keys and leave the rest to others.
    """
    if not isinstance(schema, Mapping):
        return
    says = schema.keys() & {"additionalProperties", "unevaluatedProperties", "$ref"}
    is_object = "object" in _types(schema) or (whole and "properties" in schema)
    if is_object and not says:
        yield path, "an object must say additionalProperties: false, or true where anything is passed on"
    elif whole and "properties" in schema and schema.get("additionalProperties") is True:
        yield path, "additionalProperties must be false, or a schema, beside properties"
    for key in ("properties", "$defs", "definitions", "patternProperties"):
        for name, each in (schema.get(key) or {}).items():
            yield from _open(each, f"{path}/{key}/{name}", whole=whole)
    for key in ("items", "additionalProperties"):
        yield from _open(schema.get(key), f"{path}/{key}", whole=whole)
    for key in ("allOf", "anyOf", "oneOf"):
        for index, each in enumerate(schema.get(key) or []):
            yield from _open(each, f"{path}/{key}/{index}", whole=False)
    for key in ("if", "then", "else", "not"):
        yield from _open(schema.get(key), f"{path}/{key}", whole=False)


def _properties(schema: Any, root: Schema) -> dict[str, Any]:
    """The properties of a schema, of what it refers to, and of every alternative and part of it."""
    if not isinstance(schema, Mapping):
        return {}
    found: dict[str, Any] = {}
    for key in ("allOf", "anyOf", "oneOf"):
        for each in schema.get(key) or []:
            found.update(_properties(each, root))
    if "$ref" in schema:
        found.update(_properties(_resolve(schema, root), root))
    return {**found, **(schema.get("properties") or {})}


def _resolve(schema: Any, root: Schema) -> Schema:
    while isinstance(schema, Mapping) and "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target[part]
        schema = target
    return schema if isinstance(schema, Mapping) else {}


def _is_renamed(schema: Any, root: Schema) -> bool:
    if not isinstance(schema, Mapping):
        return schema is False
    return (
        bool(schema.get("deprecated"))
        or schema.get("not") in ({}, True)
        or ("$ref" in schema and _is_renamed(_resolve(schema, root), root))
    )


def _types(schema: Schema) -> set[str]:
    types = schema.get("type", [])
    return {types} if isinstance(types, str) else set(types)
