"""Reserving memory block by block: who is admitted, who gives way, who comes back first."""

from __future__ import annotations

import random

import pytest

from services.decode.plan import StepPlan
from services.decode.scheduler import DecodeScheduler, ReservePolicy
from services.decode.sequence import Sequence
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import FailureKind, RequestFailed, SettingsError
from shared.messages.descriptor import SamplingParams, WorkerRef
from shared.model.sampling_row import Sampled, SamplingState

BLOCK = 4


def sequence(name: str, blocks: BlockHandle, kv_len: int, num_remaining: int) -> Sequence:
    sampling = SamplingParams(max_tokens=num_remaining + 1)
    return Sequence(
        request_id=name,
        attempt=0,
        gateway=WorkerRef(name="g", incarnation=1),
        sampling=sampling,
        state=SamplingState(sampling, prompt_ids=[1, 2], answer_ids=[5]),
        blocks=blocks,
        kv_len=kv_len,
        next_pos=kv_len,
        last_token_id=5,
        next_index=1,
    )


class Bench:
    """A scheduler over a small pool, and steps of one token."""

    def __init__(self, num_blocks: int, *, swap_blocks: int = 100, headroom: int = 0) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        policy = ReservePolicy("grow", headroom_tokens=headroom, swap_blocks=swap_blocks)
        self.scheduler = DecodeScheduler(self.pool, max_batch=8, policy=policy)

    def start(self, name: str, kv_len: int, num_remaining: int) -> Sequence | None:
        blocks = self.scheduler.try_admit(kv_len, kv_len + num_remaining)
        if blocks is None:
            return None
        started = sequence(name, blocks, kv_len, num_remaining)
        self.scheduler.start(started)
        return started

    def step(self) -> StepPlan:
        plan = self.scheduler.next_step()
        for each in plan.batch:
            assert each.kv_len + 1 <= len(each.blocks) * BLOCK
            each.append(Sampled(7))
        self.scheduler.end_step()
        for each in plan.batch:
            if not each.num_remaining:
                self.scheduler.retire(each)
        self.pool.check_invariants()
        return plan


def names(sequences: tuple[Sequence, ...]) -> list[str]:
    return [each.request_id for each in sequences]


def test_a_sequence_takes_the_blocks_of_its_prompt_and_grows() -> None:
    bench = Bench(10)
    assert bench.start("a", 7, 20) is not None
    assert bench.pool.num_used == 2
    bench.step()
    assert bench.pool.num_used == 2
    bench.step()
    assert bench.pool.num_used == 3


def test_admission_stops_where_the_running_could_not_grow_on() -> None:
    bench = Bench(10, headroom=12)
    assert bench.start("a", 8, 32) is not None  # 2 blocks now, 5 before long
    assert bench.start("b", 8, 4) is not None  # no more than 3 ever
    assert bench.start("c", 8, 32) is None
    assert bench.start("d", 4, 4) is not None


def test_what_can_never_fit_is_refused_and_what_would_be_alone_is_not() -> None:
    bench = Bench(4, headroom=100)
    with pytest.raises(RequestFailed, match="5 KV blocks.* has 4") as caught:
        bench.scheduler.try_admit(4, 17)
    assert caught.value.kind is FailureKind.BAD_REQUEST
    assert bench.start("a", 4, 12) is not None


def test_the_youngest_gives_way_and_returns_before_anything_new() -> None:
    bench = Bench(6)
    for name in "abc":
        assert bench.start(name, 7, 12) is not None
    bench.step()  # every block is full now
    plan = bench.step()
    assert names(tuple(save.sequence for save in plan.saves)) == ["c"]
    assert names(plan.batch) == ["a", "b"]
    assert plan.saves[0].num_tokens == 8
    assert bench.start("d", 1, 2) is None
    came_back: list[str] = []
    while bench.scheduler.num_swapped:
        assert bench.start("d", 1, 2) is None
        came_back += names(bench.step().restores)
    assert came_back == ["b", "c"]  # b gave way to a later on
    assert bench.start("d", 1, 2) is not None


def test_without_host_memory_it_is_handed_back_and_leaves_nothing_behind() -> None:
    bench = Bench(4, swap_blocks=1)
    first, second = bench.start("a", 7, 8), bench.start("b", 7, 8)
    assert first is not None
    assert second is not None
    bench.step()
    plan = bench.step()
    assert (names(plan.returned), plan.saves) == (["b"], ())
    assert second.retired
    assert bench.pool.num_used == len(first.blocks)


def test_the_youngest_waits_where_nobody_is_younger() -> None:
    bench = Bench(4)
    assert bench.start("a", 7, 8) is not None
    landing = bench.scheduler.try_admit(7, 8)
    assert landing is not None
    bench.step()
    assert not bench.scheduler.next_step()
    bench.scheduler.withdraw(landing)
    assert names(bench.step().batch) == ["a"]


def test_a_cancelled_sequence_frees_its_host_memory() -> None:
    bench = Bench(4, swap_blocks=2)
    assert bench.start("a", 7, 8) is not None
    second = bench.start("b", 7, 8)
    assert second is not None
    bench.step()
    assert bench.step().saves
    bench.scheduler.retire(second)
    bench.scheduler.retire(second)
    assert bench.scheduler.num_swapped == 0
    assert bench.scheduler.num_free_slots == 7


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("swap_blocks", [0, 5, 100])
def test_every_answer_is_completed_or_handed_back_whatever_comes(
    seed: int, swap_blocks: int
) -> None:
    rng = random.Random(seed)
    bench = Bench(12, swap_blocks=swap_blocks, headroom=rng.choice((0, 4, 16)))
    waiting = [(f"r{n}", rng.randrange(1, 12), rng.randrange(1, 30)) for n in range(30)]
    started: list[Sequence] = []
    for _ in range(3000):
        while waiting and (made := bench.start(*waiting[0])) is not None:
            started.append(made)
            waiting.pop(0)
        plan = bench.step()
        kept = [save.num_tokens for save in plan.saves]
        assert sum(-(-tokens // BLOCK) for tokens in kept) <= swap_blocks
        if not plan and not waiting:
            break
    assert not waiting
    assert all(each.retired for each in started)
    assert bench.pool.num_used == 0


def test_a_policy_below_zero_is_refused() -> None:
    with pytest.raises(SettingsError, match="below 0"):
        ReservePolicy("grow", headroom_tokens=-1)
