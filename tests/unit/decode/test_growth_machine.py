"""Growing and giving way in whatever order requests come, are cancelled and are withdrawn."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from services.decode.plan import StepPlan
from services.decode.scheduler import DecodeScheduler, ReservePolicy
from services.decode.sequence import Sequence
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.messages.descriptor import SamplingParams, WorkerRef
from shared.model.sampling_row import Sampled, SamplingState

BLOCK = 4
NUM_BLOCKS = 10
LONGEST = NUM_BLOCKS * BLOCK


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)


def sequence(name: str, blocks: BlockHandle, kv_len: int, num_remaining: int) -> Sequence:
    sampling = SamplingParams(max_tokens=num_remaining + 1)
    return Sequence(
        request_id=name,
        attempt=0,
        gateway=WorkerRef(name="g", incarnation=1),
        sampling=sampling,
        state=SamplingState(sampling, prompt_ids=[1], answer_ids=[5]),
        blocks=blocks,
        kv_len=kv_len,
        next_pos=kv_len,
        last_token_id=5,
        next_index=1,
    )


class Growth(RuleBasedStateMachine):
    """The stage's part of the protocol; `running` and `swapped` are the model's own books."""

    def __init__(self) -> None:
        super().__init__()
        self.landing: list[tuple[BlockHandle, int, int]] = []
        self.running: list[Sequence] = []
        self.swapped: list[Sequence] = []
        self.plan: StepPlan | None = None
        self.num_made = 0

    @initialize(
        swap_blocks=st.sampled_from((0, 3, 100)),
        headroom=st.sampled_from((0, 5, 40)),
        num_drafts=st.sampled_from((0, 3)),
    )
    def begin(self, swap_blocks: int, headroom: int, num_drafts: int) -> None:
        self.pool = BlockPool(NUM_BLOCKS, BLOCK)
        self.swap_blocks = swap_blocks
        policy = ReservePolicy(
            "grow", headroom_tokens=headroom, swap_blocks=swap_blocks, max_draft_tokens=num_drafts
        )
        self.scheduler = DecodeScheduler(self.pool, max_batch=5, policy=policy)

    @rule(kv_len=st.integers(1, 16), num_remaining=st.integers(1, 24))
    def admit(self, kv_len: int, num_remaining: int) -> None:
        had_room, had_swapped = self.scheduler.num_free_slots > 0, bool(self.swapped)
        blocks = self.scheduler.try_admit(kv_len, kv_len + num_remaining)
        if blocks is None:
            return
        assert had_room
        assert not had_swapped, "something new was admitted before those that gave way were back"
        assert len(blocks) == blocks_for(kv_len + 1)
        self.landing.append((blocks, kv_len, num_remaining))

    @precondition(lambda self: self.landing)
    @rule(starts=st.booleans())
    def land(self, starts: bool) -> None:
        blocks, kv_len, num_remaining = self.landing.pop(0)
        if not starts:
            self.scheduler.withdraw(blocks)
            return
        made = sequence(f"r{self.num_made}", blocks, kv_len, num_remaining)
        self.num_made += 1
        self.scheduler.start(made)
        self.running.append(made)

    @precondition(lambda self: self.plan is None)
    @rule()
    def plan_step(self) -> None:
        oldest = min((*self.running, *self.swapped), key=lambda s: s.seniority, default=None)
        plan = self.scheduler.next_step()
        for save in plan.saves:
            assert len(save.block_ids) == blocks_for(save.num_tokens)
            self.running.remove(save.sequence)
            self.swapped.append(save.sequence)
        for restored in plan.restores:
            self.swapped.remove(restored)
            self.running.append(restored)
        for given_up in plan.returned:
            assert given_up.retired
            self.running.remove(given_up)
        if oldest is not None and not self.landing:
            assert oldest in plan.batch, "the oldest does not get on"
        for each in plan.batch:
            assert len(each.blocks) * BLOCK > each.kv_len
        assert not {s.request_id for s in plan.batch} - {s.request_id for s in self.running}
        self.plan = plan

    @precondition(lambda self: self.plan is not None)
    @rule()
    def end_step(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        for each in plan.batch:
            if not each.retired:
                each.append(Sampled(7))
        self.scheduler.end_step()
        for each in plan.batch:
            if not each.retired and not each.num_remaining:
                self.retire(each)

    @precondition(lambda self: self.running or self.swapped)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.retire(data.draw(st.sampled_from([*self.running, *self.swapped])))

    def retire(self, each: Sequence) -> None:
        self.scheduler.retire(each)
        self.scheduler.retire(each)
        (self.running if each in self.running else self.swapped).remove(each)

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        assert self.scheduler.num_running == len(self.running)
        assert self.scheduler.num_swapped == len(self.swapped)
        assert sum(blocks_for(s.kv_len) for s in self.swapped) <= self.swap_blocks
        owners = {id(s): len(s.blocks) for s in self.running}
        if self.plan is not None:  # a step may still write to what was cancelled meanwhile
            owners |= {id(s): len(s.blocks) for s in self.plan.batch}
        landing = sum(len(blocks) for blocks, _, _ in self.landing)
        assert self.pool.num_used == sum(owners.values()) + landing

    def teardown(self) -> None:
        """Everything that is there ends in finitely many steps, and leaves nothing behind."""
        if not hasattr(self, "pool"):
            return
        while self.landing:
            self.land(starts=True)
        if self.plan is not None:
            self.end_step()
        for _ in range(5 * LONGEST):
            if not self.running and not self.swapped:
                break
            self.plan_step()
            self.end_step()
        assert not self.running
        assert not self.swapped
        assert self.pool.num_used == 0
        assert self.scheduler.num_free_slots == 5


TestGrowth = Growth.TestCase
TestGrowth.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
