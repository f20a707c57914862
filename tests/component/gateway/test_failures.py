"""Workers that fail, vanish or fall silent, and clients that go away."""

import asyncio
import json

import pytest

from shared.errors import FailureKind
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import KvRef, TensorRef
from shared.messages.work import DecodeTask

from .conftest import FAST, question, token

TEXT = "the cat sat on the mat"


def resumed(first):
    """`first` serves attempt 0; later attempts carry on where it ended."""

    async def behaviour(workers, request):
        if request.attempt == 0:
            await first(workers, request)
            return
        workers.worker = WorkerRef(name="decode-1", incarnation=1)
        num_tokens = await workers.tokens(request, TEXT, start=request.next_index)
        await workers.finish(request, num_tokens)

    return behaviour


async def some(workers, request, count):
    ids = workers.model.tokenizer.encode_text(TEXT)
    for index in range(count):
        await workers.send(request, token(request, index, ids[index]))


async def lost(workers, request):
    await some(workers, request, 2)
    await asyncio.sleep(0.05)
    workers.gone.add(workers.worker)


async def failed(workers, request):
    await some(workers, request, 2)
    await workers.fail(request, FailureKind.WORKER_LOST, retryable=True)
    # The old attempt is not quite dead yet: all of this must be ignored.
    await asyncio.sleep(0.05)
    await some(workers, request, 4)
    await workers.fail(request, FailureKind.INTERNAL, retryable=False)
    await workers.finish(request, 2)


async def gap(workers, request):
    ids = workers.model.tokenizer.encode_text(TEXT)
    for index in (0, 1, 3):
        await workers.send(request, token(request, index, ids[index]))


async def lost_end(workers, request):
    ids = workers.model.tokenizer.encode_text(TEXT)
    await some(workers, request, 1)
    await workers.finish(request, len(ids))


async def silent(workers, request):
    await some(workers, request, 2)


async def never_started(workers, request):
    return


@pytest.mark.parametrize("trouble", [lost, failed, gap, lost_end, silent, never_started])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_attempt_is_carried_on_without_loss_or_repetition(start, trouble, stream):
    async with start(resumed(trouble)) as system:
        response = await system.post(stream=stream)
        await system.settle()
        first, second = system.workers.requests
        ids = tuple(system.workers.model.tokenizer.encode_text(TEXT))
        assert second.request_id == first.request_id
        assert second.attempt == 1
        assert second.emitted_token_ids == ids[: second.next_index]
        assert second.prompt_token_ids == first.prompt_token_ids
        assert second.sampling == first.sampling
        assert [c.attempt for c in system.workers.cancelled] == [0, 1]
        metrics = (await system.client.get("/metrics")).text
    assert text_of(response, stream) == TEXT
    assert "triptych_request_resubmissions_total{trouble=" in metrics


def text_of(response, stream) -> str:
    if not stream:
        return response.json()["choices"][0]["message"]["content"]
    events = [json.loads(e[6:]) for e in response.text.split("\n\n") if e and "[DONE]" not in e]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events)


FINAL = [
    (FailureKind.BAD_REQUEST, 400),
    (FailureKind.TIMEOUT, 504),
    (FailureKind.MEDIA_MISSING, 503),
    (FailureKind.WORKER_LOST, 503),
    (FailureKind.OVERLOADED, 503),
    (FailureKind.INTERNAL, 500),
]


@pytest.mark.parametrize(("kind", "status"), FINAL)
async def test_a_final_failure_is_one_typed_error(start, kind, status):
    async def behaviour(workers, request):
        await some(workers, request, 2)
        await workers.fail(request, kind, retryable=False)

    async with start(behaviour) as system:
        response = await system.post()
        assert response.status_code == status
        assert response.json()["error"]["message"] == "the worker's own words"
        assert response.json()["error"]["code"] == kind.value
        assert ("retry-after" in response.headers) == (status == 503)
        assert len(system.workers.requests) == 1


async def test_attempts_are_bounded(start):
    async def behaviour(workers, request):
        await workers.fail(request, FailureKind.OVERLOADED, retryable=True)

    async with start(behaviour) as system:
        response = await system.post()
        assert response.status_code == 503
        assert "3 attempts were made" in response.json()["error"]["message"]
        assert [r.attempt for r in system.workers.requests] == [0, 1, 2]


async def test_a_failure_inside_a_stream_is_an_error_event_and_no_finish_reason(start):
    async def behaviour(workers, request):
        await some(workers, request, 2)
        await asyncio.sleep(0.05)
        await workers.fail(request, FailureKind.INTERNAL, retryable=False)

    async with start(behaviour) as system:
        response = await system.post(stream=True, stream_options={"include_usage": True})
    *chunks, error, done = [e[6:] for e in response.text.split("\n\n") if e]
    assert done == "[DONE]"
    assert json.loads(error)["error"]["message"] == "the worker's own words"
    assert all(json.loads(c)["choices"][0]["finish_reason"] is None for c in chunks)


async def test_the_deadline_is_a_504(start):
    admission = FAST.admission.model_copy(update={"request_timeout_s": 0.2})
    settings = FAST.model_copy(update={"admission": admission})
    async with start(never_started, settings=settings) as system:
        response = await system.post()
        assert response.status_code == 504
        await system.settle()
        assert len(system.workers.cancelled) == 1


async def test_a_contradiction_is_never_taken_for_an_end(start):
    async def behaviour(workers, request):
        await some(workers, request, 3)
        await workers.finish(request, 1)

    async with start(behaviour) as system:
        assert (await system.post()).status_code == 500


async def test_a_dead_letter_fails_its_request_at_once(start):
    settings = FAST.model_copy(
        update={"recovery": FAST.recovery.model_copy(update={"first_event_s": 60.0})}
    )
    async with start(never_started, settings=settings) as system:
        asking = asyncio.create_task(system.post())
        while not system.workers.requests:
            await asyncio.sleep(0.01)
        queue = await system.workers.bus.work_queue("work.decode.demo", DecodeTask)
        request = system.workers.requests[0]
        task = DecodeTask(request=request, kv=kv_ref(), last_token_id=1, next_index=1)
        await queue.put(task, message_id="x")
        (delivery,) = await queue.take(1, 1.0)
        await delivery.reject("it crashed the worker")
        response = await asyncio.wait_for(asking, 2.0)
        assert response.status_code == 500
        assert "it crashed the worker" in response.json()["error"]["message"]


def kv_ref() -> KvRef:
    tensor = TensorRef(
        owner=WorkerRef(name="p", incarnation=1),
        address=b"",
        lease_id="kv",
        compatibility="",
        segment_bytes=(1,),
    )
    return KvRef(tensor=tensor, kv_len=(1,), next_pos=1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_a_client_that_goes_away_cancels_its_work(start, stream, num_tokens):
    async def behaviour(workers, request):
        await some(workers, request, num_tokens)

    async with start(behaviour) as system:
        gone = asyncio.Event()
        body = json.dumps(question(stream=stream)).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent = []

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 2),
        }
        serving = asyncio.create_task(system.app(scope, receive, send))
        while not system.workers.requests:
            await asyncio.sleep(0.01)
        await system.settle()
        assert system.workers.cancelled == []
        gone.set()
        await asyncio.wait_for(serving, 1.0)
        await system.settle()
        (cancel,) = system.workers.cancelled
        assert cancel.request_id == system.workers.requests[0].request_id
        metrics = (await system.client.get("/metrics")).text
    assert "triptych_client_disconnects_total 1.0" in metrics
    assert "request_success_total{" not in metrics


async def test_many_at_once_each_end_once(start):
    async def behaviour(workers, request):
        await asyncio.sleep(0.001 * (int(request.request_id[:2], 16) % 20))
        if request.attempt == 0 and int(request.request_id[2:4], 16) % 3 == 0:
            await some(workers, request, 1)
            await workers.fail(request, FailureKind.WORKER_LOST, retryable=True)
            return
        num_tokens = await workers.tokens(request, TEXT, start=request.next_index)
        await workers.finish(request, num_tokens)

    async with start(behaviour) as system:
        responses = await asyncio.gather(*(system.post() for _ in range(100)))
    assert [r.json()["choices"][0]["message"]["content"] for r in responses] == [TEXT] * 100
