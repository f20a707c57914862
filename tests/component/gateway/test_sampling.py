"""The way of sampling parameters, formats, choices and logprobs through the gateway."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pytest

from shared.errors import FailureKind
from shared.messages.events import TokenLogprobs
from shared.model.randomness import derived_seed

from .conftest import MODEL, picture_url, question, says, token, with_pictures

ANSWERS = {"": "three cats", "1": "four 🐈 dogs", "2": "a b c"}


def number_of(request) -> str:
    """Which of a request's answers this is: empty for the first."""
    return request.request_id.partition("-")[2]


async def each_its_own(workers, request) -> None:
    await says(ANSWERS[number_of(request)])(workers, request)


async def with_logprobs(workers, request) -> None:
    """Every token is told with itself and the token before it in the vocabulary."""
    ids = workers.model.tokenizer.encode_text(ANSWERS["1"])
    for index, token_id in enumerate(ids):
        top = ((token_id, -0.5), (token_id - 1, -1.5))
        logprobs = TokenLogprobs(logprob=-0.5, top=top)
        event = token(request, index, token_id).model_copy(update={"logprobs": logprobs})
        await workers.send(request, event)
    await workers.finish(request, len(ids))


def chunks_of(response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_every_parameter_reaches_the_workers(start):
    async with start() as system:
        response = await system.post(
            min_p=0.1,
            presence_penalty=-1,
            frequency_penalty=0.5,
            repetition_penalty=1.2,
            logit_bias={"7": -100, "8": 2.5},
            min_tokens=2,
            logprobs=True,
            top_logprobs=4,
            priority=-5,
        )
        assert response.status_code == 200
        await system.post()
        (given, default) = system.workers.requests
    sampling = given.sampling
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -1, 0.5)
    assert (sampling.repetition_penalty, sampling.min_tokens) == (1.2, 2)
    assert sampling.logit_bias == ((7, -100.0), (8, 2.5))
    assert (sampling.num_logprobs, given.priority) == (4, -5)
    sampling = default.sampling
    assert (sampling.repetition_penalty, sampling.min_p, sampling.logit_bias) == (1.0, 0.0, ())
    assert (sampling.num_logprobs, sampling.grammar, default.priority) == (None, None, 0)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMATS = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, "json_schema"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        "json_schema",
    ),
    ({"structured_outputs": {"json": SCHEMA}}, "json_schema"),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema"),
    ({"structured_outputs": {"json_object": True}}, "json_schema"),
    ({"structured_outputs": {"regex": "[ab]+"}}, "regex"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "lark"),
    ({"structured_outputs": {"grammar": 'root ::= "a"+'}}, "lark"),
    ({"structured_outputs": {}}, None),
    ({"guided_json": SCHEMA}, "json_schema"),
    ({"guided_regex": "[ab]+"}, "regex"),
    ({"guided_choice": ["yes", "no"]}, "lark"),
    ({"guided_grammar": 'start: "a"+'}, "lark"),
]


@pytest.mark.parametrize(("fields", "kind"), FORMATS, ids=[str(f[0])[:60] for f in FORMATS])
async def test_formats_travel_as_one_small_spec(start, fields, kind):
    async with start() as system:
        response = await system.post(**fields)
        assert response.status_code == 200, response.text
        spec = system.workers.requests[0].sampling.grammar
    assert (spec and spec.kind) == kind
    if spec is not None and kind == "json_schema" and "json_object" not in str(fields):
        assert json.loads(spec.text) == SCHEMA


async def test_a_worker_that_refuses_a_grammar_is_the_clients_400(start):
    async def refuse(workers, request):
        await workers.fail(request, FailureKind.BAD_REQUEST, retryable=False)

    async with start(refuse) as system:
        response = await system.post(guided_regex="[ab]+")
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "the worker's own words"
        assert len(system.workers.requests) == 1


async def test_several_answers_are_requests_of_their_own(start):
    async with start(each_its_own) as system:
        response = await system.post(n=3, seed=11, return_token_ids=True)
        await system.settle()
        requests, cancelled = system.workers.requests, system.workers.cancelled
    body = response.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts == list(ANSWERS.values())
    assert {choice["finish_reason"] for choice in body["choices"]} == {"stop"}
    num_tokens = [len(choice["token_ids"]) for choice in body["choices"]]
    usage = body["usage"]
    assert usage["completion_tokens"] == sum(num_tokens)
    assert usage["prompt_tokens"] == len(requests[0].prompt_token_ids)
    by_number = {number_of(each): each for each in requests}
    assert sorted(by_number) == ["", "1", "2"]
    seeds = [by_number[number].sampling.seed for number in ("", "1", "2")]
    assert seeds == [11, derived_seed(11, 1), derived_seed(11, 2)]
    assert len(set(seeds)) == 3
    assert len({each.prompt_token_ids for each in requests}) == 1
    assert sorted(c.request_id for c in cancelled) == sorted(r.request_id for r in requests)


async def test_several_answers_stream_side_by_side(start):
    async with start(each_its_own) as system:
        response = await system.post(n=3, stream=True, stream_options={"include_usage": True})
    chunks = chunks_of(response)
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0
    for index, text in enumerate(ANSWERS.values()):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(each["delta"].get("content", "") for each in own) == text
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == ["stop"]
        assert own[-1]["finish_reason"] == "stop"


async def test_one_failed_answer_fails_the_request_and_stops_the_others(start):
    async def one_fails(workers, request):
        if number_of(request) == "1":
            await workers.fail(request, FailureKind.INTERNAL, retryable=False)
        else:
            await workers.tokens(request, "on and on")

    async with start(one_fails) as system:
        response = await system.post(n=3)
        assert response.status_code == 500
        await system.settle()
        assert len(system.workers.cancelled) == 3
        stream = await system.post(n=2, stream=True)
        *_, last = chunks_of(stream)
        assert last["error"]["message"] == "the worker's own words"
        assert "finish_reason" not in last


async def test_one_answer_is_recovered_while_the_others_go_on(start):
    async def stumbles(workers, request):
        if number_of(request) == "2" and request.attempt == 0:
            await workers.send(request, token(request, 0, 5))
            await workers.fail(request, FailureKind.WORKER_LOST, retryable=True)
        else:
            ids = workers.model.tokenizer.encode_text(ANSWERS[number_of(request)])
            for index in range(request.next_index, len(ids)):
                await workers.send(request, token(request, index, ids[index]))
            await workers.finish(request, len(ids))

    async with start(stumbles) as system:
        body = (await system.post(n=3, return_token_ids=True)).json()
        retried = [each for each in system.workers.requests if each.attempt]
    assert [each.emitted_token_ids for each in retried] == [(5,)]
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts[:2] == [ANSWERS[""], ANSWERS["1"]]
    assert body["choices"][2]["token_ids"][0] == 5


async def test_an_answer_that_met_its_stop_string_ends_its_work_at_once(start):
    """While another is still being written."""
    stopped = asyncio.Event()

    async def behaviour(workers, request):
        if number_of(request) == "1":
            await workers.tokens(request, "one END two three")
            while not workers.cancelled:
                await asyncio.sleep(0.005)
            stopped.set()
        else:
            await stopped.wait()
            await says("slow")(workers, request)

    async with start(behaviour) as system:
        body = (await system.post(n=2, stop="END")).json()
        assert system.workers.cancelled[0].request_id.endswith("-1")
    assert [choice["message"]["content"] for choice in body["choices"]] == ["slow", "one "]


async def test_every_answer_takes_a_place(start):
    from services.gateway.settings import AdmissionSettings, GatewaySettings

    few = GatewaySettings(admission=AdmissionSettings(max_in_flight=2))
    async with start(each_its_own, settings=few) as system:
        assert (await system.post(n=2)).status_code == 200
        response = await system.post(n=3)
        assert response.status_code == 503
        assert "2 requests are at work" in response.json()["error"]["message"]


async def test_a_client_that_leaves_ends_all_its_answers(start):
    async def endless(workers, request):
        for index in range(10_000):
            await workers.send(request, token(request, index, 70))
            await asyncio.sleep(0.001)

    async with start(endless) as system:
        asking = asyncio.create_task(system.post(n=3, stream=True))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await system.settle()
        assert len({c.request_id for c in system.workers.cancelled}) == 3


async def test_several_answers_about_one_picture(start):
    async with start(each_its_own) as system:
        body = (await system.post(with_pictures(picture_url(), n=2))).json()
        await system.settle()
        assert len(body["choices"]) == 2
        assert len({item.content_key for r in system.workers.requests for item in r.media}) == 1


async def test_logprobs_whole_and_streamed_are_the_same(start):
    async with start(with_logprobs) as system:
        tokenizer = system.workers.model.tokenizer
        ids = tokenizer.encode_text(ANSWERS["1"])
        whole = (await system.post(logprobs=True, top_logprobs=2)).json()["choices"][0]
        streamed = chunks_of(await system.post(logprobs=True, top_logprobs=2, stream=True))
        assert all(each.sampling.num_logprobs == 2 for each in system.workers.requests)
    entries = whole["logprobs"]["content"]
    assert whole["logprobs"]["refusal"] is None
    assert len(entries) == len(ids)
    joined = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert joined.decode() == ANSWERS["1"] == whole["message"]["content"]
    for token_id, entry in zip(ids, entries, strict=True):
        assert entry["logprob"] == -0.5
        assert [each["logprob"] for each in entry["top_logprobs"]] == [-0.5, -1.5]
        assert bytes(entry["top_logprobs"][1]["bytes"]) == tokenizer.bytes_of(token_id - 1)
    pieces = [chunk["choices"][0] for chunk in streamed]
    told = [each["logprobs"]["content"] for each in pieces if each["logprobs"]]
    assert [entry for content in told for entry in content] == entries


async def test_without_logprobs_none_are_told(start):
    async with start(with_logprobs) as system:
        whole = (await system.post()).json()["choices"][0]
        assert whole["logprobs"] is None
        assert system.workers.requests[0].sampling.num_logprobs is None


async def test_stop_strings_count_after_the_minimum_length(start):
    async with start(says("a b a b a b")) as system:
        ids = system.workers.model.tokenizer.encode_text("a b ")
        body = (await system.post(stop=["b"], min_tokens=len(ids))).json()
    assert body["choices"][0]["message"]["content"] == "a b a "


async def test_cached_tokens_are_in_the_usage(start):
    async def cached(workers, request):
        ids = workers.model.tokenizer.encode_text("three cats")
        for index, token_id in enumerate(ids):
            event = token(request, index, token_id)
            update = {"num_cached_tokens": 4 if index == 0 else 0}
            await workers.send(request, event.model_copy(update=update))
        await workers.finish(request, len(ids))

    async with start(cached) as system:
        usage = (await system.post()).json()["usage"]
        *_, last = chunks_of(await system.post(stream=True, stream_options={"include_usage": True}))
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
    assert last["usage"] == usage
    async with start() as system:
        assert "prompt_tokens_details" not in (await system.post()).json()["usage"]


async def test_the_openai_client_sees_choices_logprobs_and_formats(start):
    async with start(with_logprobs) as system:
        client = openai.AsyncOpenAI(
            base_url="http://gateway/v1", api_key="none", http_client=system.client, max_retries=0
        )
        common = {
            "model": MODEL,
            "messages": question()["messages"],
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "any", "schema": {"type": "object"}},
            },
            "extra_body": {"min_p": 0.1, "repetition_penalty": 1.1},
            "logit_bias": {"70": 1},
            "presence_penalty": 0.5,
        }
        whole = await client.chat.completions.create(**common)
        stream = await client.chat.completions.create(**common, stream=True)
        chunks = [chunk async for chunk in stream]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(
                model=MODEL, messages=common["messages"], extra_body={"guided_regex": "("}
            )
    assert [choice.message.content for choice in whole.choices] == [ANSWERS["1"]] * 2
    content = whole.choices[1].logprobs.content
    assert math.isclose(content[0].logprob, -0.5)
    assert len(content[0].top_logprobs) == 2
    for index in range(2):
        own = [c.choices[0] for c in chunks if c.choices[0].index == index]
        told = [entry for each in own if each.logprobs for entry in each.logprobs.content]
        assert [entry.bytes for entry in told] == [entry.bytes for entry in content]
    assert refused.value.param == "guided_regex"
