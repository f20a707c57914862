"""Which tokens of which prompts are computed together, and in which blocks.

In: prompts, and how far their embeddings have landed. Out: batches of slices of prompts within a
token budget.
It owns the KV blocks of every prompt that it knows, from the first slice until the last one is
computed or the prompt is cancelled. Pure: no torch, no clock, no bus; the planner's simulator
drives it too.

Order: by deadline, where one level of priority counts as much as `priority_step_s` seconds. This
order of two prompts never changes, and a prompt is preceded by no later one whose deadline lies
further than the levels between them allow: urgent prompts go first, none waits for ever. A prompt
that does not fit into the free blocks now holds back those behind it.

Batches nest: while one is computed, `next_batch` gives a batch only of prompts more urgent than all
of it, which the caller computes before it goes on with the first.

A prompt takes part in this once all its embeddings have landed. Before that, its beginning may be
computed when there is nothing else to do (see `early`): every prompt that has all its embeddings is
more urgent than that.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from services.prefill.batch import J, PrefillBatch, SchedulableJob, Slice, is_complete
from services.prefill.early import EarlyWork
from shared.cache.block_pool import BlockPool
from shared.cache.prefix import PrefixCache
from shared.errors import FailureKind, RequestFailed, SettingsError
from shared.model.positions import uncut_stop


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    """Where a prompt stands in the order; prompts of equal urgency come as they arrived."""

    due_s: float
    arrival: int


class PrefillScheduler(Generic[J]):
    """Packs waiting prompts into batches of at most `max_batch_tokens` tokens.

    With `chunk_tokens` a prompt takes part with at most so many tokens in one batch; without (0) it
    is computed whole, and one longer than the budget makes a batch of its own. At most
    `max_suspended` batches wait for more urgent ones at a time. `prefix` is the pool's cache; with
    it and `min_early_tokens` at least so many tokens may be computed before later embeddings land.

    With `reserves_answers` a prompt's blocks have room for its whole answer, which is generated in
    them. So no prompt holds blocks while it waits for more, and none can wait for another for ever.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        chunk_tokens: int = 0,
        max_suspended: int = 0,
        priority_step_s: float = 10.0,
        prefix: PrefixCache | None = None,
        min_early_tokens: int = 0,
        reserves_answers: bool = False,
    ) -> None:
        if max_batch_tokens < 1:
            raise SettingsError(f"max_batch_tokens is {max_batch_tokens}, at least 1 is needed")
        if min(chunk_tokens, max_suspended, min_early_tokens, priority_step_s) < 0:
            raise SettingsError(
                f"chunk_tokens {chunk_tokens}, max_suspended {max_suspended}, min_early_tokens "
                f"{min_early_tokens} and priority_step_s {priority_step_s} must be 0 or more"
            )
        self.prefix = prefix
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._chunk_tokens = chunk_tokens
        self._max_suspended = max_suspended
        self._priority_step_s = priority_step_s
        self._reserves_answers = reserves_answers
        self._early: EarlyWork[J] = EarlyWork(
            pool,
            prefix,
            min_tokens=min_early_tokens,
            max_batch_tokens=max_batch_tokens,
            chunk_tokens=chunk_tokens,
        )
        self._places: dict[J, _Place] = {}  # every prompt that is known
        self._waiting: list[J] = []  # in order, those in no batch
        self._running: list[PrefillBatch[J]] = []  # all but the last are suspended
        self._cancelled: set[J] = set()  # in a batch that may still write their blocks
        self._num_arrived = 0

    @property
    def num_waiting(self) -> int:
        """Prompts that are ready to be computed and in no batch."""
        return sum(map(is_complete, self._waiting))

    @property
    def computes_early(self) -> bool:
        """Whether a prompt had better be added before all its embeddings have landed."""
        return self._early.is_done

    @property
    def num_suspended(self) -> int:
        """Batches that wait for more urgent ones."""
        return max(0, len(self._running) - 1)

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
        """A prompt is there. Raises `RequestFailed` if it can never fit."""
        self.check_fits(self._num_block_tokens(job))
        self._num_arrived += 1
        due_s = job.deadline_s + job.priority * self._priority_step_s
        self._places[job] = _Place(due_s, self._num_arrived)
        self._line_up(job)

    def cancel(self, job: J) -> None:
        """Nobody wants the prompt any more. Idempotent.

        Its blocks are free at once, or, while a step may still write them, when its batch ends.
        """
        if job not in self._places or job in self._waiting:
            if job in self._places:
                self._waiting.remove(job)
            self._drop(job)
            return
        self._cancelled.add(job)
        for batch in self._running[:-1]:
            if self.is_abandoned(batch):  # it is not computed now, and never will be
                for each in batch:
                    _free(each.job)

    def is_abandoned(self, batch: PrefillBatch[J]) -> bool:
        """Whether nobody wants any prompt of the batch: it need not be computed further."""
        return all(each.job in self._cancelled for each in batch)

    def next_batch(self) -> PrefillBatch[J] | None:
        """The slices to compute now, each with its blocks; None when there is nothing to do.

        A batch with slices ends with `end_step` or `abort`, the last one given first.
        """
        slices: list[Slice[J]] = []
        uncovered: list[J] = []
        num_left = self._max_batch_tokens
        has_blocks = True
        for job in self._eligible():
            if job.blocks is None and not has_blocks:
                continue
            cached = self._match(job)
            start = self._start(job, cached)
            if start < job.num_bare_tokens:
                uncovered.append(job)
                continue
            size = self._slice_size(job, start, num_left, is_first=not slices)
            if size == 0:
                break
            if job.blocks is None and not self._begin(job, cached):
                has_blocks = False  # but prompts that have theirs go on, and free them
                continue
            slices.append(Slice(job, start, start + size))
            num_left = max(0, num_left - size)
        if slices or self._running or not has_blocks:
            return self._taken(slices, uncovered)
        incomplete = [job for job in self._waiting if not is_complete(job)]
        slices, gone = self._early.slices(incomplete, self._match)
        return self._taken(slices, [*uncovered, *gone], is_early=True)

    def should_preempt(self) -> bool:
        """Whether the running batch should stop at the next layer: `next_batch` would give a more
        urgent one, or nobody wants this one any more."""
        if not self._running:
            return False
        if self.is_abandoned(self._running[-1]):
            return True
        has_blocks = True
        for job in self._eligible():
            if job.blocks is not None:
                return True
            if has_blocks:
                cached = self._match(job)
                if self._start(job, cached) < job.num_bare_tokens or self._has_room(job, cached):
                    return True
                has_blocks = False  # as in `next_batch`: only prompts that have theirs go on
        return False

    def end_step(self, batch: PrefillBatch[J]) -> None:
        """The batch is computed: its prompts go on with their next slice, or leave with their
        blocks."""
        self._pop(batch)
        for each in batch:
            job = each.job
            job.num_computed_tokens = each.stop
            if self.prefix is not None and job.blocks is not None and job.blocks.is_live:
                self.prefix.commit(job.block_keys, job.blocks, each.stop)
            if job in self._cancelled:
                self._drop(job)
            elif each.is_last:
                del self._places[job]
                self._early.forget(job)
            else:
                if batch.is_early:
                    self._early.end(each)
                self._line_up(job)

    def abort(self, batch: PrefillBatch[J]) -> None:
        """The batch failed or is not wanted: its prompts leave, their blocks are freed."""
        self._pop(batch)
        for each in batch:
            self._drop(each.job)

    def _num_block_tokens(self, job: J) -> int:
        """Tokens that the prompt's blocks must hold."""
        return job.max_context_tokens if self._reserves_answers else job.num_tokens

    def _eligible(self) -> list[J]:
        """The prompts that may run now, in order."""
        complete = [job for job in self._waiting if is_complete(job)]
        if not self._running:
            return complete
        if len(self._running) > self._max_suspended:
            return []
        running = [each.job for each in self._running[-1]]
        if self._running[-1].is_early:
            # What has become complete meanwhile has its place in the order like any other.
            wanted = [job for job in running if is_complete(job) and job not in self._cancelled]
            first = min((self._places[job] for job in wanted), default=None)
            return [job for job in complete if first is None or self._places[job] < first]
        first = min(self._places[job] for job in running)
        priority = min(job.priority for job in running)
        return [job for job in complete if job.priority < priority and self._places[job] < first]

    def _match(self, job: J) -> tuple[int, ...]:
        """The cached blocks that a prompt can start from."""
        if self.prefix is None or job.blocks is not None:
            return ()
        return self.prefix.match(job.block_keys, job.num_tokens)

    def _start(self, job: J, cached: Sequence[int]) -> int:
        if job.blocks is not None:
            return job.num_computed_tokens
        return len(cached) * self._pool.block_size

    def _slice_size(self, job: J, start: int, num_left: int, *, is_first: bool) -> int:
        """Tokens of a prompt that go into a batch with `num_left` tokens of room; 0: none."""
        num_pending = job.num_tokens - start
        if not self._chunk_tokens:
            return num_pending if is_first or num_pending <= num_left else 0
        size = min(num_pending, self._chunk_tokens, num_left)
        if size == num_pending:
            return size
        # Whole blocks, so that every slice can be cached, unless that would be no step forward.
        aligned = size - (start + size) % self._pool.block_size
        if aligned <= 0 and not is_first:
            return 0
        stop = start + (aligned if aligned > 0 else size)
        whole = uncut_stop(start, stop, job.whole_spans) - start
        return whole if is_first or whole <= num_left else 0

    def _begin(self, job: J, cached: Sequence[int]) -> bool:
        """Give a prompt its blocks; False if there are too few."""
        if not self._has_room(job, cached):
            return False
        job.blocks = self._pool.allocate(self._num_needed(job, cached), shared=cached)
        self._early.found(job, len(cached) * self._pool.block_size)
        return True

    def _has_room(self, job: J, cached: Sequence[int]) -> bool:
        return self._num_needed(job, cached) <= self._pool.num_allocatable(cached)

    def _num_needed(self, job: J, cached: Sequence[int]) -> int:
        """Blocks that a prompt takes beside the cached ones."""
        return self.blocks_for(self._num_block_tokens(job)) - len(cached)

    def _taken(
        self, slices: list[Slice[J]], uncovered: list[J], *, is_early: bool = False
    ) -> PrefillBatch[J] | None:
        if not slices and not uncovered:
            return None
        batch = PrefillBatch(tuple(slices), tuple(uncovered), is_early)
        for job in (*(each.job for each in slices), *uncovered):
            self._waiting.remove(job)
        for job in uncovered:
            self._drop(job)
        if slices:
            self._running.append(batch)
        return batch

    def _line_up(self, job: J) -> None:
        insort(self._waiting, job, key=self._places.__getitem__)

    def _pop(self, batch: PrefillBatch[J]) -> None:
        if not self._running or self._running[-1] is not batch:
            raise ValueError("only the batch that was given last can end")
        self._running.pop()

    def _drop(self, job: J) -> None:
        self._places.pop(job, None)
        self._cancelled.discard(job)
        self._early.forget(job)
        _free(job)


def _free(job: SchedulableJob) -> None:
    if job.blocks is not None:
        job.blocks.free()
