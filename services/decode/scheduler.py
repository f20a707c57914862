"""Which sequences take the next step together (continuous batching), and who gives way.

In: sequences to admit, to start and to retire. Out: the plan of the next step.

Two ways to reserve memory. `full`: the blocks of the longest answer a request may give are taken
at admission, so a running sequence never runs out. `grow`: a sequence is admitted with the blocks
of its prompt and grows block by block; admission stops where the running answers, grown by
`headroom_tokens` each, would no longer fit. When blocks run out all the same, a sequence may take
those of one that was admitted later: the youngest goes first, into host memory while
`swap_blocks` last, back to the gateway after that. The youngest itself waits where it is. So the
oldest always gets on, and nothing is admitted before those that gave way are back.

Pure: no torch, no clock, no bus; the planner's simulator drives it too.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Literal

from services.decode.plan import Save, StepPlan
from services.decode.sequence import Sequence
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import FailureKind, RequestFailed, SettingsError


@dataclass(frozen=True, slots=True)
class ReservePolicy:
    """How much memory a sequence takes before it needs it.

    `max_draft_tokens` is what speculation would like to write beyond the next token; it never
    makes another sequence give way.
    """

    mode: Literal["full", "grow"] = "full"
    headroom_tokens: int = 128
    swap_blocks: int = 0
    max_draft_tokens: int = 0

    def __post_init__(self) -> None:
        if min(self.headroom_tokens, self.swap_blocks, self.max_draft_tokens) < 0:
            raise SettingsError(f"a reserve policy has a size below 0: {self}")


class DecodeScheduler:
    """At most `max_batch` sequences are admitted; every one that has memory is in every step."""

    def __init__(
        self, pool: BlockPool, *, max_batch: int, policy: ReservePolicy | None = None
    ) -> None:
        if max_batch < 1:
            raise SettingsError(f"max_batch is {max_batch}, at least 1 is needed")
        self._pool = pool
        self._max_batch = max_batch
        self._policy = policy or ReservePolicy()
        self._num_started = 0
        self._landing: dict[BlockHandle, int] = {}  # to the tokens it may soon need
        self._running: list[Sequence] = []  # the oldest first
        self._swapped: list[Sequence] = []  # the oldest first
        self._num_swapped_blocks = 0
        self._in_step: tuple[Sequence, ...] = ()

    @property
    def num_running(self) -> int:
        """Sequences that have their KV in blocks."""
        return len(self._running)

    @property
    def num_swapped(self) -> int:
        """Sequences whose KV waits in host memory."""
        return len(self._swapped)

    @property
    def has_sequences(self) -> bool:
        """Whether a step may have something to do."""
        return bool(self._running or self._swapped)

    @property
    def num_free_slots(self) -> int:
        """Sequences that could still be admitted, memory permitting."""
        return self._max_batch - len(self._landing) - len(self._running) - len(self._swapped)

    def try_admit(
        self, num_tokens: int, max_context_tokens: int, shared: Sequences[int] = ()
    ) -> BlockHandle | None:
        """Reserve a slot and the blocks of a sequence that arrives with `num_tokens` of KV.

        `shared` are blocks of this pool that hold the sequence already: they are its first ones.
        None if there is no room now. Raises `RequestFailed` if there could never be.
        """
        self._check_fits(max_context_tokens)
        if self.num_free_slots < 1:
            return None
        if self._policy.mode == "full":
            needed, expected = self._blocks_for(max_context_tokens), max_context_tokens
        else:
            # A task that was redelivered late may bring all of its answer already.
            expected = min(num_tokens + self._policy.headroom_tokens, max_context_tokens)
            expected = max(expected, num_tokens + 1)
            needed = self._blocks_for(num_tokens + 1)
            if self._swapped or not self._has_room_for(expected):
                return None
        shared = shared[:needed]
        if needed - len(shared) > self._pool.num_free:
            return None
        blocks = self._pool.allocate(needed - len(shared), shared=shared)
        self._landing[blocks] = expected
        return blocks

    def withdraw(self, blocks: BlockHandle) -> None:
        """Undo an admission whose sequence was never started."""
        del self._landing[blocks]
        blocks.free()

    def start(self, sequence: Sequence) -> None:
        """The sequence's KV has landed: it joins the next step."""
        del self._landing[sequence.blocks]
        sequence.seniority = self._num_started
        self._num_started += 1
        self._running.append(sequence)

    def next_step(self) -> StepPlan:
        """The next step; false when there is nothing to do. End it with `end_step`."""
        if self._policy.mode == "full":
            plan = StepPlan(tuple(self._running))
        else:
            plan = self._plan_growth()
        self._in_step = plan.batch
        return plan

    def end_step(self) -> None:
        """The step's writes are done: blocks of sequences that were retired meanwhile are freed."""
        in_step, self._in_step = self._in_step, ()
        for sequence in in_step:
            if sequence.retired:
                sequence.blocks.free()

    def retire(self, sequence: Sequence) -> None:
        """The sequence is complete or unwanted. Idempotent.

        Its slot is free at once; its blocks stay its own while a step may still write to them.
        """
        if sequence.retired:
            return
        sequence.retired = True
        if sequence in self._swapped:
            self._swapped.remove(sequence)
            self._num_swapped_blocks -= self._blocks_for(sequence.kv_len)
            return
        self._running.remove(sequence)
        if sequence not in self._in_step:
            sequence.blocks.free()

    def _plan_growth(self) -> StepPlan:
        batch: list[Sequence] = []
        saves: list[Save] = []
        returned: list[Sequence] = []
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            while not (fits := self._grow(sequence)) and position + 1 < len(self._running):
                self._give_way(self._running[-1], saves, returned)
            if fits:
                batch.append(sequence)
            position += 1
        restores: list[Sequence] = []
        if not saves and not returned:
            restores = self._bring_back()
        return StepPlan((*batch, *restores), tuple(saves), tuple(restores), tuple(returned))

    def _grow(self, sequence: Sequence) -> bool:
        """Give the sequence the block that its next token needs; more for drafts if it is free."""
        needed = self._blocks_for(sequence.kv_len + 1)
        num_drafts = min(self._policy.max_draft_tokens, sequence.num_remaining - 1)
        wanted = self._blocks_for(sequence.kv_len + 1 + max(0, num_drafts))
        owned = len(sequence.blocks)
        for target in (wanted, needed):
            if target <= owned:
                return True
            if target - owned <= self._pool.num_free:
                sequence.blocks.grow(target - owned)
                return True
        return False

    def _give_way(self, victim: Sequence, saves: list[Save], returned: list[Sequence]) -> None:
        """Take the youngest sequence's blocks; its KV is kept in host memory if there is room."""
        num_blocks = self._blocks_for(victim.kv_len)
        if self._num_swapped_blocks + num_blocks > self._policy.swap_blocks:
            self.retire(victim)
            returned.append(victim)
            return
        saves.append(Save(victim, victim.blocks.block_ids[:num_blocks], victim.kv_len))
        self._num_swapped_blocks += num_blocks
        self._running.remove(victim)
        victim.blocks.free()
        insort(self._swapped, victim, key=_seniority)

    def _bring_back(self) -> list[Sequence]:
        """Sequences that gave way return, the oldest first, once they will not have to again."""
        restores: list[Sequence] = []
        while self._swapped:
            sequence = self._swapped[0]
            needed = self._blocks_for(sequence.kv_len + 1)
            if needed > self._pool.num_free or not self._has_room_for(self._expected(sequence)):
                break
            del self._swapped[0]
            self._num_swapped_blocks -= self._blocks_for(sequence.kv_len)
            sequence.blocks = self._pool.allocate(needed)
            insort(self._running, sequence, key=_seniority)
            restores.append(sequence)
        return restores

    def _has_room_for(self, expected_tokens: int) -> bool:
        """Whether one more sequence still fits once all have grown by their headroom.

        Who would be alone always has room.
        """
        if not self._running and not self._landing:
            return True
        blocks = sum(self._blocks_for(self._expected(sequence)) for sequence in self._running)
        blocks += sum(map(self._blocks_for, self._landing.values()))
        return blocks + self._blocks_for(expected_tokens) <= self._pool.num_blocks

    def _expected(self, sequence: Sequence) -> int:
        """Tokens of a sequence's context before long."""
        return sequence.kv_len + min(self._policy.headroom_tokens, sequence.num_remaining)

    def _check_fits(self, max_context_tokens: int) -> None:
        needed = self._blocks_for(max_context_tokens)
        if needed > self._pool.num_blocks:
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"prompt and max_tokens together take {needed} KV blocks, "
                f"a decode worker has {self._pool.num_blocks}",
            )

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.block_size)


def _seniority(sequence: Sequence) -> int:
    return sequence.seniority
