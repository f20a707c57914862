"""Prompts that are computed while their later pictures are encoded: same tokens, nothing held."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from services.prefill.settings import PrefillSettings
from services.prefill.stage import PrefillStage
from shared.bus import subjects
from shared.errors import FailureKind
from shared.messages.codec import encode
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams
from shared.messages.events import FailedEvent, TokenEvent
from shared.messages.refs import EmbeddingClaim, EmbeddingRef
from shared.messages.work import EncodeTask
from shared.model.decoder import LanguageModel
from shared.runtime.host import ModelFolder
from shared.runtime.intake import Ticket
from shared.runtime.settings import ModelSettings
from shared.transport.base import Segment
from tests.support.demo_engine import plates
from tests.support.stages import GATEWAY, MODEL, Pipeline, running_pipeline

BLOCK = 16
LONG = "What is this? " * 12


def ask(
    prompts: PromptMaker, name: str, pictures: Sequence[bytes], text: str = LONG, **changes: Any
) -> RequestDescriptor:
    """A text, the pictures, and a question behind them."""
    sampling = SamplingParams(temperature=0.0, max_tokens=6)
    made = prompts.request(pictures, "And this?", sampling, preface=text)
    return made.model_copy(
        update={"request_id": name, "gateway": GATEWAY, "model": MODEL, **changes}
    )


class Late:
    """A running pipeline in which some pictures of a request come when the test says so."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        (self.stage,) = (each for each in pipeline.stages if isinstance(each, PrefillStage))
        self.scheduler = self.stage._scheduler

    async def submit(
        self, request: RequestDescriptor, pictures: Sequence[bytes], late: Sequence[int]
    ) -> None:
        """Queue the request; somebody claims to be at work on the pictures in `late`."""
        for number in late:
            item = request.media[number]
            claim = EmbeddingClaim(
                content_key=item.content_key,
                request_id="another",
                attempt=0,
                deadline_unix_s=request.deadline_unix_s,
            )
            await self._announce(item.content_key, claim)
        await self.pipeline.submit(request, pictures, with_encode=False)
        for number in range(len(request.media)):
            if number not in late:
                await self.encode(request, number)

    async def encode(self, request: RequestDescriptor, number: int) -> None:
        """Queue the encode task of one picture."""
        name = subjects.work(Role.ENCODE, MODEL)
        tasks = await self.pipeline.bus.work_queue(name, EncodeTask)
        task = EncodeTask.of(request, request.media[number])
        await tasks.put(task, message_id=f"{request.request_id}:{request.attempt}:{number}")

    async def announce_wrongly(self, request: RequestDescriptor, number: int) -> None:
        """Announce an embedding of one row too many."""
        item, worker = request.media[number], self.pipeline.workers[Role.ENCODE]
        segment = Segment(8, lambda: bytes(8))
        tensor = worker.transport.expose(
            "wrong", [segment], holders=["nobody"], on_release=lambda: None
        )
        ref = EmbeddingRef(
            content_key=item.content_key,
            num_tokens=item.num_tokens + 1,
            hidden_size=self.pipeline.folder.spec.embedding_width,
            tensor=tensor,
        )
        await self._announce(item.content_key, ref)

    async def computed(self, request: RequestDescriptor, number: int) -> None:
        """Wait until all is computed in front of one picture, and nothing is under way."""
        wanted = request.media[number].offset // BLOCK * BLOCK
        prefix = self.scheduler.prefix
        assert prefix is not None
        keys = prefix.keys_of(request.prompt_token_ids, request.media)
        await until(lambda: prefix.num_cached_tokens(keys, request.num_tokens) >= wanted)
        await until(lambda: not self.scheduler._running)

    @property
    def num_early_tokens(self) -> float:
        registry = self.pipeline.workers[Role.PREFILL].registry
        return registry.get_sample_value("triptych_prompt_tokens_early_total") or 0.0

    @property
    def num_held(self) -> tuple[int, int]:
        """Blocks in use, and bytes of landing memory."""
        return self.scheduler._pool.num_used, self.stage._landing._budget.reserved_bytes

    async def _announce(self, key: str, entry: EmbeddingClaim | EmbeddingRef) -> None:
        bucket = await self.pipeline.bus.key_value(
            subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S
        )
        await bucket.put(key, encode(entry))


@asynccontextmanager
async def running(folder: ModelFolder, **settings: Any) -> AsyncIterator[Late]:
    settings = {"min_early_tokens": BLOCK, **settings}
    made = PrefillSettings(model=ModelSettings(served_name=MODEL), drain_s=1.0, **settings)
    async with running_pipeline(folder, prefill=made) as pipeline:
        yield Late(pipeline)
        await pipeline.settled()


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


class Gate:
    """Holds the next forward pass over many tokens behind its first layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, min_tokens: int, error: str = "") -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        forward_layers = LanguageModel.forward_layers

        def held(model: LanguageModel, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
            hidden = forward_layers(model, hidden, *rest)
            if hidden.shape[0] >= min_tokens and not self.opened.is_set():
                self.entered.set()
                assert self.opened.wait(60)
                if error:
                    raise RuntimeError(error)
            return hidden

        monkeypatch.setattr(LanguageModel, "forward_layers", held)


@pytest.mark.parametrize("chunk_tokens", [0, 40])
@pytest.mark.parametrize("transfer", ["whole", "per-chunk", "layer-wise"])
async def test_what_is_in_front_of_a_late_picture_is_computed_before_it_lands(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker, transfer: str, chunk_tokens: int
) -> None:
    pictures = plates(1, 3)
    made = ask(prompts, "late", pictures)
    async with running(folder, kv_transfer=transfer, chunk_tokens=chunk_tokens) as late:
        outlet = late.stage._outlet
        assert outlet._plan is not None
        outlet._plan = outlet._exposer._plan = dataclasses.replace(outlet._plan, min_piece_bytes=1)
        await late.submit(made, pictures, late=[1, 2])
        await late.computed(made, 1)
        early = late.num_early_tokens
        assert early >= made.media[1].offset // BLOCK * BLOCK
        assert late.num_held[0] == 0, "who waits holds no block"
        await late.encode(made, 2)
        await late.encode(made, 1)
        assert await late.pipeline.tokens_of("late") == list(engine.generate(made, pictures))
        (first, *_) = late.pipeline.events["late"]
        assert isinstance(first, TokenEvent)
        assert first.num_cached_tokens == 0, "its own work is not what it found"
        sample = late.pipeline.workers[Role.PREFILL].registry.get_sample_value
        assert sample("triptych_prompt_tokens_total") == made.num_tokens
        assert sample("triptych_prefix_cache_hits_total") == 0


async def test_a_decoder_hears_of_a_prompt_when_its_last_picture_has_landed(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[Ticket] = []
    monkeypatch.setattr(Ticket, "began", lambda ticket: began.append(ticket))
    pictures = plates(2, 2)
    made = ask(prompts, "late", pictures)
    async with running(folder) as late:
        await late.submit(made, pictures, late=[1])
        await late.computed(made, 1)
        await asyncio.sleep(0.1)
        counters = late.pipeline.workers[Role.PREFILL].transport.counters()
        assert counters.leases_open == counters.transfers_sent == 0
        num_began = len(began)  # of the encoder
        assert num_began == 1
        await late.encode(made, 1)
        assert await late.pipeline.tokens_of("late") == list(engine.generate(made, pictures))
        assert len(began) > num_began + 1


async def test_with_the_overlap_off_nothing_is_computed_early(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(3, 2)
    made = ask(prompts, "late", pictures)
    async with running(folder, overlap_encode=False) as late:
        await late.submit(made, pictures, late=[1])
        await asyncio.sleep(0.5)
        assert late.scheduler.num_waiting == late.num_early_tokens == 0
        await late.encode(made, 1)
        assert await late.pipeline.tokens_of("late") == list(engine.generate(made, pictures))
        assert late.num_early_tokens == 0


async def test_a_warm_beginning_is_found_and_what_is_behind_it_computed_early(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(4, 3)
    short, made = ask(prompts, "short", pictures[:1]), ask(prompts, "late", pictures)
    again = ask(prompts, "again", pictures)
    common = made.media[0].stop // BLOCK * BLOCK
    async with running(folder, chunk_tokens=40) as late:
        await late.submit(short, pictures[:1], late=[])
        await late.pipeline.tokens_of("short")
        before = late.num_early_tokens
        await late.submit(made, pictures, late=[2])
        await late.computed(made, 2)
        assert 0 < late.num_early_tokens - before <= made.media[2].offset - common
        await late.encode(made, 2)
        expected = list(engine.generate(made, pictures))
        assert await late.pipeline.tokens_of("late") == expected
        assert late.pipeline.events["late"][0].num_cached_tokens == common
        await late.submit(again, pictures, late=[])
        assert await late.pipeline.tokens_of("again") == expected


async def test_a_picture_that_can_not_be_had_fails_the_request_and_leaves_nothing(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(5, 2)
    made, after = ask(prompts, "unlucky", pictures), ask(prompts, "after", pictures[:1])
    async with running(folder) as late:
        await late.submit(made, pictures, late=[1])
        await late.computed(made, 1)
        assert late.num_held[1] > 0
        await late.announce_wrongly(made, 1)
        (failure,) = await late.pipeline.end_of("unlucky")
        assert isinstance(failure, FailedEvent)
        assert failure.kind is FailureKind.INTERNAL
        assert "the prompt has room for" in failure.message
        await until(lambda: late.num_held == (0, 0))
        assert not late.scheduler._places
        late.pipeline.workers[Role.ENCODE].transport.revoke("wrong")
        await late.submit(after, pictures[:1], late=[])
        assert await late.pipeline.tokens_of("after") == list(engine.generate(after, pictures[:1]))


async def test_a_step_that_fails_early_ends_the_wait_for_the_picture(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = plates(6, 2)
    gate = Gate(monkeypatch, BLOCK, error="device lost")
    async with running(folder) as late:
        await late.submit(ask(prompts, "unlucky", pictures), pictures, late=[1])
        await asyncio.to_thread(gate.entered.wait, 30)
        gate.opened.set()
        (failure,) = await late.pipeline.end_of("unlucky")
        assert isinstance(failure, FailedEvent)
        assert (failure.kind, failure.retryable) == (FailureKind.WORKER_LOST, True)
        await until(lambda: late.num_held == (0, 0))


@pytest.mark.parametrize("within_a_step", [True, False])
async def test_a_request_that_is_cancelled_before_its_picture_lands_leaves_nothing(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch, within_a_step: bool
) -> None:
    pictures = plates(7, 2)
    made = ask(prompts, "gone", pictures)
    gate = Gate(monkeypatch, BLOCK)
    async with running(folder) as late:
        await late.submit(made, pictures, late=[1])
        await asyncio.to_thread(gate.entered.wait, 30)
        if not within_a_step:
            gate.opened.set()
            await late.computed(made, 1)
        await late.pipeline.cancel("gone")
        if within_a_step:
            await until(late.scheduler.should_preempt)
            gate.opened.set()
        await until(lambda: late.num_held == (0, 0))
        assert not late.scheduler._places
        assert "gone" not in late.pipeline.events
        await late.encode(made, 1)  # too late: nobody waits for it
        await asyncio.sleep(0.1)


async def test_a_later_attempt_starts_from_what_the_earlier_one_computed(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(8, 2)
    made = ask(prompts, "twice", pictures)
    again = made.model_copy(update={"attempt": 1})
    async with running(folder) as late:
        await late.submit(made, pictures, late=[1])
        await late.computed(made, 1)
        await late.pipeline.cancel("twice", attempt=0)
        await late.submit(again, pictures, late=[1])
        await late.encode(again, 1)
        assert await late.pipeline.tokens_of("twice") == list(engine.generate(made, pictures))
        events = late.pipeline.events["twice"]
        assert {event.attempt for event in events} == {1}
        assert events[0].num_cached_tokens == made.media[1].offset // BLOCK * BLOCK


async def test_a_prompt_that_is_complete_does_not_wait_for_an_early_step(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = plates(9, 1)
    made = ask(prompts, "late", pictures)
    other = ask(prompts, "other", [], text="Who?")
    gate = Gate(monkeypatch, made.media[0].offset // BLOCK * BLOCK)
    async with running(folder) as late:
        await late.submit(made, pictures, late=[0])
        await asyncio.to_thread(gate.entered.wait, 30)
        await late.submit(other, [], late=[])
        await until(lambda: late.scheduler.num_waiting == 1)
        gate.opened.set()
        assert await late.pipeline.tokens_of("other") == list(engine.generate(other, []))
        await late.encode(made, 0)
        assert await late.pipeline.tokens_of("late") == list(engine.generate(made, pictures))
        assert late.num_early_tokens > 0


async def test_those_who_wait_for_pictures_take_no_room_from_others(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    """Four prompts that fill the pool twice wait, and every block of it is there for a fifth."""
    pictures = plates(10, 4)
    waiting = [
        ask(prompts, f"w{n}", [picture], f"{n} {LONG}") for n, picture in enumerate(pictures)
    ]
    other = ask(prompts, "other", [], text=LONG * 2)
    num_blocks = -(-other.num_tokens // BLOCK)
    assert sum(-(-made.num_tokens // BLOCK) for made in waiting) > 2 * num_blocks
    kv_bytes = num_blocks * folder.geometry(BLOCK).bytes_per_block
    async with running(folder, kv_bytes=kv_bytes) as late:
        for made, picture in zip(waiting, pictures, strict=True):
            await late.submit(made, [picture], late=[0])
        await until(lambda: late.num_early_tokens > 0 and not late.scheduler._running)
        await late.submit(other, [], late=[])
        assert await late.pipeline.tokens_of("other") == list(engine.generate(other, []))
        for made in waiting:
            await late.encode(made, 0)
        for made, picture in zip(waiting, pictures, strict=True):
            expected = list(engine.generate(made, [picture]))
            assert await late.pipeline.tokens_of(made.request_id) == expected
