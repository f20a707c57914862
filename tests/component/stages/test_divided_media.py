"""Videos and pictures that several encoders share: the same tokens, and every part made once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.encoder.settings import EncoderSettings
from services.gateway.dispatch import Dispatcher, open_queues
from services.local_engine import LocalEngine
from services.prefill.settings import PrefillSettings
from shared.bus import subjects
from shared.demo import model_dir
from shared.messages.codec import encode
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, WorkerRef
from shared.messages.refs import EmbeddingClaim, EmbeddingDivision
from shared.modelspec import ModelSpec
from shared.runtime.embedding_index import EmbeddingIndex
from shared.runtime.host import ModelFolder
from shared.runtime.media_parts import parts_of
from shared.runtime.settings import ModelSettings
from shared.text.prompt import Prompt
from tests.support.stages import MEDIA, MODEL, Pipeline, greedy_request, running_pipeline
from tests.support.video_folders import clip_file, media_prompt
from tests.support.vision_folders import build_vision_folder, our_prompt, picture_file

CLIP, OTHER_CLIP = (clip_file(60, size=(56, 112), seed=seed) for seed in (5, 3))
TWO = [WorkerRef(name=f"encoder-{number}", incarnation=1) for number in range(2)]


def opened(directory: Path) -> ModelFolder:
    spec = ModelSpec.load(directory)
    return ModelFolder(directory, spec, spec.dtype, "cpu")


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    """The demo model: it was trained, so its answers depend on what it sees."""
    return opened(model_dir())


@pytest.fixture(scope="module")
def answer(folder: ModelFolder) -> list[int]:
    """What one process says about the clip."""
    made = about_clip(folder, "local")
    said, other = (list(LocalEngine(folder).generate(made, [clip])) for clip in (CLIP, OTHER_CLIP))
    assert said != other, "the answer does not depend on the clip"
    return said


def request_of(prompt: Prompt, name: str) -> RequestDescriptor:
    return greedy_request(prompt, name, max_tokens=8)


def about_clip(folder: ModelFolder, name: str) -> RequestDescriptor:
    return request_of(media_prompt(folder.directory, [CLIP, "What is on the plate?"]), name)


class System:
    """Two encoders behind a real dispatcher that believes both are idle; no prefix cache."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.outcomes: Counter[str] = Counter()

    async def open(self) -> asyncio.Task[None]:
        bus = self.pipeline.bus
        self.index = EmbeddingIndex(
            await bus.key_value(subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S),
            is_gone=lambda worker: False,
            is_cancelled=self.pipeline.workers[Role.DECODE].cancellations.is_cancelled,
        )
        self.dispatcher = Dispatcher(
            await open_queues(bus, MODEL),
            await bus.object_store(subjects.MEDIA_BUCKET, **MEDIA),
            self.index,
            store_ttl_s=600.0,
            count=lambda outcome: self.outcomes.update([outcome]),
            encoders=lambda: TWO,
            min_part_patches=1,
        )
        return asyncio.create_task(self.index.run())

    async def submit(self, request: RequestDescriptor, files: Sequence[bytes] = (CLIP,)) -> None:
        media = {item.sha256: data for item, data in zip(request.media, files, strict=True)}
        await self.dispatcher.submit(request, media)

    async def answer(
        self, request: RequestDescriptor, files: Sequence[bytes] = (CLIP,)
    ) -> list[int]:
        await self.submit(request, files)
        tokens = await self.pipeline.tokens_of(request.request_id)
        assert tokens, self.pipeline.events[request.request_id]
        return tokens

    def num_encoded(self) -> list[float]:
        """By each encoder."""
        return [
            worker.registry.get_sample_value("triptych_embeddings_encoded_total") or 0.0
            for worker in self.pipeline.everyone
            if Role.ENCODE in worker.stages
        ]

    def num_asked_again(self) -> float:
        registry = self.pipeline.workers[Role.PREFILL].registry
        return registry.get_sample_value("triptych_embeddings_asked_again_total") or 0.0


@asynccontextmanager
async def running(
    folder: ModelFolder,
    *,
    encoder: dict[str, Any] | None = None,
    topology: str = "2E 1P 1D",
    **prefill: Any,
) -> AsyncIterator[System]:
    model = ModelSettings(served_name=MODEL)
    async with running_pipeline(
        folder,
        # One task at a time, so that neither takes the other's.
        encoder=EncoderSettings(model=model, drain_s=1.0, max_held=1, **(encoder or {})),
        prefill=PrefillSettings(model=model, drain_s=1.0, prefix_cache=False, **prefill),
        topology=topology,
    ) as pipeline:
        system = System(pipeline)
        following = await system.open()
        yield system
        await pipeline.settled()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_two_encoders_share_a_video(folder: ModelFolder, answer: list[int]) -> None:
    async with running(folder) as system:
        assert await system.answer(about_clip(folder, "first")) == answer
        assert system.outcomes == {"divided": 1}
        assert system.num_encoded() == [1, 1]
        # The prefill worker has put it together, so the next request asks nobody.
        assert await system.answer(about_clip(folder, "second")) == answer
        assert system.outcomes == {"divided": 1, "cached": 1}
        assert sum(system.num_encoded()) == 2
        transfers = [w.transport.counters().transfers_sent for w in system.pipeline.everyone[:2]]
        assert transfers == [1, 1]


async def test_a_divided_item_is_found_by_its_parts(folder: ModelFolder, answer: list[int]) -> None:
    async with running(folder, embedding_pool_bytes=1) as system:
        for name in ("first", "second"):
            assert await system.answer(about_clip(folder, name)) == answer
        assert system.outcomes == {"divided": 1, "cached": 1}
        assert system.num_encoded() == [1, 1]


async def test_many_requests_join_the_parts_under_way(
    folder: ModelFolder, answer: list[int]
) -> None:
    requests = [about_clip(folder, f"r{number}") for number in range(10)]
    async with running(folder) as system:
        await asyncio.gather(*(system.submit(request) for request in requests))
        answers = [await system.pipeline.tokens_of(each.request_id) for each in requests]
        assert system.outcomes["divided"] == 1
        assert system.outcomes.total() == 10
        assert "queued" not in system.outcomes
        assert sum(system.num_encoded()) == 2
        assert system.num_asked_again() == 0
    assert answers == [answer] * 10


async def test_an_encoder_with_room_for_one_part_makes_all_of_them(
    folder: ModelFolder, answer: list[int]
) -> None:
    """The first part's room is needed for the second, before the whole is there."""
    made = about_clip(folder, "alone")
    part_bytes = made.media[0].num_tokens // 2 * folder.spec.embedding_width * 4
    async with running(
        folder, encoder={"embedding_pool_bytes": part_bytes}, topology="1E 1P 1D"
    ) as system:
        assert await system.answer(made) == answer
        assert system.outcomes == {"divided": 1}
        assert system.num_encoded() == [2]


async def test_only_the_part_that_was_evicted_is_queued_again(
    folder: ModelFolder, answer: list[int]
) -> None:
    made = about_clip(folder, "size")
    part_bytes = made.media[0].num_tokens // 2 * folder.spec.embedding_width * 4
    small = [picture_file(21, 37)]
    encoder = {"embedding_pool_bytes": part_bytes}
    async with running(folder, encoder=encoder, embedding_pool_bytes=1) as system:
        assert await system.answer(about_clip(folder, "first")) == answer
        await system.pipeline.settled()
        other = request_of(media_prompt(folder.directory, [*small, "and this?"]), "other")
        await system.answer(other, small)  # takes the room of one of the parts
        await system.pipeline.settled()
        assert system.outcomes == {"divided": 1, "queued": 1}
        assert sum(system.num_encoded()) == 3
        assert await system.answer(about_clip(folder, "again")) == answer
        assert system.outcomes == {"divided": 1, "queued": 2}
        # One more where the encoder of the other part took the task, and its room for it.
        assert sum(system.num_encoded()) - system.num_asked_again() == 4


async def test_parts_of_a_cancelled_request_are_asked_for_again(
    folder: ModelFolder, answer: list[int]
) -> None:
    """Its tasks are dropped when they are taken, so the parts that others wait for never come."""
    joined = about_clip(folder, "joined")
    async with running(folder) as system:
        key = joined.media[0].content_key
        await system.index.put(EmbeddingDivision(content_key=key, num_parts=3))
        for part in parts_of(joined.media[0], 3):
            claim = EmbeddingClaim(
                content_key=part.content_key,
                request_id="cancelled",
                attempt=0,
                deadline_unix_s=joined.deadline_unix_s,
            )
            await system.index.put(claim)
        await system.submit(joined)
        await asyncio.sleep(0.5)
        assert not system.pipeline.events
        assert system.outcomes == {"joined": 1}
        await system.pipeline.cancel("cancelled")
        assert await system.pipeline.tokens_of("joined") == answer
        assert system.num_asked_again() == 3
        assert sum(system.num_encoded()) == 3


async def test_a_division_that_the_item_does_not_have_is_no_division(
    folder: ModelFolder, answer: list[int]
) -> None:
    made = about_clip(folder, "odd")
    async with running(folder) as system:
        bucket = await system.pipeline.bus.key_value(
            subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S
        )
        odd = EmbeddingDivision(content_key=made.media[0].content_key, num_parts=4000)
        await bucket.put(odd.content_key, encode(odd))
        await asyncio.sleep(0.05)
        assert await system.answer(made) == answer
        assert system.outcomes == {"divided": 1}


async def test_two_encoders_share_a_picture_of_tiles(tmp_path: Path) -> None:
    """Of a family that shrinks and crops the tiles' features before the prompt sees them."""
    folder = opened(build_vision_folder("llava_onevision", tmp_path))
    files = [picture_file(62, 61, 3)]
    made = request_of(our_prompt(tmp_path, [*files, "what?"]), "tiles")
    async with running(folder) as system:
        assert await system.answer(made, files) == list(LocalEngine(folder).generate(made, files))
        assert system.outcomes == {"divided": 1}
        assert system.num_encoded() == [1, 1]
