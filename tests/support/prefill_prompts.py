"""Prompts and schedulers of prefill, made of literals."""

from __future__ import annotations

from dataclasses import dataclass

from services.prefill.batch import PrefillBatch
from services.prefill.scheduler import PrefillScheduler
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.cache.prefix import PrefixCache

BLOCK = 16


@dataclass(eq=False)
class Prompt:
    num_tokens: int
    priority: int = 0
    deadline_s: float = 100.0
    block_keys: tuple[bytes, ...] = ()
    num_bare_tokens: int = 0
    num_missing_tokens: int = 0
    num_answer_tokens: int = 0
    whole_spans: tuple[tuple[int, int], ...] = ()
    blocks: BlockHandle | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0

    @property
    def max_context_tokens(self) -> int:
        return self.num_tokens + self.num_answer_tokens

    @property
    def num_ready_tokens(self) -> int:
        return self.num_tokens - self.num_missing_tokens


Scheduler = PrefillScheduler[Prompt]


def make(num_blocks: int = 10, *, cache: bool = False, **options: int) -> Scheduler:
    pool = BlockPool(num_blocks, BLOCK)
    prefix = PrefixCache(pool, salt="") if cache else None
    settings = {"max_batch_tokens": 100, **options}
    return PrefillScheduler(pool, prefix=prefix, **settings)


def spans(batch: PrefillBatch[Prompt] | None) -> list[tuple[Prompt, int, int]]:
    return [(each.job, each.start, each.stop) for each in batch or ()]


def prompt_of(scheduler: Scheduler, tokens: list[int]) -> Prompt:
    assert scheduler.prefix is not None
    return Prompt(len(tokens), block_keys=scheduler.prefix.keys_of(tokens, ()))


def compute(scheduler: Scheduler, *prompts: Prompt) -> None:
    """Add prompts and compute all that waits."""
    for prompt in prompts:
        scheduler.add(prompt)
    while batch := scheduler.next_batch():
        scheduler.end_step(batch)
