"""What of a prompt is computed before all its embeddings have landed.

In: prompts some of whose embeddings are still being made, and the cached blocks each could start
from. Out: slices that end before the first missing embedding. Pure: no torch, no clock, no bus.

A prompt has its blocks only while such a slice is computed. Then it gives them back, and what was
computed lies in the prefix cache, whence the prompt goes on later like any other with that
beginning. So nobody who waits for an embedding holds memory that others wait for, and nothing is
left to give back when the embedding never comes. Under pressure the cache may lose it; then the
work is done again, once the prompt is complete and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic

from services.prefill.batch import J, Slice
from shared.cache.block_pool import BlockPool
from shared.cache.prefix import PrefixCache
from shared.model.positions import uncut_stop


@dataclass
class _Begun:
    """A prompt that was started from the cache: what it found there, and how far it has been."""

    found_tokens: int
    reached_tokens: int = 0


class EarlyWork(Generic[J]):
    """Cuts beginnings off prompts, and remembers what these found in the cache at first.

    Less than `min_tokens` tokens are not worth a step, which reads all weights; with 0, or without
    a cache, nothing is computed early. Half of the free blocks stay free: running answers that grow
    in the same pool must not give way to this.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefix: PrefixCache | None,
        *,
        min_tokens: int,
        max_batch_tokens: int,
        chunk_tokens: int,
    ) -> None:
        self._pool = pool
        self._prefix = prefix
        self._min_tokens = min_tokens
        self._max_batch_tokens = max_batch_tokens
        self._chunk_tokens = chunk_tokens or max_batch_tokens
        self._begun: dict[J, _Begun] = {}

    @property
    def is_done(self) -> bool:
        """Whether anything is ever computed early."""
        return self._prefix is not None and self._min_tokens > 0

    def slices(
        self, jobs: Iterable[J], match: Callable[[J], tuple[int, ...]]
    ) -> tuple[list[Slice[J]], list[J]]:
        """Slices of one step, each with the blocks that it needs and no more, and the prompts whose
        cached beginning is gone.

        `jobs` are without blocks; `match` gives the cached ones that a prompt can start from.
        """
        taken: list[Slice[J]] = []
        uncovered: list[J] = []
        num_left = self._max_batch_tokens
        num_free = self._pool.num_free
        for job in jobs:
            cached = match(job)
            start = len(cached) * self._pool.block_size
            if start < job.num_bare_tokens:
                uncovered.append(job)
                continue
            stop = self._stop(job, start, min(self._chunk_tokens, num_left))
            if stop is None or (taken and stop - start > num_left):
                continue
            needed = -(-stop // self._pool.block_size) - len(cached)
            if 2 * (self._pool.num_allocatable(cached) - needed) < num_free:
                continue
            job.blocks = self._pool.allocate(needed, shared=cached)
            self.found(job, start)
            taken.append(Slice(job, start, stop))
            num_left = max(0, num_left - (stop - start))
        return taken, uncovered

    def end(self, computed: Slice[J]) -> None:
        """A slice is computed and in the cache: the prompt waits without blocks."""
        job = computed.job
        assert job.blocks is not None
        job.blocks.free()
        job.blocks = None
        job.num_computed_tokens = 0
        self._begun[job].reached_tokens = self._kept(computed.stop)

    def found(self, job: J, num_tokens: int) -> None:
        """A prompt starts from so many cached tokens. What it put there itself does not count."""
        if job not in self._begun:
            self._begun[job] = _Begun(num_tokens)
            if self._prefix is not None:
                self._prefix.count(asked_tokens=job.num_tokens, hit_tokens=num_tokens)
        job.num_cached_tokens = min(num_tokens, self._begun[job].found_tokens)
        job.num_computed_tokens = num_tokens

    def forget(self, job: J) -> None:
        """The prompt has left. Idempotent."""
        self._begun.pop(job, None)

    def _stop(self, job: J, start: int, room: int) -> int | None:
        """Where a slice of about `room` tokens from `start` ends; None if it is not worth a step.

        It must come further than any before it: what the cache has lost since is not computed over
        and over while the prompt waits.
        """
        if not self.is_done:
            return None
        known = max(start, self._begun[job].reached_tokens if job in self._begun else 0)
        ready = self._uncut(job, known, job.num_ready_tokens)
        if ready is None or self._kept(ready) - known < self._min_tokens:
            return None
        stop = self._uncut(job, known, min(job.num_ready_tokens, start + room))
        return stop if stop is not None and self._kept(stop) > known else None

    def _uncut(self, job: J, known: int, stop: int) -> int | None:
        """The end of a slice that should end in front of `stop` in whole blocks, without cutting a
        span that must be whole; None if that takes tokens which are not ready."""
        aligned = self._kept(stop)
        behind = uncut_stop(aligned - 1, aligned, job.whole_spans)
        if behind <= stop:
            return behind
        # In front of the span only where a block more than the known ones is kept by that.
        cut = uncut_stop(known + self._pool.block_size - 1, aligned, job.whole_spans)
        return cut if cut <= job.num_ready_tokens else None

    def _kept(self, num_tokens: int) -> int:
        """Tokens of the full blocks, which the cache can keep."""
        return num_tokens // self._pool.block_size * self._pool.block_size
