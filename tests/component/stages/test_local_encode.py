"""A prefill worker that hosts an encoder: pictures past a long queue, and not past a short one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from shared.bus import subjects
from shared.messages.codec import encode
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams, WorkerRef
from shared.messages.refs import EmbeddingClaim
from shared.runtime.host import ModelFolder
from tests.support.demo_engine import plates
from tests.support.registrations import registered
from tests.support.stages import GATEWAY, MODEL, Pipeline, running_pipeline

BUSY = WorkerRef(name="busy", incarnation=1)
PICTURE = plates(11, 1)


@asynccontextmanager
async def beside_a_busy_encoder(folder: ModelFolder) -> AsyncIterator[Pipeline]:
    """This worker and one more are registered; the other takes nothing."""
    async with running_pipeline(folder, topology="1EP 1D") as pipeline:
        bucket = await pipeline.bus.key_value(subjects.WORKERS_BUCKET, ttl_s=60.0)
        for me in (BUSY, pipeline.workers[Role.PREFILL].me):
            await bucket.put(me.name, encode(registered(me, Role.ENCODE, model=MODEL)))
        yield pipeline
        await pipeline.settled()


async def claim(
    pipeline: Pipeline, key: str, num_patches: int, encoder: WorkerRef | None = None
) -> None:
    """Somebody's task for it is queued, or with an encoder; no task is really there."""
    bucket = await pipeline.bus.key_value(
        subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S
    )
    entry = EmbeddingClaim(
        content_key=key,
        request_id="of-another",
        attempt=0,
        deadline_unix_s=4e9,
        encoder=encoder,
        num_patches=num_patches,
    )
    await bucket.put(key, encode(entry))


def ask(prompts: PromptMaker) -> RequestDescriptor:
    made = prompts.request(PICTURE, "What?", SamplingParams(temperature=0.0, max_tokens=6))
    return made.model_copy(update={"gateway": GATEWAY, "model": MODEL})


def count(pipeline: Pipeline, name: str) -> float:
    registry = pipeline.workers[Role.PREFILL].registry
    return registry.get_sample_value(f"triptych_{name}_total") or 0.0


async def test_a_picture_behind_a_long_queue_is_encoded_here(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    request = ask(prompts)
    (item,) = request.media
    async with beside_a_busy_encoder(folder) as pipeline:
        await claim(pipeline, "ahead", 2 * item.num_patches + 1, BUSY)
        await claim(pipeline, item.content_key, item.num_patches)
        await asyncio.sleep(0.1)
        await pipeline.submit(request, PICTURE, with_encode=False)
        answer = await pipeline.tokens_of(request.request_id)
        assert count(pipeline, "embeddings_encoded_here") == 1
        assert count(pipeline, "embeddings_asked_again") == 0
        # Its task, when it comes after all, finds the embedding.
        assert count(pipeline, "embeddings_encoded") == 1
        await pipeline.submit(request.model_copy(update={"request_id": "late"}), PICTURE)
        assert await pipeline.tokens_of("late") == answer
        assert count(pipeline, "embeddings_encoded") == 1
    assert answer == list(engine.generate(request, PICTURE))


async def test_a_picture_whose_turn_comes_soon_waits_for_it(
    folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    request = ask(prompts)
    (item,) = request.media
    async with beside_a_busy_encoder(folder) as pipeline:
        await claim(pipeline, "ahead", 2 * item.num_patches, BUSY)
        await claim(pipeline, item.content_key, item.num_patches)
        await asyncio.sleep(0.1)
        await pipeline.submit(request, PICTURE, with_encode=False)
        await asyncio.sleep(0.6)
        assert not pipeline.events
        # What is in front of it grows: now it would be late.
        await claim(pipeline, "ahead", 4 * item.num_patches, BUSY)
        assert await pipeline.tokens_of(request.request_id) == list(
            engine.generate(request, PICTURE)
        )
        assert count(pipeline, "embeddings_encoded_here") == 1


async def test_a_picture_that_another_encoder_has_begun_is_left_to_it(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    request = ask(prompts)
    (item,) = request.media
    async with beside_a_busy_encoder(folder) as pipeline:
        await claim(pipeline, "ahead", 1_000_000, BUSY)
        await claim(pipeline, item.content_key, item.num_patches, BUSY)
        await asyncio.sleep(0.1)
        await pipeline.submit(request, PICTURE, with_encode=False)
        await asyncio.sleep(0.6)
        assert not pipeline.events
        assert count(pipeline, "embeddings_encoded_here") == 0
        await pipeline.cancel(request.request_id)
