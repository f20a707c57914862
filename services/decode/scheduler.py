"""Which sequences take the next step together (continuous batching).

In: sequences to admit, to start and to retire. Out: the batch of the next step. Blocks for the
longest answer that a request may give are reserved at admission, so a running sequence never runs
out of memory and is never preempted. Pure: no torch, no clock, no bus; the planner's simulator
drives it too.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences

from services.decode.sequence import Sequence
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import FailureKind, RequestFailed, SettingsError


class DecodeScheduler:
    """At most `max_batch` sequences are admitted; every started one takes part in every step."""

    def __init__(self, pool: BlockPool, *, max_batch: int) -> None:
        if max_batch < 1:
            raise SettingsError(f"max_batch is {max_batch}, at least 1 is needed")
        self._pool = pool
        self._max_batch = max_batch
        self._num_admitted = 0
        self._running: list[Sequence] = []
        self._in_step: list[Sequence] = []

    @property
    def num_running(self) -> int:
        """Sequences whose KV has landed."""
        return len(self._running)

    @property
    def num_free_slots(self) -> int:
        """Sequences that could still be admitted, memory permitting."""
        return self._max_batch - self._num_admitted

    def try_admit(self, max_context_tokens: int, shared: Sequences[int] = ()) -> BlockHandle | None:
        """Reserve a slot and the blocks of a whole answer; None if there is no room now.

        `shared` are blocks of this pool that hold the sequence already: they are its first ones.
        Raises `RequestFailed` if there could never be room.
        """
        needed = -(-max_context_tokens // self._pool.block_size)
        if needed > self._pool.num_blocks:
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"prompt and max_tokens together take {needed} KV blocks, "
                f"a decode worker has {self._pool.num_blocks}",
            )
        shared = shared[:needed]
        if self.num_free_slots < 1 or needed - len(shared) > self._pool.num_free:
            return None
        self._num_admitted += 1
        return self._pool.allocate(needed - len(shared), shared=shared)

    def withdraw(self, blocks: BlockHandle) -> None:
        """Undo an admission whose sequence was never started."""
        blocks.free()
        self._num_admitted -= 1

    def start(self, sequence: Sequence) -> None:
        """The sequence's KV has landed: it joins the next step."""
        self._running.append(sequence)

    def next_batch(self) -> list[Sequence]:
        """The sequences of the next step; empty when none runs. End the step with `end_step`."""
        self._in_step = list(self._running)
        return self._in_step

    def end_step(self) -> None:
        """The step's writes are done: blocks of sequences that were retired meanwhile are freed."""
        for sequence in self._in_step:
            if sequence.retired:
                sequence.blocks.free()
        self._in_step = []

    def retire(self, sequence: Sequence) -> None:
        """The sequence is complete or unwanted. Idempotent.

        Its slot is free at once; its blocks stay its own while a step may still write to them.
        """
        if sequence.retired:
            return
        sequence.retired = True
        self._num_admitted -= 1
        self._running.remove(sequence)
        if sequence not in self._in_step:
            sequence.blocks.free()
