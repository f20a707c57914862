"""What a client gets when all goes well."""

import json

import openai
import pytest

from shared.telemetry import tracing

from .conftest import MODEL, picture_url, question, says, with_pictures


@pytest.fixture
def openai_client():
    def make(system):
        return openai.AsyncOpenAI(
            base_url="http://gateway/v1", api_key="none", http_client=system.client, max_retries=0
        )

    return make


async def test_a_whole_answer(start):
    async with start() as system:
        response = await system.post()
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "three cats",
        "refusal": None,
    }
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert body["id"] == "chatcmpl-" + response.headers["x-request-id"]
    assert system.workers.encode_tasks == []
    # Every end is announced, so that whatever the request still holds is released at once.
    assert [c.request_id for c in system.workers.cancelled] == [
        system.workers.requests[0].request_id
    ]


async def test_the_openai_client_whole_and_streaming(start, openai_client):
    async with start(says("drei Katzen 🐈 und mehr")) as system:
        client = openai_client(system)
        messages = [{"role": "user", "content": "wie viele?"}]
        whole = await client.chat.completions.create(model=MODEL, messages=messages)
        stream = await client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        models = [model.id async for model in client.models.list()]
        assert (await client.models.retrieve(MODEL)).id == MODEL
    assert whole.choices[0].message.content == "drei Katzen 🐈 und mehr"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "drei Katzen 🐈 und mehr"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert models == [MODEL]


async def test_the_shape_of_a_stream(start):
    async with start() as system:
        response = await system.post(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    first, *_, last = (json.loads(line.removeprefix("data: ")) for line in lines[:-1])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert "usage" not in last


async def test_two_pictures_in_order(start):
    red, blue = picture_url("red", (56, 56)), picture_url("blue", (112, 56))
    async with start() as system:
        assert (await system.post(with_pictures(red, blue))).status_code == 200
        await system.settle()
        (request,) = system.workers.requests
        assert [item.num_tokens for item in request.media] == [4, 8]
        for item in request.media:
            run = request.prompt_token_ids[item.offset : item.offset + item.num_tokens]
            assert set(run) == {system.parts.health.model.spec.vision.image_token_id}
        items = [task.item for task in system.workers.encode_tasks]
        assert sorted(items, key=lambda item: item.offset) == list(request.media)
        media = system.hub.objects("media", 1, 1)
        assert {len(await media.get(item.sha256)) > 50 for item in items} == {True}


async def test_a_repeated_picture_is_stored_once(start):
    async with start() as system:
        stored = []
        store = system.parts.chat.runner.dispatcher._media
        put = store.put
        store.put = lambda name, data: stored.append(name) or put(name, data)
        for _ in range(2):
            await system.post(with_pictures(picture_url("red"), picture_url("red")))
    assert len(stored) == 1


async def test_length_needs_no_confirmation(start):
    async def silent_end(workers, request):
        await workers.tokens(request, "a b c d e f")

    async with start(silent_end) as system:
        body = (await system.post(max_tokens=3)).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    assert system.workers.requests[0].sampling.max_tokens == 3


async def test_a_stop_string_ends_the_answer_and_the_work(start):
    async def endless(workers, request):
        await workers.tokens(request, "one two END three four")

    async with start(endless) as system:
        body = (await system.post(stop=["END"])).json()
        await system.settle()
    assert body["choices"][0]["message"]["content"] == "one two "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert [c.request_id for c in system.workers.cancelled] == [
        system.workers.requests[0].request_id
    ]


async def test_sampling_reaches_the_workers(start, model):
    async with start() as system:
        await system.post(temperature=0.5, top_p=0.9, top_k=7, seed=-1, ignore_eos=True)
        await system.post()
        await system.post(temperature=1, top_k=-1)
        given, default, random = (request.sampling for request in system.workers.requests)
    assert (given.temperature, given.top_p, given.top_k) == (0.5, 0.9, 7)
    assert (given.seed, given.stop_token_ids) == (2**64 - 1, ())
    # The demo model's folder says that it does not sample.
    end_id = model.tokenizer.special_tokens["<|im_end|>"]
    assert (default.temperature, default.stop_token_ids) == (0.0, (end_id,))
    assert default.max_tokens == 1024
    assert (random.temperature, random.top_k) == (1.0, 0)
    assert random.seed != default.seed


async def test_harmless_parameters_are_ignored(start):
    async with start() as system:
        response = await system.post(
            user="me", n=1, logprobs=False, presence_penalty=0, metadata={"a": "b"}, tools=[]
        )
    assert response.status_code == 200


async def test_events_may_repeat_and_overtake_each_other(start):
    async def unruly(workers, request):
        ids = workers.model.tokenizer.encode_text("three cats")
        from .conftest import token

        await workers.finish(request, len(ids))
        for index in [2, 1, 1, *reversed(range(len(ids))), 0]:
            await workers.send(request, token(request, index, ids[index]))

    async with start(unruly) as system:
        body = (await system.post()).json()
    assert body["choices"][0]["message"]["content"] == "three cats"
    assert len(system.workers.requests) == 1


async def test_operators_endpoints(start):
    async with start() as system:
        await system.post(stream=True)
        assert (await system.client.get("/health")).json() == {"status": "ok"}
        ready = await system.client.get("/ready")
        assert (ready.status_code, ready.json()["missing"]) == (200, [])
        from shared.messages.control import Role

        system.workers.missing = {Role.ENCODE, Role.DECODE}
        ready = await system.client.get("/ready")
        assert (ready.status_code, ready.json()["missing"]) == (503, ["encode", "decode"])
        metrics = (await system.client.get("/metrics")).text
    assert 'triptych_request_success_total{finished_reason="stop"} 1.0' in metrics
    assert "triptych_time_to_first_token_seconds_count 1.0" in metrics
    assert "triptych_num_requests_running 0.0" in metrics


async def test_a_trace_begins_with_the_client_and_reaches_the_workers(start):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with start(says("ok")) as system:
        async with tracing.setup_tracing("gateway", "gateway-0", system.workers.bus):
            response = await system.client.post(
                "/v1/chat/completions",
                json=with_pictures(picture_url()),
                headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"},
            )
        await system.settle()
        assert response.headers["x-trace-id"] == trace_id
        assert trace_id in system.workers.headers[0]["traceparent"]
        spans = (await system.client.get(f"/v1/traces/{trace_id}")).json()
        missing = await system.client.get("/v1/traces/" + "0" * 32)
    names = {span["name"]: span for span in spans}
    assert {"request", "ingest", "media.store", "dispatch"} <= set(names)
    assert names["request"]["parent_id"] == "b7ad6b7169203331"
    assert names["ingest"]["parent_id"] == names["request"]["span_id"]
    assert set(spans[0]) >= {"trace_id", "service", "instance", "start_unix_ns", "attributes"}
    assert missing.status_code == 404


async def test_live_requests_are_reported(start):
    import asyncio

    async def slow(workers, request):
        await asyncio.sleep(0.05)
        await says("x")(workers, request)

    async with start(slow) as system:
        liveness = system.parts.chat.runner.liveness
        beating = asyncio.create_task(liveness.run(interval_s=0.01))
        await system.post(question())
        beating.cancel()
        await system.settle()
        request_id = system.workers.requests[0].request_id
        assert {message.request_ids for message in system.workers.alive} == {(request_id,)}
