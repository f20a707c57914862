"""Caches cold or warm, prompts whole or in chunks, alone or packed: the same logits and tokens.

Requests with shared beginnings, among them the same text around different pictures, go several
times through scheduler, cache and executor of the prefill stage in random company. Each answer is
compared with that of an engine without any cache that computes the prompt whole and alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from services.prefill import executor as executor_module
from services.prefill.executor import PrefillExecutor
from services.prefill.job import PrefillJob, num_covered_pictures
from services.prefill.scheduler import PrefillScheduler
from shared.cache.prefix import PrefixCache
from shared.messages.descriptor import MediaItem, RequestDescriptor, SamplingParams, WorkerRef
from shared.model.sampler import SamplingRow, sample
from tests.support.engine import Engine, Running
from tests.support.models import FAMILIES, IMAGE_TOKEN, VISION_FAMILIES, Prompt, make_prompt

ModelDirs = Callable[[str], Path]

TOLERANCE = 1e-10
NUM_TOKENS = 8
NUM_BLOCKS = 28
"""So few that the cache must evict on the way."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A request, the embeddings of its pictures, and the answer without a cache."""

    request: RequestDescriptor
    embeddings: torch.Tensor | None
    logits: torch.Tensor
    tokens: list[int]


def prompts_of(family: str, engine: Engine) -> list[Prompt]:
    """Prompts that begin alike: with equal text, and with equal text around different pictures."""
    sizes = [(4, 4), (2, 6)] if family in VISION_FAMILIES else []
    base = make_prompt(engine.spec, 30, sizes, seed=1)
    prompts = [base, Prompt(base.token_ids[:-7], base.grids, base.pixel_values)]
    if base.pixel_values is not None:
        other = base.pixel_values.clone()
        other[-12:] += 1.0  # another second picture
        prompts += [
            Prompt(base.token_ids, base.grids, other),
            Prompt(base.token_ids, base.grids, base.pixel_values + 1.0),  # two other pictures
        ]
    tail = np.random.default_rng(2).integers(2, IMAGE_TOKEN, 9)
    for prompt in prompts[:3:2]:  # the next turn of a chat
        longer = np.concatenate((prompt.token_ids, tail))
        prompts.append(Prompt(longer, prompt.grids, prompt.pixel_values))
    return [*prompts, *(make_prompt(engine.spec, 40, (), seed=seed) for seed in range(3, 7))]


def ask(engine: Engine, number: int, prompt: Prompt) -> Asked:
    running = engine.start(prompt)
    logits = engine.step([running])[0]
    first = int(logits.argmax())
    engine.append(running, first)
    tokens = [first, *engine.greedy(running, NUM_TOKENS - 1)]
    running.handle.free()
    request = RequestDescriptor(
        request_id=f"r{number}",
        attempt=0,
        gateway=WorkerRef(name="g", incarnation=1),
        model="tiny",
        prompt_token_ids=tuple(prompt.token_ids.tolist()),
        media=tuple(media_of(engine, prompt)),
        sampling=SamplingParams(temperature=0.0),
        created_unix_s=0.0,
        deadline_unix_s=100.0,
    )
    return Asked(request, running.media_embeddings, logits, tokens)


def media_of(engine: Engine, prompt: Prompt) -> list[MediaItem]:
    items: list[MediaItem] = []
    rows, patch = prompt.media_index.tolist(), 0
    for grid in prompt.grids:
        assert engine.spec.vision is not None
        assert prompt.pixel_values is not None
        num_tokens = engine.spec.vision.num_tokens((grid.t, grid.h, grid.w))
        pixels = prompt.pixel_values[patch : patch + grid.h * grid.w]
        patch += grid.h * grid.w
        key = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        items.append(
            MediaItem(
                kind="image",
                sha256=key,
                content_key=key,
                grid_thw=(grid.t, grid.h, grid.w),
                offset=rows[sum(item.num_tokens for item in items)],
                num_tokens=num_tokens,
            )
        )
    return items


class Cached:
    """Scheduler, cache and executor of a prefill stage, and hand-over into a decoder's blocks."""

    def __init__(self, folder: Path, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = Engine(folder, "float64", num_blocks=NUM_BLOCKS)
        self.decoder = Engine(folder, "float64", num_blocks=256)
        self.prefix = PrefixCache(self.engine.pool, salt="tiny")
        self.scheduler: PrefillScheduler[PrefillJob] = PrefillScheduler(
            self.engine.pool, max_batch_tokens=64, chunk_tokens=chunk_tokens, prefix=self.prefix
        )
        self.executor = PrefillExecutor(self.engine.model, self.engine.kv, self.engine.spec)
        self.logits: list[torch.Tensor] = []

        def watched(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
            self.logits.append(logits)
            return sample(logits, rows)

        monkeypatch.setattr(executor_module, "sample", watched)

    def add(self, asked: Asked) -> PrefillJob:
        request = asked.request
        prompt = self.executor.prepare(request)
        keys = self.prefix.keys_of(prompt.token_ids.tolist(), request.media)
        num_skipped = num_covered_pictures(
            request, self.prefix.num_cached_tokens(keys, request.num_tokens)
        )
        embeddings = asked.embeddings
        if embeddings is not None:
            embeddings = embeddings[sum(i.num_tokens for i in request.media[:num_skipped]) :]
        job = PrefillJob(request, prompt, keys, num_skipped, embeddings)
        self.scheduler.add(job)
        return job

    def compute(self, jobs: dict[PrefillJob, Asked]) -> None:
        """Compute all jobs and compare each answer."""
        while batch := self.scheduler.next_batch():
            for job in batch.uncovered:  # evicted by a batch before
                jobs[self.add(jobs[job])] = jobs[job]
            if not batch.slices:
                continue
            self.logits.clear()
            firsts = self.executor.run([each.job.input(each.start, each.stop) for each in batch])
            self.scheduler.end_step(batch)
            for row, (each, first) in enumerate(zip(batch, firsts, strict=True)):
                assert (first is not None) == each.is_last
                if first is not None:
                    self.check(each.job, jobs[each.job], first.token_id, self.logits[0][row])

    def check(self, job: PrefillJob, asked: Asked, first: int, logits: torch.Tensor) -> None:
        assert float((logits - asked.logits).abs().max()) <= TOLERANCE
        assert job.blocks is not None
        values = self.engine.kv.gather(job.blocks.block_ids, job.num_tokens)
        job.blocks.free()
        handle = self.decoder.pool.allocate(self.decoder.geometry.blocks_for(job.num_tokens))
        self.decoder.kv.scatter(handle.block_ids, values)
        running = Running(
            job.prompt.token_ids,
            job.prompt.positions,
            job.prompt.next_pos,
            np.empty(0, dtype=np.int64),
            None,
            handle,
            num_cached_tokens=job.num_tokens,
        )
        self.decoder.append(running, first)
        assert [first, *self.decoder.greedy(running, NUM_TOKENS - 1)] == asked.tokens
        running.handle.free()


@pytest.mark.parametrize("chunk_tokens", [0, 8])
@pytest.mark.parametrize("family", FAMILIES)
async def test_cold_warm_chunked_and_packed(
    family: str, chunk_tokens: int, model_dir_of: ModelDirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine(model_dir_of(family), "float64")
    asked = [ask(plain, number, prompt) for number, prompt in enumerate(prompts_of(family, plain))]
    cached = Cached(model_dir_of(family), chunk_tokens, monkeypatch)
    rng = random.Random(family)
    for round_number in range(3):
        company = [each for each in asked for _ in range(2)]
        rng.shuffle(company)
        if round_number % 2:
            cached.compute({cached.add(each): each for each in company})
        else:
            for each in company:
                cached.compute({cached.add(each): each})
    counters = cached.prefix.counters()
    assert counters.hit_tokens > counters.asked_tokens / 5, "the cache must matter here"
    assert counters.evicted_blocks > 0, "and it must have been too small"
    assert cached.engine.pool.num_used == 0
    cached.engine.pool.check_invariants()
