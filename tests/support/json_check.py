"""Whether a JSON value conforms to a schema, for the few keywords that the tests' schemas use."""

from __future__ import annotations

from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Raises `KeyError` for a keyword that is not known here, rather than pass it over."""
    return all(_CHECKS[keyword](value, each, schema) for keyword, each in schema.items())


def _is_object(value: dict[str, Any], properties: dict[str, Any], schema: dict[str, Any]) -> bool:
    known = all(conforms(value[name], each) for name, each in properties.items() if name in value)
    return known and (schema.get("additionalProperties", True) or set(value) <= set(properties))


_CHECKS: dict[str, Any] = {
    "type": lambda value, name, _: (
        isinstance(value, _TYPES[name]) and (name == "boolean") == isinstance(value, bool)
    ),
    "enum": lambda value, options, _: value in options,
    "properties": _is_object,
    "required": lambda value, names, _: set(names) <= set(value),
    "additionalProperties": lambda value, allowed, schema: True,
    "items": lambda value, each, _: all(conforms(item, each) for item in value),
    "minItems": lambda value, least, _: len(value) >= least,
    "maxItems": lambda value, most, _: len(value) <= most,
    "maxLength": lambda value, most, _: len(value) <= most,
}
