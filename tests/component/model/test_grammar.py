"""Grammars over a real vocabulary: choices follow them, in every batch and after a recovery."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from shared.errors import FailureKind, RequestFailed
from shared.messages.descriptor import (
    GrammarSpec,
    RequestDescriptor,
    SamplingParams,
    WorkerRef,
)
from shared.model.grammar import MAX_COMPILED, Grammars
from shared.model.sampler import sample
from shared.model.sampling_row import SamplingState
from shared.modelspec import ModelSpec
from shared.runtime.settings import DEMO_MODEL
from shared.text import grammar
from shared.text.tokenizer import TextTokenizer
from tests.support.json_check import conforms

SPEC = ModelSpec.load(DEMO_MODEL)
TOKENIZER = TextTokenizer.load(DEMO_MODEL)
STOP = SPEC.eos_token_ids
VOCAB = SPEC.text.vocab_size
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ages": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}
SPECS = {
    "schema": grammar.json_schema(SCHEMA),
    "regex": grammar.regex("[A-C]{2,4}-[0-9]{3}ü?"),
    "choice": grammar.choice(["red", 'say "é"', "a\nb\\"]),
    "lark": grammar.ebnf('start: "<" inner ">"\ninner: "x" | "(" inner ")"'),
    "gbnf": grammar.ebnf('root ::= ("ab" | "ba")+ "!"'),
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(DEMO_MODEL, SPEC)


def request(spec: GrammarSpec | None, emitted: tuple[int, ...] = (), **fields: Any):
    sampling = SamplingParams(
        **{"temperature": 1.0, "stop_token_ids": STOP, "max_tokens": 400, "grammar": spec} | fields
    )
    return RequestDescriptor(
        request_id="r",
        attempt=0,
        gateway=WorkerRef(name="g", incarnation=1),
        model="m",
        prompt_token_ids=(1, 2),
        emitted_token_ids=emitted,
        sampling=sampling,
        created_unix_s=0.0,
        deadline_unix_s=1.0,
    )


def state_of(grammars: Grammars, descriptor: RequestDescriptor, *newer: int) -> SamplingState:
    return SamplingState.of(descriptor, grammars.open(descriptor, *newer), *newer)


def logits_at(seed: int, index: int) -> torch.Tensor:
    """What a model might say: of one sequence and position, whatever the batch."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    logits = torch.randn(1, VOCAB, generator=generator) * 2
    logits[0, list(STOP)] += 4.0  # an answer is to end some day
    return logits


def choose(state: SamplingState, seed: int, index: int) -> int:
    (token,) = sample(logits_at(seed, index), [state.row()])
    assert token is not None
    return token.token_id


def answer(grammars: Grammars, descriptor: RequestDescriptor, seed: int) -> list[int]:
    """Generate alone, up to the stop token."""
    state, tokens = state_of(grammars, descriptor), list(descriptor.emitted_token_ids)
    for index in range(len(tokens), descriptor.sampling.max_tokens):
        token = choose(state, seed, index)
        assert state.append(token) is None
        if token in STOP:
            return tokens
        tokens.append(token)
    raise AssertionError(f"no end after {TOKENIZER.decode(tokens)!r}")


def is_right(name: str, text: str) -> bool:
    match name:
        case "schema":
            return conforms(json.loads(text), SCHEMA)
        case "regex":
            return re.fullmatch(r"[A-C]{2,4}-[0-9]{3}ü?", text) is not None
        case "choice":
            return text in ("red", 'say "é"', "a\nb\\")
        case "lark":
            return re.fullmatch(r"<\(*x\)*>", text) is not None and text.count("(") == text.count(
                ")"
            )
        case _:
            return re.fullmatch(r"(ab|ba)+!", text) is not None


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_follow_the_grammar(grammars: Grammars, name: str, temperature: float) -> None:
    texts = set()
    for seed in range(8):
        tokens = answer(grammars, request(SPECS[name], temperature=temperature, seed=seed), seed)
        texts.add(TOKENIZER.decode(tokens))
    assert all(is_right(name, text) for text in texts), texts
    assert len(texts) > 1, "the model's logits made no difference"


def test_rows_with_different_grammars_do_not_meet(grammars: Grammars) -> None:
    """A batch of all grammars, with free rows between, step by step: as each alone."""
    descriptors = [request(spec, seed=i) for i, spec in enumerate([*SPECS.values(), None])]
    states = [state_of(grammars, each) for each in descriptors]
    ended = [False] * len(states)
    together: list[list[int]] = [[] for _ in states]
    for index in range(400):
        running = [i for i, over in enumerate(ended) if not over]
        if running in ([], [len(states) - 1]):
            break
        logits = torch.cat([logits_at(i, index) for i in running])
        chosen = sample(logits, [states[i].row() for i in running])
        for i, token in zip(running, chosen, strict=True):
            assert token is not None
            states[i].append(token.token_id)
            ended[i] = token.token_id in STOP
            together[i] += [] if ended[i] else [token.token_id]
    for i, descriptor in enumerate(descriptors[:-1]):
        assert together[i] == answer(grammars, descriptor, i)


@pytest.mark.parametrize("name", SPECS)
def test_a_recovered_answer_ends_like_the_first(grammars: Grammars, name: str) -> None:
    whole = answer(grammars, request(SPECS[name], seed=3), 3)
    for num_known in range(len(whole) + 1):
        known = tuple(whole[:num_known])
        assert answer(grammars, request(SPECS[name], known, seed=3), 3) == whole


@pytest.mark.parametrize("name", SPECS)
def test_guesses_are_judged_as_plain_steps_would_choose(grammars: Grammars, name: str) -> None:
    """Right and wrong guesses in one batch; up to the first wrong one every row is exact."""
    descriptor = request(SPECS[name], seed=3)
    whole = answer(grammars, descriptor, 3)
    wrong = next(token for token in range(5, 60) if token not in whole[:3])
    drafts = (*whole[:2], wrong, wrong)
    state = state_of(grammars, descriptor)
    rows = [state.row(drafts[:n]) for n in range(len(drafts) + 1)]
    logits = torch.cat([logits_at(3, index) for index in range(len(rows))])
    found = sample(logits, rows)
    assert [each.token_id for each in found[:2] if each] == whole[:2]
    third = found[2]
    assert third is not None
    assert third.token_id == (whole[2] if len(whole) > 2 else STOP[0])
    # Judging left the state where it was.
    assert choose(state, 3, 0) == whole[0]


def test_the_grammar_wins_over_a_minimum_length(grammars: Grammars) -> None:
    tokens = answer(grammars, request(grammar.choice(["red"]), min_tokens=50), 0)
    assert TOKENIZER.decode(tokens) == "red"


def test_bias_and_penalties_choose_among_what_is_allowed(grammars: Grammars) -> None:
    red, blue = TOKENIZER.encode_text("red"), TOKENIZER.encode_text("blue")
    for wanted, word in ((red, "red"), (blue, "blue")):
        descriptor = request(
            grammar.choice(["red", "blue"]), logit_bias=tuple((t, 60.0) for t in set(wanted))
        )
        assert TOKENIZER.decode(answer(grammars, descriptor, 0)) == word


def test_a_token_against_the_grammar_is_told(grammars: Grammars) -> None:
    state = state_of(grammars, request(SPECS["regex"]))
    problem = state.append(TOKENIZER.encode_text("z")[0])
    assert problem is not None
    assert "grammar" in problem


def test_an_answer_that_does_not_follow_is_refused(grammars: Grammars) -> None:
    with pytest.raises(RequestFailed, match="does not follow") as refused:
        grammars.open(request(SPECS["regex"], tuple(TOKENIZER.encode_text("zz"))))
    assert refused.value.kind is FailureKind.BAD_REQUEST


def test_a_grammar_that_does_not_compile_is_refused(grammars: Grammars) -> None:
    with pytest.raises(RequestFailed, match="unclosed group") as refused:
        grammars.open(request(GrammarSpec(kind="regex", text="(")))
    assert refused.value.kind is FailureKind.BAD_REQUEST


def test_what_was_compiled_is_kept_up_to_a_bound(grammars: Grammars) -> None:
    few = Grammars(DEMO_MODEL, SPEC)
    for number in range(MAX_COMPILED + 5):
        few.open(request(grammar.regex(f"x{number}")))
        few.open(request(SPECS["choice"]))
    assert len(few._compiled) == MAX_COMPILED
    assert SPECS["choice"] in few._compiled
    assert grammar.regex("x0") not in few._compiled


async def test_opening_does_not_hold_up_the_event_loop(grammars: Grammars) -> None:
    assert await grammars.open_for(request(None)) is None
    assert await grammars.open_for(request(SPECS["schema"])) is not None
