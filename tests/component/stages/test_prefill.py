"""The prefill stage: what the cache saves, chunks, and urgent prompts between two layers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import torch

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from services.prefill import executor as executor_module
from services.prefill.settings import PrefillSettings
from services.prefill.stage import PrefillStage
from shared.errors import FailureKind
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams
from shared.messages.events import FailedEvent, TokenEvent
from shared.model.decoder import LanguageModel
from shared.runtime.core_turns import Turn
from shared.runtime.host import ModelFolder
from shared.runtime.settings import ModelSettings
from tests.support.demo_engine import plates
from tests.support.stages import GATEWAY, MODEL, Pipeline, running_pipeline

BLOCK = 16


def ask(
    prompts: PromptMaker,
    name: str,
    pictures: Sequence[bytes] = (),
    *,
    text: str = "What is this?",
    **changes: Any,
) -> RequestDescriptor:
    made = prompts.request(pictures, text, SamplingParams(temperature=0.0, max_tokens=6))
    return made.model_copy(
        update={"request_id": name, "gateway": GATEWAY, "model": MODEL, **changes}
    )


@asynccontextmanager
async def pipeline_with(folder: ModelFolder, **settings: Any) -> AsyncIterator[Pipeline]:
    made = PrefillSettings(model=ModelSettings(served_name=MODEL), drain_s=1.0, **settings)
    async with running_pipeline(folder, prefill=made) as pipeline:
        yield pipeline


async def answer(
    pipeline: Pipeline, made: RequestDescriptor, pictures: Sequence[bytes], *, encode: bool = True
) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt's were cached."""
    await pipeline.submit(made, pictures, with_encode=encode)
    tokens = await pipeline.tokens_of(made.request_id)
    first, *others = (e for e in pipeline.events[made.request_id] if isinstance(e, TokenEvent))
    assert not any(event.num_cached_tokens for event in others)
    return tokens, first.num_cached_tokens


def metric(pipeline: Pipeline, name: str) -> float:
    value = pipeline.workers[Role.PREFILL].registry.get_sample_value(f"triptych_{name}")
    assert value is not None, name
    return value


def stage_of(pipeline: Pipeline) -> PrefillStage:
    (stage,) = (each for each in pipeline.stages if isinstance(each, PrefillStage))
    return stage


def common_blocks(one: RequestDescriptor, other: RequestDescriptor) -> int:
    """Tokens in the full blocks that two prompts begin with."""
    pairs = zip(one.prompt_token_ids, other.prompt_token_ids, strict=False)
    num_equal = next((n for n, (a, b) in enumerate(pairs) if a != b), len(one.prompt_token_ids))
    return num_equal // BLOCK * BLOCK


async def test_a_prompt_asked_again_is_computed_from_its_last_block_on(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(1, 2)
    one, two = ask(prompts, "one", pictures), ask(prompts, "two", pictures)
    expected = list(engine.generate(one, pictures))
    num_cached = (one.num_tokens - 1) // BLOCK * BLOCK
    async with pipeline_with(folder) as pipeline:
        assert await answer(pipeline, one, pictures) == (expected, 0)
        assert await answer(pipeline, two, pictures) == (expected, num_cached)
        await pipeline.settled()
        assert metric(pipeline, "prefix_cache_queries_total") == 2 * one.num_tokens
        assert metric(pipeline, "prefix_cache_hits_total") == num_cached
        assert metric(pipeline, "prompt_tokens_cached_total") == num_cached
        assert metric(pipeline, "prefix_cache_blocks") == one.num_tokens // BLOCK
        assert metric(pipeline, "prefill_batch_tokens_sum") == 2 * one.num_tokens - num_cached


async def test_two_pictures_behind_one_text_never_meet(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    cat, dog = ([picture] for picture in plates(2, 2))
    asked = [ask(prompts, f"p{n}", pictures) for n, pictures in enumerate([cat, dog, dog, cat])]
    assert asked[0].prompt_token_ids == asked[1].prompt_token_ids
    before_picture = asked[0].media[0].offset // BLOCK * BLOCK
    whole = (asked[0].num_tokens - 1) // BLOCK * BLOCK
    async with pipeline_with(folder) as pipeline:
        for made, pictures, num_cached in zip(
            asked, [cat, dog, dog, cat], [0, before_picture, whole, whole], strict=True
        ):
            expected = list(engine.generate(made, pictures))
            assert await answer(pipeline, made, pictures) == (expected, num_cached)
    answers = [list(engine.generate(asked[0], pictures)) for pictures in (cat, dog)]
    assert answers[0] != answers[1], "the pictures must matter for this test to mean anything"


async def test_the_next_turn_of_a_chat_starts_from_the_turn_before(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(3, 1)
    first = ask(prompts, "turn1", pictures)
    async with pipeline_with(folder) as pipeline:
        said, _ = await answer(pipeline, first, pictures)
        longer = (*first.prompt_token_ids, *said, *first.prompt_token_ids[-4:])
        second = first.model_copy(update={"request_id": "turn2", "prompt_token_ids": longer})
        got, num_cached = await answer(pipeline, second, pictures)
        assert num_cached == first.num_tokens // BLOCK * BLOCK
    assert got == list(engine.generate(second, pictures))


async def test_a_covered_picture_is_neither_awaited_nor_pulled(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(4, 1)
    text = "What is this? " * 4  # so that all rows of the picture lie in full blocks
    one, two = (ask(prompts, name, pictures, text=text) for name in ("one", "two"))
    async with pipeline_with(folder) as pipeline:
        await answer(pipeline, one, pictures)
        await pipeline.settled()
        sent = pipeline.workers[Role.ENCODE].transport.counters().transfers_sent
        got, _ = await answer(pipeline, two, pictures, encode=False)
        assert pipeline.workers[Role.ENCODE].transport.counters().transfers_sent == sent == 1
    assert got == list(engine.generate(two, pictures))


async def test_a_picture_that_left_the_cache_while_its_prompt_waited_is_pulled_after_all(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(5, 1)
    text = "What is this? " * 4
    one, two = (ask(prompts, name, pictures, text=text) for name in ("one", "two"))
    async with pipeline_with(folder) as pipeline:
        await answer(pipeline, one, pictures)
        await pipeline.settled()
        scheduler = stage_of(pipeline)._scheduler
        assert scheduler.prefix is not None
        held = scheduler._pool.allocate(scheduler._pool.num_free - scheduler.prefix.num_idle)
        await pipeline.submit(two, pictures)
        async with asyncio.timeout(10):
            while not scheduler.num_waiting:
                await asyncio.sleep(0.005)
        scheduler._pool.allocate(scheduler.prefix.num_idle).free()  # evicts all of it
        held.free()
        stage_of(pipeline)._work.notify()
        tokens = await pipeline.tokens_of("two")
        await pipeline.settled()
    assert tokens == list(engine.generate(two, pictures))


async def test_without_the_cache_nothing_is_kept(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    one, two = ask(prompts, "one"), ask(prompts, "two")
    expected = list(engine.generate(one, []))
    async with pipeline_with(folder, prefix_cache=False) as pipeline:
        assert await answer(pipeline, one, []) == (expected, 0)
        assert await answer(pipeline, two, []) == (expected, 0)


async def test_output_that_is_not_a_number_empties_the_cache(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "What is this? " * 10
    async with pipeline_with(folder) as pipeline:
        await answer(pipeline, ask(prompts, "good", text=text), [])
        assert metric(pipeline, "prefix_cache_blocks") > 0
        with monkeypatch.context() as patch:
            patch.setattr(executor_module, "sample", lambda logits, rows: [None] * len(rows))
            await pipeline.submit(ask(prompts, "bad", text=text), [])
            (event,) = await pipeline.end_of("bad")
        assert isinstance(event, FailedEvent)
        assert event.kind is FailureKind.INTERNAL
        assert metric(pipeline, "prefix_cache_blocks") == 0
        assert (await answer(pipeline, ask(prompts, "again", text=text), []))[1] == 0
        await pipeline.settled()


@pytest.mark.parametrize("cache", [True, False])
async def test_chunked_prompts_give_the_tokens_of_whole_ones(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker, cache: bool
) -> None:
    jobs = {f"r{n}": plates(n % 5, n % 4) for n in range(10)}
    requests = {name: ask(prompts, name, pictures) for name, pictures in jobs.items()}
    settings = {"chunk_tokens": 24, "max_batch_tokens": 64, "prefix_cache": cache}
    async with pipeline_with(folder, **settings) as pipeline:
        await asyncio.gather(*(pipeline.submit(requests[n], jobs[n]) for n in jobs))
        answers = {name: await pipeline.tokens_of(name) for name in jobs}
        await pipeline.settled()
        assert metric(pipeline, "prefill_batch_tokens_count") > len(jobs) / 2
    for name, pictures in jobs.items():
        assert answers[name] == list(engine.generate(requests[name], pictures)), name


class Gate:
    """Holds the first forward pass over many tokens after its first layer until it is opened."""

    def __init__(self, min_tokens: int) -> None:
        self._min_tokens = min_tokens
        self._entered = threading.Event()
        self._opened = threading.Event()
        self.num_layers = 0

    @contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        forward_layers = LanguageModel.forward_layers

        def held(model: LanguageModel, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
            num_tokens = hidden.shape[0]  # of the last layer fewer come out
            hidden = forward_layers(model, hidden, *rest)
            if num_tokens >= self._min_tokens:
                self.num_layers += 1
                self._entered.set()
                assert self._opened.wait(20)
            return hidden

        with monkeypatch.context() as patch:
            patch.setattr(LanguageModel, "forward_layers", held)
            yield

    async def entered(self) -> None:
        """Wait until the pass is held."""
        await asyncio.to_thread(self._entered.wait, 20)

    async def open_when(self, ready: Callable[[], bool]) -> None:
        """Let the pass go on once `ready`."""
        async with asyncio.timeout(20):
            while not ready():
                await asyncio.sleep(0.005)
        self._opened.set()


async def test_an_urgent_prompt_is_computed_between_two_layers_of_another(
    folder: ModelFolder,
    engine: LocalEngine,
    prompts: PromptMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = ask(prompts, "long", text="What is this? " * 40)
    urgent = ask(prompts, "urgent", priority=-1)
    expected = {made.request_id: list(engine.generate(made, [])) for made in (long, urgent)}
    gate = Gate(min_tokens=100)
    async with pipeline_with(folder) as pipeline:
        scheduler = stage_of(pipeline)._scheduler
        with gate.installed(monkeypatch):
            await pipeline.submit(long, [])
            await gate.entered()
            await pipeline.submit(urgent, [])
            await gate.open_when(lambda: scheduler.num_waiting == 1)
            assert {n: await pipeline.tokens_of(n) for n in expected} == expected
        assert list(pipeline.events) == ["urgent", "long"]  # in the order of their first tokens
        assert metric(pipeline, "prefill_suspensions_total") == 1
        assert gate.num_layers == folder.spec.text.num_layers
        await pipeline.settled()


async def test_an_urgent_prompt_that_comes_while_a_pass_waits_for_cores_is_not_kept_waiting(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ask(prompts, "long", text="What is this? " * 40)
    urgent = ask(prompts, "urgent", priority=-1)
    async with pipeline_with(folder) as pipeline:
        stage = stage_of(pipeline)

        cores, asked = stage._worker.cores, list[RequestDescriptor]()
        turn = cores.turn

        @asynccontextmanager
        async def late_turn() -> AsyncIterator[Turn]:
            if not asked:
                asked.append(urgent)
                await pipeline.submit(urgent, [])
                async with asyncio.timeout(20):
                    while stage._scheduler.num_waiting != 1:
                        await asyncio.sleep(0.005)
            async with turn() as mine:
                yield mine

        monkeypatch.setattr(cores, "turn", late_turn)
        await pipeline.submit(long, [])
        for made in (long, urgent):
            assert len(await pipeline.tokens_of(made.request_id)) == 6
        assert list(pipeline.events) == ["urgent", "long"]  # in the order of their first tokens
        await pipeline.settled()


async def test_a_cancelled_prompt_stops_at_the_next_layer(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ask(prompts, "long", text="What is this? " * 40)
    gate = Gate(min_tokens=100)
    async with pipeline_with(folder) as pipeline:
        stage = stage_of(pipeline)
        with gate.installed(monkeypatch):
            await pipeline.submit(long, [])
            await gate.entered()
            await pipeline.cancel("long")
            await gate.open_when(stage._scheduler.should_preempt)
            await pipeline.settled()
        assert gate.num_layers == 1
        assert "long" not in pipeline.events
        assert metric(pipeline, "prefix_cache_blocks") == 0
        assert len((await answer(pipeline, ask(prompts, "next"), []))[0]) == 6


async def test_a_suspended_prompt_that_is_cancelled_gives_its_blocks_back(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The urgent prompt is held in its turn, so that the other one is suspended meanwhile."""
    long = ask(prompts, "long", text="What is this? " * 40)
    urgent = ask(prompts, "urgent", text="What is this? " * 20, priority=-1)
    outer, inner = Gate(long.num_tokens), Gate(urgent.num_tokens)
    async with pipeline_with(folder, prefix_cache=False) as pipeline:
        scheduler = stage_of(pipeline)._scheduler
        with inner.installed(monkeypatch), outer.installed(monkeypatch):
            inner._min_tokens = 10**9  # not for the long one
            await pipeline.submit(long, [])
            await outer.entered()
            await pipeline.submit(urgent, [])
            async with asyncio.timeout(20):
                while scheduler.num_waiting != 1:
                    await asyncio.sleep(0.005)
            inner._min_tokens, outer._min_tokens = urgent.num_tokens, 10**9
            outer._opened.set()
            await inner.entered()
            assert scheduler.num_suspended == 1
            await pipeline.cancel("long")
            only_urgent = scheduler.blocks_for(urgent.num_tokens)
            await inner.open_when(lambda: scheduler._pool.num_used == only_urgent)
            assert len(await pipeline.tokens_of("urgent")) == 6
            await pipeline.settled()
        assert "long" not in pipeline.events
