"""Prompts whose answers are generated in the very blocks that prefill fills."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.prefill.scheduler import PrefillScheduler
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import FailureKind, RequestFailed


@dataclass(eq=False)
class Prompt:
    num_tokens: int
    max_context_tokens: int
    priority: int = 0
    deadline_s: float = 100.0
    block_keys: tuple[bytes, ...] = ()
    num_bare_tokens: int = 0
    whole_spans: tuple[tuple[int, int], ...] = ()
    blocks: BlockHandle | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0

    @property
    def num_ready_tokens(self) -> int:
        return self.num_tokens


def test_a_prompt_gets_the_blocks_of_its_answer_as_well() -> None:
    pool = BlockPool(10, 16)
    scheduler: PrefillScheduler[Prompt] = PrefillScheduler(
        pool, max_batch_tokens=100, reserves_answers=True
    )
    prompt, second = Prompt(33, 33 + 40), Prompt(16, 6 * 16)
    scheduler.add(prompt)
    scheduler.add(second)
    batch = scheduler.next_batch()
    assert batch is not None
    assert [(each.job, each.start, each.stop) for each in batch] == [(prompt, 0, 33)]
    assert pool.num_used == 5  # the second one's six do not fit beside them
    assert len(prompt.blocks or ()) == 5


def test_an_answer_that_can_never_fit_is_refused() -> None:
    scheduler: PrefillScheduler[Prompt] = PrefillScheduler(
        BlockPool(10, 16), max_batch_tokens=100, reserves_answers=True
    )
    with pytest.raises(RequestFailed, match=r"11 KV blocks.* has 10") as caught:
        scheduler.add(Prompt(16, 161))
    assert caught.value.kind is FailureKind.BAD_REQUEST
