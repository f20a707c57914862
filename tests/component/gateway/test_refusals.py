"""Every kind of bad input gets a 4xx that names its reason; nothing reaches the workers."""

import base64
import json

import pytest

from services.gateway.settings import AdmissionSettings, GatewaySettings, MediaSettings
from shared.bus.limits import BusLimits
from shared.messages.control import Role

from .conftest import MODEL, data_url, picture_url, question, with_pictures

SMALL = GatewaySettings(
    admission=AdmissionSettings(max_body_bytes=20_000, max_held_bytes=30_000, max_in_flight=2),
    media=MediaSettings(max_pictures=2, max_picture_bytes=4_000, max_picture_pixels=10_000),
)
PNG = base64.b64decode(picture_url().partition(",")[2])


def check(response, status, *, param=None, words=""):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.status_code == status, error
    assert error["param"] == param, error
    assert words in error["message"], error
    assert "Traceback" not in response.text
    assert "x-request-id" in response.headers
    return error


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}x"])
async def test_broken_json(start, body):
    async with start() as system:
        response = await system.client.post("/v1/chat/completions", content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


BAD_FIELDS = [
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "10"}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"seed": 1.5}, "seed"),
    ({"seed": True}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": "0.1"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_p": 1.5}, "min_p"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"cat": 1}}, "logit_bias.cat"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"priority": 1001}, "priority"),
    ({"tools": [{}]}, "tools"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
        "response_format",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "objekt"}},
            }
        },
        "response_format",
    ),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "jsn": 1}}, "structured_outputs.jsn"),
    ({"structured_outputs": {"grammar": 'root ::= "a" | ('}}, "structured_outputs"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_json": {"type": "objekt"}}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "a" * 65_537}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [""]}, "guided_choice[0]"),
    ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
    ({"user": 1}, "user"),
    ({"temprature": 1}, "temprature"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content[0].text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "file"}]}]},
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].input_audio",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages[0].content[0].image_url",
    ),
    ({"model": 1}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=[str(b[0])[:60] for b in BAD_FIELDS])
async def test_bad_fields_are_named(start, fields, param):
    async with start() as system:
        check(await system.post(question() | fields), 400, param=param, words=param)
        assert system.workers.requests == []


async def test_a_missing_field_is_named(start):
    async with start() as system:
        check(await system.post({"model": MODEL}), 400, param="messages")


URL = "messages[0].content[0].image_url.url"
BAD_PICTURES = {
    "truncated": (data_url(PNG[: len(PNG) // 2]), "picture refused"),
    "no picture": (data_url(b"hello"), "not a PNG"),
    "empty": (data_url(b""), "not a PNG"),
    "too many bytes": (data_url(b"x" * 5_000), "the limit is 4000"),
    "too many pixels": (picture_url("red", (101, 100)), "the limit is 10000"),
    "too narrow": (picture_url("red", (401, 1)), "aspect ratio"),
    "bad base64": ("data:image/png;base64,@@@@", "damaged"),
    "not base64": ("data:image/png,hello", "must look like"),
    "remote": ("https://example.org/cat.png", "not allowed"),
    "metadata service": ("http://169.254.169.254/latest", "not allowed"),
    "a file": ("file:///etc/passwd", "only data:, http: and https:"),
    "a path": ("/etc/passwd", "only data:, http: and https:"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
async def test_bad_pictures(start, name):
    url, words = BAD_PICTURES[name]
    async with start(settings=SMALL) as system:
        error = check(await system.post(with_pictures(url)), 400, param=URL, words=words)
        assert error["code"] == "bad_picture"
        assert system.workers.encode_tasks == []


async def test_the_second_picture_is_blamed_by_its_place(start):
    async with start() as system:
        response = await system.post(with_pictures(picture_url(), data_url(b"x")))
        check(response, 400, param="messages[0].content[1].image_url.url")


async def test_too_many_pictures(start):
    async with start(settings=SMALL) as system:
        response = await system.post(with_pictures(*[picture_url()] * 3))
        check(response, 400, param="messages", words="3 pictures were sent, the limit is 2")


async def test_context_overflow(start):
    async with start() as system:
        check(
            await system.post(max_tokens=5_000),
            400,
            param="max_tokens",
            words="5000 more were asked for, the model's context holds 4096",
        )
        response = await system.post(question("cat " * 9_000))
        error = check(response, 400, param="messages", words="holds 4096")
        assert error["code"] == "context_length_exceeded"
        await system.post(question("cat " * 100))
        (request,) = system.workers.requests
        assert request.max_context_tokens <= 4096


async def test_too_much_text(start):
    settings = GatewaySettings(admission=AdmissionSettings(max_text_chars=10))
    async with start(settings=settings) as system:
        check(await system.post(question("x" * 11)), 400, param="messages", words="limit is 10")


async def test_unknown_model(start):
    async with start() as system:
        error = check(await system.post(model="gpt-9"), 404, param="model")
        assert error["code"] == "model_not_found"


async def test_a_body_that_announces_too_much_is_refused_unread(start):
    async with start(settings=SMALL) as system:
        response = await system.post(question("x" * 30_000))
        check(response, 413, words="the limit is 20000")


async def test_a_body_that_does_not_say_its_size_is_cut_off(start):
    sent = 0

    async def body():
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b"x" * 1000

    async with start(settings=SMALL) as system:
        response = await system.client.post("/v1/chat/completions", content=body())
        check(response, 413, words="the limit is 20000")


async def test_all_bodies_together_are_bounded(start):
    settings = GatewaySettings(admission=AdmissionSettings(max_held_bytes=2_000))
    async with start(settings=settings) as system:
        response = await system.post(question("x" * 3_000))
        check(response, 503, words="the limit is 2000")
        assert response.headers["retry-after"] == "1"


async def test_no_worker(start):
    async with start() as system:
        system.workers.missing = {Role.DECODE}
        response = await system.post()
        check(response, 503, words="no live worker for decode")
        assert response.headers["retry-after"] == "1"
        system.workers.missing = {Role.ENCODE}
        assert (await system.post()).status_code == 200
        check(await system.post(with_pictures(picture_url())), 503, words="encode")


async def test_a_full_queue(start):
    async with start(limits=BusLimits(queue_max_msgs=1)) as system:
        workers = system.workers

        async def stuck(*_):
            return None

        workers.behaviour = stuck
        from shared.errors import QueueFull

        async def full(*args, **kwargs):
            raise QueueFull("work.prefill.demo is full")

        system.parts.chat.runner.dispatcher._queues.prefill.put = full
        response = await system.post(with_pictures(picture_url()))
        check(response, 503, words="queue is full")
        assert response.headers["retry-after"] == "1"
        await system.settle()
        # The encode task was queued: the workers are told to drop it.
        assert len(workers.cancelled) == 1


async def test_too_many_requests_at_once(start):
    import asyncio

    async def never(workers, request):
        await asyncio.sleep(0.2)
        await workers.finish(request, 0)

    async with start(never, settings=SMALL) as system:
        responses = await asyncio.gather(*(system.post() for _ in range(4)))
    assert sorted(r.status_code for r in responses) == [200, 200, 503, 503]


async def test_unknown_paths_and_methods_have_the_same_shape(start):
    async with start() as system:
        for response in (
            await system.client.get("/nowhere"),
            await system.client.get("/v1/chat/completions"),
            await system.client.get("/v1/models/other"),
        ):
            assert response.status_code in (404, 405)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_defect_is_a_plain_500(start, caplog):
    async with start() as system:

        def broken(*_args, **_kwargs):
            raise ZeroDivisionError("secret detail")

        object.__setattr__(system.parts.health.model.prompts, "build", broken)
        try:
            response = await system.post()
        finally:
            del system.parts.health.model.prompts.build
        check(response, 500)
        assert "secret" not in response.text
        assert "secret detail" in caplog.text
        assert json.loads(response.text)["error"]["code"] == "internal"
