"""Command line flags made from a settings class.

In: a pydantic model whose fields may be nested groups. Out: an argparse parser whose `--help` tells
for each setting what it means, its unit, limits, default and environment variable, and the flags
that were given, as a nested dict of strings for pydantic to judge. Knows nothing of environment
variables' values, files or validation.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from shared.errors import SettingsError

ENV_PREFIX = "TRIPTYCH_"
ENV_DELIMITER = "__"


def flag(name: str, metavar: str | None = None) -> dict[str, Any]:
    """What a field passes as `json_schema_extra` to be set by `--name METAVAR`."""
    return {"flag": name, "metavar": metavar}


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of a settings class: `path` is ("bus", "url"), `group` the class it sits in."""

    path: tuple[str, ...]
    field: FieldInfo
    group: type[BaseModel]
    default: Any

    @property
    def flag(self) -> str:
        """`--nats-url`; without a name of its own, the path joined by dashes."""
        return "--" + (self._extra("flag") or "-".join(self.path).replace("_", "-"))

    @property
    def environment(self) -> str:
        return ENV_PREFIX + ENV_DELIMITER.join(self.path).upper()

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal` field, else nothing."""
        kind = self.field.annotation
        return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()

    @property
    def metavar(self) -> str:
        if self.choices:
            return "|".join(self.choices)
        return self._extra("metavar") or _metavar(self.path[-1], self.field.annotation)

    @property
    def is_list(self) -> bool:
        """Whether it takes several values; in a variable these are written as JSON."""
        return get_origin(self.field.annotation) in (tuple, list, frozenset, set)

    def _extra(self, key: str) -> str | None:
        extra = self.field.json_schema_extra
        value = extra.get(key) if isinstance(extra, dict) else None
        return value if isinstance(value, str) else None


def settings_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every leaf of the settings class, top level first."""
    yield from _leaves(model, path, None)


def _leaves(
    model: type[BaseModel], path: tuple[str, ...], defaults: BaseModel | None
) -> Iterator[Setting]:
    groups = []
    for name, field in model.model_fields.items():
        default = getattr(defaults, name) if defaults is not None else _default(field)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            groups.append((field.annotation, (*path, name), default))
        else:
            yield Setting((*path, name), field, model, default)
    for group, group_path, default in groups:
        yield from _leaves(group, group_path, default)


def _default(field: FieldInfo) -> Any:
    """The default, or None where the field is required."""
    return None if field.is_required() else field.get_default(call_default_factory=True)


_UNITS = {"s": "SECONDS", "ms": "MILLISECONDS", "bytes": "BYTES", "tokens": "TOKENS"}


def _metavar(name: str, kind: Any) -> str:
    """A placeholder that tells the unit: SECONDS for `drain_s`, N for a bare number."""
    last_word = name.rpartition("_")[2]
    if get_origin(kind) in (tuple, list, frozenset, set):
        return last_word.removesuffix("s").upper()
    return _UNITS.get(last_word) or ("N" if kind in (int, float) else name.upper())


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing usage, and guesses what a typo meant."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; an unknown flag is an error that names its nearest neighbour."""
        known, unknown = self.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0], list(self._option_string_actions), n=1)
            hint = f" (did you mean {near[0]}?)" if near else " (see --help)"
            raise SettingsError(f"unknown argument {unknown[0]}{hint}")
        return known


def parser_for(model: type[BaseModel], prog: str, examples: str = "") -> Parser:
    """The parser: one flag per leaf, one help section per group, `--config FILE` on top."""
    parser = Parser(
        prog=prog,
        description=_first_paragraph(model),
        epilog=examples or None,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with settings; environment and flags win"
    )
    sections: dict[type[BaseModel], Any] = {model: parser}
    for setting in settings_of(model):
        if setting.group not in sections:
            title = _first_paragraph(setting.group).rstrip(".")
            sections[setting.group] = parser.add_argument_group(title)
        _add_flag(sections[setting.group], setting)
    return parser


def _add_flag(section: Any, setting: Setting) -> None:
    options: dict[str, Any] = {"dest": ".".join(setting.path), "help": _help(setting)}
    if setting.field.annotation is bool:
        section.add_argument(setting.flag, action=argparse.BooleanOptionalAction, **options)
        return
    if setting.is_list:
        options["nargs"] = "+"
    section.add_argument(setting.flag, metavar=setting.metavar, **options)


def _help(setting: Setting) -> str:
    """Meaning, limits, default and environment variable, with % escaped for argparse."""
    facts = [limits_of(setting.field)]
    if setting.field.is_required() and setting.default is None:
        facts.append("required")
    elif setting.default not in (None, "", ()):
        facts.append(f"default {_readable(setting)}")
    facts.append(setting.environment + (" as a JSON list" if setting.is_list else ""))
    meaning = (setting.field.description or "").rstrip(".")
    return f"{meaning} [{'; '.join(filter(None, facts))}]".replace("%", "%%")


def _readable(setting: Setting) -> str:
    """The default as a user may write it: 512MiB rather than 536870912."""
    if setting.field.annotation is ByteSize:
        return ByteSize(setting.default).human_readable().replace(".0", "")
    return str(setting.default)


def limits_of(field: FieldInfo) -> str:
    """The numeric limits in words: "1 to 65535", "above 0", or nothing."""
    low = high = ""
    for rule in field.metadata:
        match rule:
            case annotated_types.Ge(ge=bound):
                low = f"at least {bound}"
            case annotated_types.Gt(gt=bound):
                low = f"above {bound}"
            case annotated_types.Le(le=bound):
                high = f"at most {bound}"
            case annotated_types.Lt(lt=bound):
                high = f"below {bound}"
    return ", ".join(filter(None, (low, high)))


def _first_paragraph(model: type[BaseModel]) -> str:
    paragraph = (model.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(paragraph.split())


def given(namespace: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, nested by path; `--config` is left out."""
    nested: dict[str, Any] = {}
    for dest, value in vars(namespace).items():
        if dest == "config":
            continue
        *groups, name = dest.split(".")
        level = nested
        for group in groups:
            level = level.setdefault(group, {})
        level[name] = value
    return nested
