"""Formats, logprobs, several answers and stop strings, from HTTP through all stages and back."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from services.gateway.app import make_app
from services.gateway.gateway import open_gateway
from services.gateway.model import ServedModel
from services.gateway.settings import GatewaySettings
from services.local_engine import LocalEngine
from shared.messages.control import Role
from shared.messages.descriptor import (
    GrammarSpec,
    RequestDescriptor,
    SamplingParams,
    WorkerRef,
)
from shared.messages.events import TokenEvent
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from shared.runtime.settings import DEMO_MODEL
from shared.text import grammar
from tests.support.json_check import conforms
from tests.support.stages import GATEWAY, MODEL, Pipeline, running_pipeline

FOLDER = ModelFolder(DEMO_MODEL, ModelSpec.load(DEMO_MODEL), "float32", "cpu")
ME = WorkerRef(name="http-gateway", incarnation=1)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "ages": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 1, "maxItems": 3},
        "is_red": {"type": "boolean"},
    },
    "required": ["name", "ages", "is_red"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "What is the number?"}]


class AllServed:
    """What the gateway asks of the directory: every stage is there."""

    def is_served(self, role: Role) -> bool:
        return True

    def is_gone(self, worker: WorkerRef) -> bool:
        return False


class System:
    def __init__(self, pipeline: Pipeline, client: httpx.AsyncClient) -> None:
        self.pipeline, self.client = pipeline, client

    async def post(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": QUESTION, "max_tokens": 200, **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def choices(self, **fields: Any) -> list[dict[str, Any]]:
        response = await self.post(**fields)
        assert response.status_code == 200, response.text
        choices: list[dict[str, Any]] = response.json()["choices"]
        return choices

    async def text(self, **fields: Any) -> str:
        (choice,) = await self.choices(**fields)
        assert choice["finish_reason"] == "stop"
        text: str = choice["message"]["content"]
        return text


@asynccontextmanager
async def running() -> AsyncIterator[System]:
    model = ServedModel.load(MODEL, DEMO_MODEL)
    async with running_pipeline(FOLDER) as pipeline:
        settings = GatewaySettings()
        async with open_gateway(settings, model, pipeline.bus, AllServed(), ME) as parts:
            transport = httpx.ASGITransport(make_app(parts), raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://gateway", timeout=60.0
            ) as client:
                yield System(pipeline, client)
        await pipeline.settled()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_answers_have_the_format_that_was_asked_for(temperature: float) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    ebnf = 'root ::= "(" [0-9] ("," [0-9])? ")"'
    formats: list[dict[str, Any]] = [
        {"response_format": wanted},
        {"guided_regex": "[A-C]{3}-[0-9]{2,4}"},
        {"structured_outputs": {"choice": ["rot", "grün"]}},
        {"structured_outputs": {"grammar": ebnf}},
    ]
    async with running() as system:
        for seed in range(2):
            common = {"temperature": temperature, "seed": seed}
            # All at once: rows with different grammars share their steps.
            texts = await asyncio.gather(*(system.text(**each, **common) for each in formats))
            assert conforms(json.loads(texts[0]), SCHEMA), texts[0]
            assert re.fullmatch("[A-C]{3}-[0-9]{2,4}", texts[1]), texts[1]
            assert texts[2] in ("rot", "grün")
            assert re.fullmatch(r"\([0-9](,[0-9])?\)", texts[3]), texts[3]


async def test_logprobs_agree_with_themselves() -> None:
    async with running() as system:
        (choice,) = await system.choices(
            temperature=0, logprobs=True, top_logprobs=5, max_tokens=20, ignore_eos=True
        )
        entries = choice["logprobs"]["content"]
        assert len(entries) == 20
        for entry in entries:
            values = [each["logprob"] for each in entry["top_logprobs"]]
            assert values == sorted(values, reverse=True)
            # Greedy: the chosen token is the likeliest, and together they are at most certain.
            assert entry["logprob"] == values[0]
            assert entry["bytes"] == entry["top_logprobs"][0]["bytes"]
            assert sum(map(math.exp, values)) <= 1 + 1e-9
        # Telling them changes nothing.
        (plain,) = await system.choices(temperature=0, max_tokens=20, ignore_eos=True)
        assert plain["message"] == choice["message"]


async def test_three_answers_are_those_of_their_own_seeds() -> None:
    fields = {"temperature": 2.0, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    async with running() as system:
        response = await system.post(n=3, return_token_ids=True, **fields)
        again = await system.choices(n=3, return_token_ids=True, **fields)
        (alone,) = await system.choices(return_token_ids=True, **fields)
    choices = response.json()["choices"]
    ids = [choice["token_ids"] for choice in choices]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 3
    assert ids == [choice["token_ids"] for choice in again]
    assert ids[0] == alone["token_ids"]
    assert len({tuple(each) for each in ids}) == 3
    assert response.json()["usage"]["completion_tokens"] == 36


async def test_a_stop_string_over_token_borders() -> None:
    async with running() as system:
        whole = await system.text(guided_regex="abc ABC cba", temperature=0)
        cut = await system.text(guided_regex="abc ABC cba", temperature=0, stop=["C cb", "zz"])
    assert (whole, cut) == ("abc ABC cba", "abc AB")


async def test_a_bad_grammar_is_refused() -> None:
    async with running() as system:
        response = await system.post(guided_regex="(")
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "guided_regex"


def request(
    name: str, sampling: SamplingParams, emitted: tuple[int, ...] = ()
) -> RequestDescriptor:
    return RequestDescriptor(
        request_id=name,
        attempt=0,
        gateway=GATEWAY,
        model=MODEL,
        prompt_token_ids=(10, 20, 30, 20, 40, 50),
        emitted_token_ids=emitted,
        sampling=sampling,
        created_unix_s=0.0,
        deadline_unix_s=2.0**40,
    )


STOP = FOLDER.spec.eos_token_ids
ALL = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.7,
    "logit_bias": ((70, 3.0), (71, -100.0)),
    "num_logprobs": 5,
    "max_tokens": 24,
}
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0, **ALL),
    "drawn": SamplingParams(temperature=1.5, top_p=0.9, min_p=0.01, seed=3, **ALL),
    "minimum": SamplingParams(temperature=1.5, min_tokens=20, stop_token_ids=STOP, seed=4, **ALL),
    "schema": SamplingParams(
        grammar=grammar.json_schema(SCHEMA), stop_token_ids=STOP, seed=5, **(ALL | {"top_k": 9})
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
async def test_the_pipeline_agrees_with_one_process_also_after_a_recovery(name: str) -> None:
    """Tokens equal, logprobs equal to rounding, wherever the first attempt broke off."""
    sampling = SETTINGS[name]
    engine = LocalEngine(FOLDER)
    expected = list(engine.generate(request("local", sampling), []))
    assert len(expected) > 3
    async with running_pipeline(FOLDER) as pipeline:
        known_counts = [0, 1, len(expected) // 2, len(expected) - 1]
        for count in known_counts:
            known = tuple(expected[:count])
            await pipeline.submit(request(f"r{count}", sampling, known), [])
        whole: list[TokenEvent] = []
        for count in known_counts:
            events = await pipeline.end_of(f"r{count}")
            tokens = [event for event in events if isinstance(event, TokenEvent)]
            assert [event.index for event in tokens] == list(range(count, len(expected)))
            assert [event.token_id for event in tokens] == expected[count:]
            whole = whole or tokens
            for event in tokens:
                assert_close(event, whole[event.index])
        await pipeline.settled()


def assert_close(event: TokenEvent, other: TokenEvent) -> None:
    assert event.logprobs is not None
    assert other.logprobs is not None
    assert event.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
    values = [value for _, value in event.logprobs.top]
    assert values == pytest.approx([value for _, value in other.logprobs.top], abs=1e-4)


async def test_a_grammar_that_only_a_worker_can_refuse_ends_in_one_typed_failure() -> None:
    """The gateway would have refused it; what a worker gets all the same is refused by name."""
    bad = SamplingParams(grammar=GrammarSpec(kind="regex", text="("), stop_token_ids=STOP)
    async with running_pipeline(FOLDER) as pipeline:
        await pipeline.submit(request("bad", bad), [])
        (event,) = await pipeline.end_of("bad")
        assert event.type == "failed"
        assert (event.kind.value, event.retryable) == ("bad_request", False)
        await pipeline.settled()
