"""KV that travels while its prompt is computed: same tokens, and nothing left if it breaks off."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from bench.prompts import PromptMaker
from services.decode.stage import DecodeStage
from services.local_engine import LocalEngine
from services.prefill.settings import PrefillSettings
from services.prefill.stage import PrefillStage
from shared.bus.memory_queue import MemoryWorkQueue
from shared.errors import FailureKind, Outcome, QueueFull
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams
from shared.messages.events import FailedEvent, FinishedEvent, FinishReason, TokenEvent
from shared.messages.work import DecodeTask
from shared.model.decoder import LanguageModel
from shared.runtime.host import ModelFolder
from shared.runtime.settings import ModelSettings
from tests.support.faulty_transport import FaultyTransport
from tests.support.stages import GATEWAY, MODEL, Pipeline, running_pipeline

MANY_TOKENS = 100


def ask(
    prompts: PromptMaker, name: str, text: str = "What is this? " * 40, **sampling: Any
) -> RequestDescriptor:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **sampling})
    made = prompts.request([], text, params)
    return made.model_copy(update={"request_id": name, "gateway": GATEWAY, "model": MODEL})


@asynccontextmanager
async def pipeline_with(folder: ModelFolder, **settings: Any) -> AsyncIterator[Pipeline]:
    """A pipeline whose pieces are as small as they can be."""
    made = PrefillSettings(model=ModelSettings(served_name=MODEL), drain_s=1.0, **settings)
    async with running_pipeline(folder, prefill=made) as pipeline:
        (stage,) = (each for each in pipeline.stages if isinstance(each, PrefillStage))
        outlet = stage._outlet
        assert outlet._plan is not None
        outlet._plan = outlet._exposer._plan = dataclasses.replace(outlet._plan, min_piece_bytes=1)
        yield pipeline


def decode_stage(pipeline: Pipeline) -> DecodeStage:
    (stage,) = (each for each in pipeline.stages if isinstance(each, DecodeStage))
    return stage


def num_sent(pipeline: Pipeline) -> int:
    return pipeline.workers[Role.PREFILL].transport.counters().transfers_sent


class Gate:
    """Holds the prompt's forward pass before its last layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_layers: int, error: str = "") -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        forward_layers = LanguageModel.forward_layers

        def held(
            model: LanguageModel, hidden: torch.Tensor, context: Any, kv: Any, first: int, last: int
        ) -> torch.Tensor:
            if hidden.shape[0] >= MANY_TOKENS and last == num_layers:
                self.entered.set()
                assert self.opened.wait(60)
                if error:
                    raise RuntimeError(error)
            return forward_layers(model, hidden, context, kv, first, last)

        monkeypatch.setattr(LanguageModel, "forward_layers", held)


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("chunk_tokens", [0, 40])
@pytest.mark.parametrize("mode", ["whole", "per-chunk", "layer-wise"])
async def test_every_way_of_transfer_gives_the_tokens_of_one_process(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker, mode: str, chunk_tokens: int
) -> None:
    texts = ["What is this? " * (7 * n + 1) for n in range(5)]
    texts += texts[-1:]  # starts from the cache
    asked = [ask(prompts, f"r{n}", text) for n, text in enumerate(texts)]
    async with pipeline_with(folder, kv_transfer=mode, chunk_tokens=chunk_tokens) as pipeline:
        for made in asked[:-1]:
            await pipeline.submit(made, [])
        answers = [await pipeline.tokens_of(made.request_id) for made in asked[:-1]]
        await pipeline.submit(asked[-1], [])
        answers.append(await pipeline.tokens_of(asked[-1].request_id))
        await pipeline.settled()
        if mode == "whole" or (mode == "per-chunk" and not chunk_tokens):  # one piece each
            assert num_sent(pipeline) == len(asked)
        else:
            assert num_sent(pipeline) >= 2 * len(asked)
    assert answers == [list(engine.generate(made, [])) for made in asked]


async def test_layers_travel_while_later_ones_are_computed(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ask(prompts, "long")
    expected = list(engine.generate(made, []))
    num_layers = folder.spec.text.num_layers
    gate = Gate(monkeypatch, num_layers)
    async with pipeline_with(folder) as pipeline:
        await pipeline.submit(made, [])
        await until(lambda: num_sent(pipeline) == num_layers - 1)
        assert "long" not in pipeline.events
        gate.opened.set()
        assert await pipeline.tokens_of("long") == expected
        await pipeline.settled()
        assert num_sent(pipeline) == num_layers + 1  # and the first token


async def test_a_request_cancelled_while_its_kv_travels_leaves_nothing(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, folder.spec.text.num_layers)
    async with pipeline_with(folder) as pipeline:
        await pipeline.submit(ask(prompts, "gone"), [])
        await until(lambda: num_sent(pipeline) > 0)
        await pipeline.cancel("gone")
        await until(lambda: pipeline.workers[Role.PREFILL].transport.counters().leases_open == 0)
        gate.opened.set()
        await pipeline.settled()
        assert decode_stage(pipeline)._inlet._landing._budget.reserved_bytes == 0
        assert "gone" not in pipeline.events


async def test_a_prompt_that_fails_while_its_kv_travels_has_one_end(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, folder.spec.text.num_layers, error="device lost")
    async with pipeline_with(folder) as pipeline:
        await pipeline.submit(ask(prompts, "unlucky"), [])
        await until(lambda: num_sent(pipeline) > 0)
        gate.opened.set()
        (failure,) = await pipeline.end_of("unlucky")
        assert isinstance(failure, FailedEvent)
        assert failure.kind is FailureKind.WORKER_LOST
        assert "prefill" in failure.message
        await pipeline.settled()
        await asyncio.sleep(0.1)
        assert pipeline.events["unlucky"] == [failure]


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_a_pull_that_fails_fails_the_attempt_and_frees_everything(
    folder: ModelFolder, prompts: PromptMaker, place: int
) -> None:
    async with pipeline_with(folder) as pipeline:
        inlet = decode_stage(pipeline)._inlet
        inlet._transport = FaultyTransport(inlet._transport, [*[None] * place, Outcome.INTERNAL])
        await pipeline.submit(ask(prompts, "torn"), [])
        events = await pipeline.end_of("torn")
        failure = events[-1]
        assert isinstance(failure, FailedEvent)
        assert (failure.kind, failure.retryable) == (FailureKind.WORKER_LOST, True)
        await pipeline.settled()
        await pipeline.submit(ask(prompts, "next"), [])
        assert len(await pipeline.tokens_of("next")) == 6
        await pipeline.settled()


async def test_a_piece_that_is_not_ready_is_asked_for_again(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    made = ask(prompts, "slow")
    async with pipeline_with(folder) as pipeline:
        inlet = decode_stage(pipeline)._inlet
        inlet._transport = FaultyTransport(inlet._transport, [Outcome.NOT_READY] * 5)
        await pipeline.submit(made, [])
        assert await pipeline.tokens_of("slow") == list(engine.generate(made, []))
        await pipeline.settled()


async def test_where_the_queue_is_full_the_task_comes_when_the_prompt_is_computed(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ask(prompts, "late")
    put = MemoryWorkQueue.put

    async def full_at_first(queue: Any, task: Any, **options: Any) -> None:
        if isinstance(task, DecodeTask) and task.last_token_id is None:
            raise QueueFull("decode: as the test told")
        await put(queue, task, **options)

    monkeypatch.setattr(MemoryWorkQueue, "put", full_at_first)
    async with pipeline_with(folder) as pipeline:
        await pipeline.submit(made, [])
        assert await pipeline.tokens_of("late") == list(engine.generate(made, []))
        await pipeline.settled()
        assert num_sent(pipeline) == 1


async def test_an_answer_that_stops_at_its_first_token_has_one_end(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    (first, *_) = engine.generate(ask(prompts, "any"), [])
    async with pipeline_with(folder) as pipeline:
        await pipeline.submit(ask(prompts, "stop", stop_token_ids=(first,)), [])
        (event,) = await pipeline.end_of("stop")
        assert isinstance(event, FinishedEvent)
        assert event.reason is FinishReason.STOP
        await pipeline.settled()
        assert not any(isinstance(each, TokenEvent) for each in pipeline.events["stop"])
