"""Which prompts are computed together, and in which blocks.

In: prompts whose embeddings have landed. Out: batches within a token budget, each prompt with the
KV blocks that it owns. First come, first served: a prompt that does not fit now waits at the head,
so it is never overtaken for ever. Pure: no torch, no clock, no bus; the planner's simulator drives
it too.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import FailureKind, RequestFailed, SettingsError


class PrefillJob(Protocol):
    """What the scheduler needs to know of a prompt; `blocks` is set when it is scheduled.

    It takes part with `num_tokens` and gets blocks for `num_block_tokens`, which may be more.
    """

    blocks: BlockHandle | None

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_block_tokens(self) -> int: ...


J = TypeVar("J", bound=PrefillJob)


class PrefillScheduler(Generic[J]):
    """Packs waiting prompts into batches of at most `max_batch_tokens` tokens.

    A prompt longer than the budget makes a batch of its own.
    """

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int) -> None:
        if max_batch_tokens < 1:
            raise SettingsError(f"max_batch_tokens is {max_batch_tokens}, at least 1 is needed")
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[J] = deque()

    @property
    def num_waiting(self) -> int:
        """Prompts that are ready to be computed."""
        return len(self._waiting)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a prompt of this length takes."""
        return -(-num_tokens // self._pool.block_size)

    def check_fits(self, num_tokens: int) -> None:
        """Raise `RequestFailed` if a prompt could not be computed even with an empty pool."""
        needed = self.blocks_for(num_tokens)
        if needed > self._pool.num_blocks:
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"a prompt of {num_tokens} tokens takes {needed} KV blocks, "
                f"a prefill worker has {self._pool.num_blocks}",
            )

    def add(self, job: J) -> None:
        """A prompt is ready. Raises `RequestFailed` if it can never fit."""
        self.check_fits(job.num_block_tokens)
        self._waiting.append(job)

    def cancel(self, job: J) -> None:
        """Forget a waiting prompt. Idempotent."""
        if job in self._waiting:
            self._waiting.remove(job)

    def next_batch(self) -> list[J]:
        """Take the prompts of the next step, with their blocks; empty when none can start."""
        batch: list[J] = []
        num_tokens = 0
        while self._waiting:
            head = self._waiting[0]
            if batch and num_tokens + head.num_tokens > self._max_batch_tokens:
                break
            needed = self.blocks_for(head.num_block_tokens)
            if needed > self._pool.num_free:
                break
            head.blocks = self._pool.allocate(needed)
            batch.append(self._waiting.popleft())
            num_tokens += head.num_tokens
        return batch
