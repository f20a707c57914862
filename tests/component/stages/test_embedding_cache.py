"""One picture is encoded once, whoever asks; nobody waits for the dead; caches change no token."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bench.prompts import PromptMaker
from services.encoder.settings import EncoderSettings
from services.gateway.dispatch import Dispatcher, open_queues
from services.local_engine import LocalEngine
from services.prefill.settings import PrefillSettings
from shared.bus import subjects
from shared.messages.codec import encode
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams, WorkerRef
from shared.messages.refs import EmbeddingClaim
from shared.runtime.embedding_index import EmbeddingIndex
from shared.runtime.host import ModelFolder
from shared.runtime.settings import ModelSettings
from tests.support.demo_engine import plates
from tests.support.registrations import registered
from tests.support.stages import GATEWAY, MEDIA, MODEL, Pipeline, running_pipeline

NUM_TOKENS = 6


def ask(
    prompts: PromptMaker, name: str, pictures: Sequence[bytes], text: str = "What is this?"
) -> RequestDescriptor:
    made = prompts.request(pictures, text, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))
    return made.model_copy(update={"request_id": name, "gateway": GATEWAY, "model": MODEL})


class System:
    """The stages behind a real dispatcher, without a prefix cache unless asked for."""

    def __init__(self, pipeline: Pipeline, dispatcher: Dispatcher) -> None:
        self.pipeline = pipeline
        self.dispatcher = dispatcher
        self.outcomes: Counter[str] = Counter()

    async def submit(self, request: RequestDescriptor, pictures: Sequence[bytes]) -> None:
        media = {item.sha256: data for item, data in zip(request.media, pictures, strict=True)}
        await self.dispatcher.submit(request, media)

    async def answer(self, request: RequestDescriptor, pictures: Sequence[bytes]) -> list[int]:
        await self.submit(request, pictures)
        return await self.pipeline.tokens_of(request.request_id)

    def count(self, role: Role, name: str, **labels: str) -> float:
        registry = self.pipeline.workers[role].registry
        return registry.get_sample_value(f"triptych_{name}_total", labels) or 0.0

    def sources(self) -> dict[str, float]:
        found = {
            source: self.count(Role.PREFILL, "prompt_embeddings", source=source)
            for source in ("prefix", "pool", "joined", "pulled")
        }
        return {source: count for source, count in found.items() if count}


@asynccontextmanager
async def running(
    folder: ModelFolder, *, encoder: dict[str, Any] | None = None, **prefill: Any
) -> AsyncIterator[System]:
    model = ModelSettings(served_name=MODEL)
    prefill = {"prefix_cache": False, **prefill}
    async with running_pipeline(
        folder,
        encoder=EncoderSettings(model=model, drain_s=1.0, **(encoder or {})),
        prefill=PrefillSettings(model=model, drain_s=1.0, **prefill),
    ) as pipeline:
        bus = pipeline.bus
        cancellations = pipeline.workers[Role.DECODE].cancellations
        index = EmbeddingIndex(
            await bus.key_value(subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S),
            is_gone=lambda worker: False,
            is_cancelled=cancellations.is_cancelled,
        )
        outcomes: Counter[str] = Counter()
        dispatcher = Dispatcher(
            await open_queues(bus, MODEL),
            await bus.object_store(subjects.MEDIA_BUCKET, **MEDIA),
            index,
            store_ttl_s=600.0,
            count=lambda outcome: outcomes.update([outcome]),
        )
        following = asyncio.create_task(index.run())
        system = System(pipeline, dispatcher)
        system.outcomes = outcomes
        yield system
        await pipeline.settled()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_fifty_requests_about_one_picture_are_one_run_of_the_tower(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    picture = plates(1, 1)
    requests = [ask(prompts, f"r{n}", picture) for n in range(50)]
    async with running(folder) as system:
        await asyncio.gather(*(system.submit(request, picture) for request in requests))
        answers = [await system.pipeline.tokens_of(r.request_id) for r in requests]
        assert system.outcomes["queued"] == 1
        assert system.outcomes.total() == 50
        assert system.count(Role.ENCODE, "embeddings_encoded") == 1
        assert system.pipeline.workers[Role.ENCODE].transport.counters().transfers_sent == 1
        sources = system.sources()
        assert sources["pulled"] == 1
        assert sum(sources.values()) == 50
    assert all(answer == list(engine.generate(requests[0], picture)) for answer in answers)


async def test_a_warm_cache_asks_nobody_and_changes_no_token(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(2, 3)
    cold = ask(prompts, "cold", pictures)
    warm = ask(prompts, "warm", pictures[::-1], "And in this order?")
    async with running(folder) as system:
        assert await system.answer(cold, pictures) == list(engine.generate(cold, pictures))
        sent = system.pipeline.workers[Role.ENCODE].transport.counters().transfers_sent
        assert await system.answer(warm, pictures[::-1]) == list(
            engine.generate(warm, pictures[::-1])
        )
        assert system.outcomes == {"queued": 3, "cached": 3}
        assert system.sources() == {"pulled": 3, "pool": 3}
        assert system.pipeline.workers[Role.ENCODE].transport.counters().transfers_sent == sent
        assert system.count(Role.ENCODE, "embeddings_encoded") == 3


async def test_a_prefill_worker_that_keeps_nothing_pulls_from_the_encoders_cache(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(3, 1)
    async with running(folder, embedding_pool_bytes=1) as system:
        for name in ("one", "two", "three"):
            made = ask(prompts, name, pictures)
            assert await system.answer(made, pictures) == list(engine.generate(made, pictures))
        assert system.outcomes == {"queued": 1, "cached": 2}
        assert system.sources() == {"pulled": 3}
        assert system.count(Role.ENCODE, "embeddings_encoded") == 1


async def test_a_covered_picture_counts_as_found_by_prefix(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    pictures = plates(4, 1)
    async with running(folder, prefix_cache=True) as system:
        for name in ("one", "two"):
            await system.answer(ask(prompts, name, pictures, "What is this? " * 4), pictures)
        assert system.sources() == {"pulled": 1, "prefix": 1}


async def test_an_evicted_embedding_is_announced_no_longer_and_encoded_again(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    one, two = ([picture] for picture in plates(5, 2))
    made = ask(prompts, "size", one)
    room = made.media[0].num_tokens * folder.spec.embedding_width * 4
    encoder = {"embedding_pool_bytes": room}
    async with running(folder, encoder=encoder, embedding_pool_bytes=1) as system:
        for number, pictures in enumerate([one, two, one]):
            made = ask(prompts, f"r{number}", pictures)
            assert await system.answer(made, pictures) == list(engine.generate(made, pictures))
            await system.pipeline.settled()  # its lease is over, so it may be evicted
        assert system.outcomes == {"queued": 3}
        assert system.count(Role.ENCODE, "embeddings_encoded") == 3


async def test_whoever_joined_an_encoder_that_dies_is_answered_all_the_same(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    pictures = plates(6, 1)
    ghost = WorkerRef(name="ghost", incarnation=1)
    joined = [ask(prompts, f"joined{n}", pictures) for n in range(5)]
    async with running(folder) as system:
        bus = system.pipeline.bus
        workers = await bus.key_value(subjects.WORKERS_BUCKET, ttl_s=6.0)
        await workers.put("ghost", encode(registered(ghost, Role.ENCODE, model=MODEL)))
        bucket = await bus.key_value(subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S)
        claim = EmbeddingClaim(
            content_key=joined[0].media[0].content_key,
            request_id="of-another",
            attempt=0,
            deadline_unix_s=joined[0].deadline_unix_s,
            encoder=ghost,
        )
        await bucket.put(claim.content_key, encode(claim))
        await asyncio.sleep(0.05)
        await asyncio.gather(*(system.submit(request, pictures) for request in joined))
        assert system.outcomes == {"joined": 5}
        await asyncio.sleep(0.5)
        assert not system.pipeline.events  # they wait while it lives
        await workers.delete("ghost")
        answers = [await system.pipeline.tokens_of(r.request_id) for r in joined]
        assert system.count(Role.ENCODE, "embeddings_encoded") == 1
        assert system.count(Role.PREFILL, "embeddings_asked_again") == 1
    assert all(answer == list(engine.generate(joined[0], pictures)) for answer in answers)


async def test_a_request_that_is_cancelled_in_the_queue_takes_no_other_with_it(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    """Its task is dropped when it is taken, so the embedding that others wait for never comes."""
    pictures = plates(7, 1)
    joined = ask(prompts, "joined", pictures)
    async with running(folder) as system:
        bucket = await system.pipeline.bus.key_value(
            subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S
        )
        claim = EmbeddingClaim(
            content_key=joined.media[0].content_key,
            request_id="cancelled",
            attempt=0,
            deadline_unix_s=joined.deadline_unix_s,
        )
        await bucket.put(claim.content_key, encode(claim))
        await asyncio.sleep(0.05)
        await system.submit(joined, pictures)
        await asyncio.sleep(0.5)
        assert not system.pipeline.events
        await system.pipeline.cancel("cancelled")
        assert await system.pipeline.tokens_of("joined") == list(engine.generate(joined, pictures))
        assert system.outcomes == {"joined": 1}
        assert system.count(Role.PREFILL, "embeddings_asked_again") == 1
