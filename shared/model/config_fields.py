"""Reading one config's fields without guessing.

In: parsed JSON. Out: values, or `UnsupportedModel` with the field, its value and what is supported.
Knows no field by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import UnsupportedModel

Config = Mapping[str, Any]


def read_bytes(path: Path) -> bytes:
    """A file that must be there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnsupportedModel(f"{path}: cannot be read ({error.strerror})") from error


def read_optional_bytes(path: Path) -> bytes:
    """A file that may be missing; empty bytes then."""
    return read_bytes(path) if path.is_file() else b""


def parse_config(raw: bytes, path: Path) -> Config:
    """A JSON object; empty bytes are an empty object."""
    try:
        parsed = json.loads(raw or b"{}")
    except ValueError as error:
        raise UnsupportedModel(f"{path}: not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise UnsupportedModel(f"{path}: a JSON object is expected, not {type(parsed).__name__}")
    return parsed


def required(config: Config, field: str) -> Any:
    """A field that must be present and not null."""
    value = config.get(field)
    if value is None:
        raise UnsupportedModel(f"config.json has no {field}, which this model type needs")
    return value


def expect(config: Config, field: str, supported: Any) -> None:
    """Refuse a field that is present with another value than the only supported one."""
    value = config.get(field, supported)
    if value is not None and value != supported:
        raise UnsupportedModel(f"{field}={value!r} is not supported; supported: {supported!r}")
