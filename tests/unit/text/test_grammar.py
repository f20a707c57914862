"""Grammars as clients write them: what is taken, and what is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import FailureKind, RequestFailed
from shared.messages.descriptor import MAX_GRAMMAR_CHARS
from shared.text import grammar


def test_what_can_be_used_is_taken() -> None:
    assert grammar.json_schema({"type": "object"}).kind == "json_schema"
    assert grammar.json_schema(True).kind == "json_schema"
    assert grammar.any_json_object().kind == "json_schema"
    assert grammar.regex("[a-z]+[0-9]{2}").text == "[a-z]+[0-9]{2}"
    assert grammar.choice(['say "yes"', "n\no", "\\"]).kind == "lark"
    assert grammar.ebnf('root ::= "a" | [0-9]+ "x"').kind == "lark"
    assert grammar.ebnf('start: "a" | B\nB: /[0-9]+/').kind == "lark"


BAD = {
    "no schema": (grammar.json_schema, [], "an object or a boolean, not list"),
    "unknown type": (grammar.json_schema, {"type": "objekt"}, "objekt"),
    "unsatisfiable": (grammar.json_schema, False, "matches nothing"),
    "outside reference": (grammar.json_schema, {"$ref": "http://example.org/x"}, "example.org"),
    "schema with a bad pattern": (grammar.json_schema, {"pattern": "(", "type": "string"}, "regex"),
    "open group": (grammar.regex, "(", "unclosed group"),
    "look-ahead": (grammar.regex, "a(?=b)", "look"),
    "open EBNF": (grammar.ebnf, 'root ::= "a" | (', "Expected"),
    "undefined rule": (grammar.ebnf, "start: nowhere", "nowhere"),
    "empty": (grammar.regex, "", "0 characters"),
    "too long": (grammar.regex, "a" * (MAX_GRAMMAR_CHARS + 1), f"limit is {MAX_GRAMMAR_CHARS}"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused_with_the_reason(name: str) -> None:
    make, value, words = BAD[name]
    make_any: Any = make
    with pytest.raises(RequestFailed, match=words) as refused:
        make_any(value)
    assert refused.value.kind is FailureKind.BAD_REQUEST
    assert len(refused.value.message) < 400
    assert "\n" not in refused.value.message
