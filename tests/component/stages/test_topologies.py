"""Stages that share a process: same tokens, no copy of what lies there already, nothing left."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from bench.prompts import PromptMaker
from services.decode.executor import DecodeExecutor
from services.local_engine import LocalEngine
from shared.bus import subjects
from shared.errors import FailureKind
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams
from shared.messages.events import FailedEvent, FinishedEvent
from shared.messages.work import PrefillTask
from shared.runtime import language
from shared.runtime.host import ModelFolder
from shared.transport.base import TransportCounters
from tests.support.demo_engine import plates
from tests.support.stages import GATEWAY, MODEL, Pipeline, running_pipeline

TOPOLOGIES = ("E-P-D", "EP-D", "ED-P", "E-PD", "EPD", "1EPD 1E 1PD 1D")


def request(
    prompts: PromptMaker, name: str, pictures: Sequence[bytes], *, max_tokens: int = 8
) -> RequestDescriptor:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    made = prompts.request(pictures, f"What is this? ({name})", sampling)
    return made.model_copy(update={"request_id": name, "gateway": GATEWAY, "model": MODEL})


Jobs = Mapping[str, list[bytes]]


async def ask_all(
    pipeline: Pipeline, requests: Mapping[str, RequestDescriptor], jobs: Jobs
) -> dict[str, list[int]]:
    await asyncio.gather(*(pipeline.submit(requests[name], jobs[name]) for name in jobs))
    answers = {name: await pipeline.tokens_of(name) for name in jobs}
    await pipeline.settled()
    return answers


def counters(pipeline: Pipeline, role: Role) -> TransportCounters:
    return pipeline.workers[role].transport.counters()


@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_every_topology_gives_the_tokens_of_one_process(
    topology: str, folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    jobs = {f"r{n}": plates(n, n % 4) for n in range(8)}
    requests = {name: request(prompts, name, pictures) for name, pictures in jobs.items()}
    async with running_pipeline(folder, topology=topology) as pipeline:
        answers = await ask_all(pipeline, requests, jobs)
    for name, pictures in jobs.items():
        assert answers[name] == list(engine.generate(requests[name], pictures)), name


async def test_one_process_sends_nothing_and_loads_its_weights_once(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = language.load_language_model

    def counted(*args: object, **options: object) -> object:
        loads.append(args)
        return load(*args, **options)

    monkeypatch.setattr(language, "load_language_model", counted)
    jobs = {f"r{n}": plates(n, 2) for n in range(4)}
    requests = {name: request(prompts, name, pictures) for name, pictures in jobs.items()}
    async with running_pipeline(folder, topology="EPD") as pipeline:
        await ask_all(pipeline, requests, jobs)
        assert len(set(map(id, pipeline.workers.values()))) == 1
        seen = counters(pipeline, Role.DECODE)
        bytes_per_token = 4 * folder.spec.text.hidden_size
        items = [item for each in requests.values() for item in each.media]
        assert seen.bytes_local == bytes_per_token * sum(item.num_tokens for item in items)
        assert (seen.bytes_sent, seen.bytes_received, seen.transfers_failed) == (0, 0, 0)
        assert num_taken(pipeline, Role.DECODE) == 0  # no decode task was queued
    assert len(loads) == 1


async def test_an_encoder_beside_prefill_is_read_in_place(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    jobs = {"r": plates(1, 3)}
    requests = {name: request(prompts, name, pictures) for name, pictures in jobs.items()}
    async with running_pipeline(folder, topology="EP-D") as pipeline:
        await ask_all(pipeline, requests, jobs)
        here, there = counters(pipeline, Role.PREFILL), counters(pipeline, Role.DECODE)
        assert here.bytes_local > 0
        assert here.bytes_received == 0
        assert here.bytes_sent == there.bytes_received > 0  # the KV


async def test_without_a_slot_the_sequence_is_queued_and_taken_over_later_without_a_copy(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    jobs: Jobs = {f"r{n}": [] for n in range(6)}
    requests = {name: request(prompts, name, [], max_tokens=20) for name in jobs}
    async with running_pipeline(folder, topology="E-PD", hosts={"max_batch": 1}) as pipeline:
        answers = await ask_all(pipeline, requests, jobs)
        seen = counters(pipeline, Role.DECODE)
        assert (seen.bytes_sent, seen.bytes_received, seen.bytes_local) == (0, 0, 0)
        assert num_taken(pipeline, Role.DECODE) > 0
    for name in jobs:
        assert answers[name] == list(engine.generate(requests[name], [])), name


async def test_other_decoders_help_a_full_process(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    jobs: Jobs = {f"r{n}": [] for n in range(6)}
    requests = {name: request(prompts, name, [], max_tokens=40) for name in jobs}
    async with running_pipeline(folder, topology="1PD 1D", hosts={"max_batch": 1}) as pipeline:
        answers = await ask_all(pipeline, requests, jobs)
        helped = counters(pipeline, Role.DECODE)
        assert helped.bytes_received == counters(pipeline, Role.PREFILL).bytes_sent > 0
    for name in jobs:
        assert answers[name] == list(engine.generate(requests[name], [])), name


async def test_a_pool_for_two_answers_serves_many_from_here_and_from_elsewhere(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    """Prompts, answers and leased sequences share the blocks, and nothing gets stuck."""
    jobs: Jobs = {f"r{n}": [] for n in range(10)}
    requests = {name: request(prompts, name, [], max_tokens=24) for name in jobs}
    geometry = folder.geometry(16)
    longest = max(geometry.blocks_for(each.max_context_tokens) for each in requests.values())
    hosts = {"max_batch": 2, "kv_bytes": 2 * longest * geometry.bytes_per_block}
    async with running_pipeline(folder, topology="1PD 1P", hosts=hosts) as pipeline:
        answers = await ask_all(pipeline, requests, jobs)
    for name in jobs:
        assert answers[name] == list(engine.generate(requests[name], [])), name


async def test_the_prefill_task_stands_for_the_whole_answer(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    """If this process dies, the queue still holds the work."""
    async with running_pipeline(folder, topology="E-PD") as pipeline:
        queue = await pipeline.bus.work_queue(subjects.work(Role.PREFILL, MODEL), PrefillTask)
        await pipeline.submit(request(prompts, "long", [], max_tokens=200), [])
        await until_tokens(pipeline, "long", 3)
        assert await queue.depth() == 1
        assert len(await pipeline.tokens_of("long")) == 200
        await pipeline.settled()
        assert await queue.depth() == 0


async def test_a_cancelled_answer_leaves_nothing_behind(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    async with running_pipeline(folder, topology="EPD") as pipeline:
        await pipeline.submit(request(prompts, "gone", [], max_tokens=400), [])
        await until_tokens(pipeline, "gone", 3)
        await pipeline.cancel("gone")
        await pipeline.settled()
        assert not any(isinstance(e, FinishedEvent) for e in pipeline.events["gone"])


async def test_a_step_that_fails_here_is_worth_another_try(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, *args: object) -> list[int]:
        raise RuntimeError("device lost")

    monkeypatch.setattr(DecodeExecutor, "run", broken)
    async with running_pipeline(folder, topology="EPD") as pipeline:
        await pipeline.submit(request(prompts, "unlucky", []), [])
        *_, failure = await pipeline.end_of("unlucky")
        assert isinstance(failure, FailedEvent)
        assert (failure.kind, failure.retryable) == (FailureKind.WORKER_LOST, True)
        await pipeline.settled()


async def test_a_request_beyond_the_shared_pool_is_refused_with_numbers(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    hosts = {"kv_bytes": 4 * folder.geometry(16).bytes_per_block}
    async with running_pipeline(folder, topology="EPD", hosts=hosts) as pipeline:
        await pipeline.submit(request(prompts, "big", [], max_tokens=64), [])
        (event,) = await pipeline.end_of("big")
        assert isinstance(event, FailedEvent)
        assert event.kind is FailureKind.BAD_REQUEST
        assert "has 4" in event.message


async def test_a_stop_lets_the_answers_of_this_process_end(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    async with running_pipeline(folder, topology="EPD", hosts={"drain_s": 20.0}) as pipeline:
        await pipeline.submit(request(prompts, "long", [], max_tokens=100), [])
        await until_tokens(pipeline, "long", 3)
    assert len(await pipeline.tokens_of("long")) == 100


@pytest.mark.parametrize("step_tokens", [32, 0])
async def test_a_running_answer_goes_on_between_the_steps_of_a_long_prompt(
    step_tokens: int, folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    """Decode and prefill take turns; a prompt in one step is one pause, of any length."""
    running = request(prompts, "running", [], max_tokens=300)
    long = prompts.request([], "7 " * 300, SamplingParams(temperature=0.0, max_tokens=2))
    long = long.model_copy(update={"request_id": "long", "gateway": GATEWAY, "model": MODEL})
    hosts = {"mixed_step_tokens": step_tokens}
    async with running_pipeline(folder, topology="EPD", hosts=hosts) as pipeline:
        await pipeline.submit(running, [])
        await until_tokens(pipeline, "running", 3)
        num_before = len(pipeline.events["running"])
        await pipeline.submit(long, [])
        await until_tokens(pipeline, "long", 1)
        num_meanwhile = len(pipeline.events["running"]) - num_before
        assert await pipeline.tokens_of("long") == list(engine.generate(long, []))
        assert await pipeline.tokens_of("running") == list(engine.generate(running, []))
        await pipeline.settled()
        steps = pipeline.workers[Role.PREFILL].registry.get_sample_value(
            "triptych_prefill_forward_seconds_count"
        )
    num_steps = -(-long.num_tokens // step_tokens) if step_tokens else 1
    assert steps == 1 + num_steps  # the running answer's own prompt, then the long one
    if step_tokens:
        assert num_meanwhile >= num_steps - 2


async def until_tokens(pipeline: Pipeline, name: str, count: int) -> None:
    async with asyncio.timeout(30), pipeline.arrived:
        await pipeline.arrived.wait_for(lambda: len(pipeline.events.get(name, [])) >= count)


def num_taken(pipeline: Pipeline, role: Role) -> float:
    """Tasks of this stage that its worker took from the queue."""
    registry = pipeline.workers[role].registry
    name = "triptych_request_queue_time_seconds_count"
    return registry.get_sample_value(name, {"stage": role.value}) or 0.0
