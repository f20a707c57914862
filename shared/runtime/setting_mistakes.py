"""What pydantic found wrong with settings, in words that say what to do. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from shared.runtime.flags import ENV_DELIMITER, ENV_PREFIX, Setting


def explained(settings: Iterable[Setting], error: ValidationError) -> str:
    """One line for all mistakes: which setting, which value, what is allowed, where to set it."""
    known = {setting.path: setting for setting in settings}
    return "; ".join(_explain_one(known, dict(mistake)) for mistake in error.errors())


def _unknown(path: tuple[str, ...], known: Mapping[tuple[str, ...], Setting]) -> str:
    name = ".".join(path)
    near = difflib.get_close_matches(name, [".".join(other) for other in known], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    variable = ENV_PREFIX + ENV_DELIMITER.join(path).upper()
    where = f"--config or {variable}"
    return f"{name} (by {where}) is not a setting of this service{hint}"


def _explain_one(known: Mapping[tuple[str, ...], Setting], mistake: Mapping[str, Any]) -> str:
    path = tuple(str(part) for part in mistake["loc"])
    setting = next((known[path[:n]] for n in range(len(path), 0, -1) if path[:n] in known), None)
    if mistake["type"] == "extra_forbidden":
        return _unknown(path, known)
    if setting is None:
        return f"{'.'.join(path) or 'settings'}: {mistake['msg'].removeprefix('Value error, ')}"
    if mistake["type"] == "missing":
        return f"{setting.flag} is required (or {setting.environment})"
    wanted = mistake["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{setting.flag} = {mistake['input']!r}: {wanted} (or {setting.environment})"
