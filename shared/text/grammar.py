"""Grammars that an answer must match: checked here, compiled by `shared.model.grammar`.

In: what a client wrote (a JSON schema, a regular expression, choices, a grammar as EBNF). Out: a
`GrammarSpec`, or a `RequestFailed` (bad request) that says what is wrong with it. Needs no model,
no tokenizer and no torch, so a gateway refuses a bad grammar before any worker hears of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import llguidance
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from shared.errors import FailureKind, RequestFailed
from shared.messages.descriptor import MAX_GRAMMAR_CHARS, GrammarSpec

LIMITS = llguidance.LLParserLimits(verbose_errors=False)
"""The library's own bounds on the size of a grammar and on the work of one step."""

# Blanks between JSON's tokens, enough to indent. Were they unbounded, a model that once prefers
# them would write nothing else up to its token limit.
JSON_BLANKS = r"\n? {0,16}"

MAX_REASON_CHARS = 300


def json_schema(schema: object) -> GrammarSpec:
    """JSON that the schema accepts."""
    if schema is False:
        raise _refused("a JSON schema of false matches nothing")
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise _refused(f"a JSON schema is an object or a boolean, not {type(schema).__name__}")
    return _checked("json_schema", json.dumps(schema, ensure_ascii=False))


def any_json_object() -> GrammarSpec:
    """Any JSON object."""
    return _checked("json_schema", '{"type": "object"}')


def regex(pattern: str) -> GrammarSpec:
    """Text that the regular expression matches as a whole."""
    return _checked("regex", pattern)


def choice(choices: Sequence[str]) -> GrammarSpec:
    """One of these texts."""
    alternatives = " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)
    return _checked("lark", f"start: {alternatives}")


def ebnf(grammar: str) -> GrammarSpec:
    """Text of a grammar in GBNF (`root ::= ...`) or Lark's notation (`start: ...`)."""
    try:
        lark = any_to_lark(grammar)
    except (GbnfToLarkError, RecursionError) as error:
        raise _refused(f"the grammar cannot be read: {error}") from error
    return _checked("lark", lark)


def source(spec: GrammarSpec) -> str:
    """The grammar as the library takes it. Raises `RequestFailed` (bad request)."""
    match spec.kind:
        case "json_schema":
            try:
                return llguidance.LLMatcher.grammar_from_json_schema(
                    spec.text, overrides={"whitespace_pattern": JSON_BLANKS}
                )
            except ValueError as error:
                raise _refused(f"the JSON schema cannot be read: {error}") from error
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(spec.text)
        case "lark":
            return llguidance.LLMatcher.grammar_from_lark(spec.text)


def _checked(kind: str, text: str) -> GrammarSpec:
    if not 0 < len(text) <= MAX_GRAMMAR_CHARS:
        raise _refused(f"the grammar has {len(text)} characters, the limit is {MAX_GRAMMAR_CHARS}")
    spec = GrammarSpec.model_validate({"kind": kind, "text": text})
    is_wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
        source(spec), limits=LIMITS
    )
    if is_wrong:
        raise _refused(f"the grammar cannot be used: {messages[0]}")
    return spec


def _refused(reason: str) -> RequestFailed:
    return RequestFailed(FailureKind.BAD_REQUEST, " ".join(reason[:MAX_REASON_CHARS].split()))
