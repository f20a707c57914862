"""The three stages together, over the in-memory bus and transport, with the demo model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from bench.prompts import PromptMaker
from services.decode.executor import DecodeExecutor
from services.local_engine import LocalEngine
from services.prefill.executor import PrefillExecutor
from services.prefill.settings import PrefillSettings
from shared.bus import subjects
from shared.errors import FailureKind
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams
from shared.messages.events import FailedEvent, FinishedEvent, FinishReason, TokenEvent
from shared.messages.work import EncodeTask
from shared.runtime.host import ModelFolder
from shared.runtime.settings import ModelSettings
from shared.runtime.step_guard import StageBroken
from tests.support.demo_engine import plates
from tests.support.stages import GATEWAY, MODEL, running_pipeline


def request(
    prompts: PromptMaker, name: str, pictures: Sequence[bytes], *, max_tokens: int = 8
) -> RequestDescriptor:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    made = prompts.request(pictures, f"What is this? ({name})", sampling)
    return made.model_copy(update={"request_id": name, "gateway": GATEWAY, "model": MODEL})


async def test_tokens_equal_those_of_one_process(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    jobs = {f"r{n}": plates(n, n % 4) for n in range(12)}
    requests = {name: request(prompts, name, pictures) for name, pictures in jobs.items()}
    async with running_pipeline(folder) as pipeline:
        await asyncio.gather(*(pipeline.submit(requests[n], jobs[n]) for n in jobs))
        answers = {name: await pipeline.tokens_of(name) for name in jobs}
        await pipeline.settled()
    for name, pictures in jobs.items():
        assert answers[name] == list(engine.generate(requests[name], pictures)), name


async def test_reversed_pictures_stay_with_their_requests(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(7, 3)
    forward = request(prompts, "forward", pictures)
    backward = request(prompts, "backward", pictures[::-1])
    async with running_pipeline(folder) as pipeline:
        await asyncio.gather(
            pipeline.submit(forward, pictures), pipeline.submit(backward, pictures[::-1])
        )
        got = [await pipeline.tokens_of("forward"), await pipeline.tokens_of("backward")]
        await pipeline.settled()
    assert got[0] == list(engine.generate(forward, pictures))
    assert got[1] == list(engine.generate(backward, pictures[::-1]))


async def test_the_same_picture_is_embedded_once(folder: ModelFolder, prompts: PromptMaker) -> None:
    pictures = plates(8, 1)
    async with running_pipeline(folder) as pipeline:
        for number in range(4):
            await pipeline.submit(request(prompts, f"same{number}", pictures), pictures)
        for number in range(4):
            await pipeline.tokens_of(f"same{number}")
        await pipeline.settled()
        registry = pipeline.workers[Role.ENCODE].registry
        assert registry.get_sample_value("triptych_encoder_batch_items_sum") == 1


async def test_text_never_touches_the_encoder(folder: ModelFolder, prompts: PromptMaker) -> None:
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(request(prompts, "text", []), [])
        assert len(await pipeline.tokens_of("text")) == 8
        counters = pipeline.workers[Role.ENCODE].transport.counters()
        assert (counters.transfers_sent, counters.leases_open) == (0, 0)


async def test_an_answer_of_one_token_ends_at_prefill(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(request(prompts, "one", [], max_tokens=1), [])
        events = await pipeline.end_of("one")
        assert isinstance(events[0], TokenEvent)
        assert isinstance(events[1], FinishedEvent)
        assert events[1].reason is FinishReason.LENGTH
        await pipeline.settled()
        assert pipeline.workers[Role.PREFILL].transport.counters().transfers_sent == 0


async def test_a_resubmission_goes_on_where_the_client_is(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(9, 2)
    whole = request(prompts, "whole", pictures)
    sampled = whole.sampling.model_copy(update={"temperature": 0.8, "seed": 11})
    whole = whole.model_copy(update={"sampling": sampled})
    expected = list(engine.generate(whole, pictures))
    resumed = whole.model_copy(update={"attempt": 1, "emitted_token_ids": tuple(expected[:3])})
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(resumed, pictures)
        events = await pipeline.end_of("whole")
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [event.index for event in tokens] == [3, 4, 5, 6, 7]
    assert [event.token_id for event in tokens] == expected[3:]


async def test_a_cancelled_request_leaves_nothing_behind(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    pictures = plates(10, 1)
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(request(prompts, "gone", pictures, max_tokens=400), pictures)
        async with asyncio.timeout(30), pipeline.arrived:
            await pipeline.arrived.wait_for(lambda: len(pipeline.events.get("gone", [])) >= 3)
        await pipeline.cancel("gone")
        await pipeline.settled()
        assert not any(isinstance(e, FinishedEvent) for e in pipeline.events["gone"])


async def test_a_request_cancelled_before_it_is_taken_is_never_computed(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    async with running_pipeline(folder) as pipeline:
        await pipeline.cancel("never")
        await pipeline.submit(request(prompts, "never", []), [])
        await pipeline.submit(request(prompts, "after", []), [])
        await pipeline.tokens_of("after")
        assert "never" not in pipeline.events


async def test_a_missing_picture_is_a_typed_failure(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    pictures = plates(11, 1)
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(request(prompts, "lost", pictures), [])
        (event,) = await pipeline.end_of("lost")
        assert isinstance(event, FailedEvent)
        assert event.kind is FailureKind.MEDIA_MISSING
        await pipeline.cancel("lost")
        await pipeline.settled()


async def test_a_picture_asked_about_again_costs_no_failed_pull(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    """The first request's announcement outlives its lease; the second waits for its own."""
    pictures = plates(12, 1)
    async with running_pipeline(folder) as pipeline:
        for number in range(4):
            await pipeline.submit(request(prompts, f"again{number}", pictures), pictures)
            await pipeline.tokens_of(f"again{number}")
        await pipeline.settled()
        encoder = pipeline.workers[Role.ENCODE]
        assert encoder.registry.get_sample_value("triptych_encoder_batch_items_sum") == 1
        queue = await pipeline.bus.work_queue(subjects.work(Role.ENCODE, MODEL), EncodeTask)
        assert await queue.depth() == 0


async def test_an_embedding_whose_lease_was_lost_is_encoded_again(
    folder: ModelFolder, prompts: PromptMaker, engine: LocalEngine
) -> None:
    """Its announcement is the request's own, but the memory behind it is gone."""
    pictures = plates(13, 1)
    made = request(prompts, "lost-lease", pictures)
    async with running_pipeline(folder) as pipeline:
        await pipeline.announce_gone(made)
        await pipeline.submit(made, pictures, with_encode=False)
        assert await pipeline.tokens_of("lost-lease") == list(engine.generate(made, pictures))
        await pipeline.settled()


async def test_a_placeholder_among_emitted_tokens_is_text(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    """A sampled answer may hold any token id; going on from it must not fail, nor fail others."""
    assert folder.spec.vision is not None
    pictures = plates(14, 1)
    odd = request(prompts, "odd", pictures)
    emitted = (folder.spec.vision.image_token_id,)
    odd = odd.model_copy(update={"emitted_token_ids": emitted, "attempt": 1})
    async with running_pipeline(folder) as pipeline:
        await asyncio.gather(
            pipeline.submit(odd, pictures), pipeline.submit(request(prompts, "plain", []), [])
        )
        events = await pipeline.end_of("odd")
        assert [e.index for e in events if isinstance(e, TokenEvent)] == list(range(1, 8))
        assert len(await pipeline.tokens_of("plain")) == 8


async def test_a_step_that_fails_is_worth_another_try(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, sequences: object) -> list[int]:
        raise RuntimeError("device lost")

    monkeypatch.setattr(DecodeExecutor, "run", broken)
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(request(prompts, "unlucky", []), [])
        *_, failure = await pipeline.end_of("unlucky")
        assert isinstance(failure, FailedEvent)
        assert (failure.kind, failure.retryable) == (FailureKind.WORKER_LOST, True)
        assert "device lost" not in failure.message
        await pipeline.settled()


async def test_a_worker_whose_steps_keep_failing_ends(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, prompts: object) -> list[int]:
        raise RuntimeError("device lost")

    monkeypatch.setattr(PrefillExecutor, "begin", broken)

    async def keep_asking() -> None:
        async with running_pipeline(folder) as pipeline:
            for number in range(3):
                await pipeline.submit(request(prompts, f"u{number}", []), [])
                await pipeline.end_of(f"u{number}")
            await asyncio.sleep(5)

    with pytest.raises(ExceptionGroup) as caught:
        await keep_asking()
    assert caught.group_contains(StageBroken)


async def test_output_that_is_not_a_number_is_a_failure_not_an_answer(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(self: object, sequences: list[object]) -> list[None]:
        return [None for _ in sequences]

    monkeypatch.setattr(DecodeExecutor, "run", nothing)
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(request(prompts, "nan", []), [])
        *_, failure = await pipeline.end_of("nan")
        assert isinstance(failure, FailedEvent)
        assert (failure.kind, failure.retryable) == (FailureKind.INTERNAL, False)
        await pipeline.settled()


async def test_landing_memory_smaller_than_all_requests_does_not_deadlock(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    jobs = {f"w{n}": plates(20 + n, 4) for n in range(6)}
    requests = {name: request(prompts, name, pictures) for name, pictures in jobs.items()}
    largest = max(sum(i.num_tokens for i in r.media) for r in requests.values())
    bytes_per_token = folder.spec.text.hidden_size * 4
    settings = PrefillSettings(
        model=ModelSettings(served_name=MODEL),
        drain_s=1.0,
        landing_bytes=largest * bytes_per_token,  # type: ignore[arg-type]
    )
    async with running_pipeline(folder, prefill=settings) as pipeline:
        await asyncio.gather(*(pipeline.submit(requests[n], jobs[n]) for n in jobs))
        for name in jobs:
            assert len(await pipeline.tokens_of(name)) == 8
        await pipeline.settled()


async def test_a_prompt_beyond_the_pool_is_refused_with_numbers(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    tiny = PrefillSettings(
        model=ModelSettings(served_name=MODEL),
        drain_s=1.0,
        kv_bytes=folder.geometry(16).bytes_per_block,  # type: ignore[arg-type]
    )
    async with running_pipeline(folder, prefill=tiny) as pipeline:
        await pipeline.submit(request(prompts, "big", []), [])
        (event,) = await pipeline.end_of("big")
        assert isinstance(event, FailedEvent)
        assert event.kind is FailureKind.BAD_REQUEST
        assert "a prefill worker has 1" in event.message
