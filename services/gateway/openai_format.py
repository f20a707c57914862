"""The ways in which a client says what the text of an answer must match.

In: `response_format` of the OpenAI API, or vLLM's `structured_outputs` and `guided_*`. Out: one
`GrammarSpec` or none, or a `Refused` that names the parameter and what is wrong with it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from services.gateway.openai_base import Schema
from services.gateway.problems import refuse
from shared.errors import RequestFailed
from shared.messages.descriptor import GrammarSpec
from shared.text import grammar

MAX_CHOICES = 1024

JsonSchema = dict[str, Any] | bool | str
"""A JSON schema, as such or as text."""
Choices = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, max_length=MAX_CHOICES)
]


class JsonSchemaFormat(Schema):
    """OpenAI's wrapper; `strict` is accepted and ignored, a schema is always followed exactly."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type json_schema, and only with it")
        return self


class StructuredOutputs(Schema):
    """vLLM's parameter; exactly one of these."""

    json_: Annotated[JsonSchema | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None


class Formats(Schema):
    """The part of a request that asks for a format."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    @property
    def asks_for_format(self) -> bool:
        """Whether the text of the answer must match anything."""
        return bool(_asked(self))


def grammar_of(formats: Formats) -> GrammarSpec | None:
    """Checks a grammar thoroughly, which may take a while: not for the event loop."""
    asked = _asked(formats)
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(name for name, _, _ in asked)
        raise refuse(f"{names} were both given, only one format can be", param=asked[1][0])
    ((param, kind, value),) = asked
    try:
        return _spec(kind, value)
    except RequestFailed as failure:
        reason = failure.message
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON: {error}"
    raise refuse(f"{param}: {reason}", param=param, code="invalid_grammar")


def _asked(formats: Formats) -> list[tuple[str, str, Any]]:
    """Parameter, kind and value of every format that is given."""
    asked: list[tuple[str, str, Any]] = []
    form = formats.response_format
    if form is not None and form.type != "text":
        schema = form.json_schema.schema_ if form.json_schema else None
        asked.append(("response_format", form.type.removeprefix("json_"), schema))
    outputs = formats.structured_outputs
    if outputs is not None:
        given = [
            ("schema", outputs.json_),
            ("object", outputs.json_object or None),
            ("regex", outputs.regex),
            ("choice", outputs.choice),
            ("grammar", outputs.grammar),
        ]
        asked += [("structured_outputs", kind, each) for kind, each in given if each is not None]
    guided = [
        ("guided_json", "schema", formats.guided_json),
        ("guided_regex", "regex", formats.guided_regex),
        ("guided_choice", "choice", formats.guided_choice),
        ("guided_grammar", "grammar", formats.guided_grammar),
    ]
    return asked + [each for each in guided if each[2] is not None]


def _spec(kind: str, value: Any) -> GrammarSpec:
    match kind:
        case "object":
            return grammar.any_json_object()
        case "schema":
            return grammar.json_schema(json.loads(value) if isinstance(value, str) else value)
        case "regex":
            return grammar.regex(value)
        case "choice":
            return grammar.choice(value)
        case _:
            return grammar.ebnf(value)
