"""The chat template of a model: messages to the text that the model was trained on.

In: a model folder and messages as plain JSON values. Out: text. Templates come from model folders
and are not trusted: they run in jinja2's immutable sandbox and see plain data only. The helpers and
switches are those that templates on the hub are written against.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import FailureKind, RequestFailed, UnsupportedModel

Json = Mapping[str, Any]
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class ChatTemplate:
    """One compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise UnsupportedModel(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate:
        """Read chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
        config = _read_json(model_dir / "tokenizer_config.json")
        return cls(_find_source(model_dir, config), _special_tokens(config))

    def render(self, messages: Sequence[Json], *, add_generation_prompt: bool = True) -> str:
        """Raises `RequestFailed` (bad request) with the template's own words if it objects."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        # A template written for other messages fails in Python's ways too (a missing key, say).
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestFailed(
                FailureKind.BAD_REQUEST, f"the model's chat template refused the messages: {error}"
            ) from error


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here it is transparent."""

    # jinja2 declares this per instance, so ClassVar would contradict it.
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _find_source(model_dir: Path, config: Json) -> str:
    jinja = model_dir / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    found = _read_json(model_dir / "chat_template.json").get("chat_template")
    found = found if found is not None else config.get("chat_template")
    if isinstance(found, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    if not isinstance(found, str):
        raise UnsupportedModel(
            f"{model_dir}: no chat template in chat_template.jinja, chat_template.json or "
            "tokenizer_config.json"
        )
    return found


def _special_tokens(config: Json) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _read_json(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path}: not valid JSON ({error})") from error
    return parsed if isinstance(parsed, dict) else {}
