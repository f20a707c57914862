"""The prefill scheduler, driven with literals, and with random operations for its books."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.prefill.batch import PrefillBatch
from services.prefill.scheduler import PrefillScheduler
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.cache.prefix import PrefixCache
from shared.errors import FailureKind, RequestFailed, SettingsError

BLOCK = 16


@dataclass(eq=False)
class Prompt:
    num_tokens: int
    priority: int = 0
    deadline_s: float = 100.0
    block_keys: tuple[bytes, ...] = ()
    num_bare_tokens: int = 0
    whole_spans: tuple[tuple[int, int], ...] = ()
    blocks: BlockHandle | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0


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


class TestPacking:
    def test_packs_prompts_within_the_token_budget_and_gives_each_its_blocks(self) -> None:
        scheduler = make()
        prompts = [Prompt(33), Prompt(60), Prompt(20)]
        for prompt in prompts:
            scheduler.add(prompt)
        assert spans(scheduler.next_batch()) == [(prompts[0], 0, 33), (prompts[1], 0, 60)]
        assert [len(p.blocks or ()) for p in prompts] == [3, 4, 0]
        assert scheduler._pool.num_free == 3

    def test_a_prompt_beyond_the_budget_goes_alone(self) -> None:
        scheduler = make()
        large, small = Prompt(150), Prompt(5)
        scheduler.add(large)
        scheduler.add(small)
        batch = scheduler.next_batch()
        assert batch is not None
        assert spans(batch) == [(large, 0, 150)]
        scheduler.end_step(batch)
        assert large.blocks is not None
        large.blocks.free()
        assert spans(scheduler.next_batch()) == [(small, 0, 5)]

    def test_a_prompt_without_blocks_waits_and_is_not_overtaken(self) -> None:
        scheduler = make()
        held = scheduler._pool.allocate(8)
        large, small = Prompt(48), Prompt(16)
        scheduler.add(large)
        scheduler.add(small)
        assert scheduler.next_batch() is None
        held.free()
        assert [job for job, _, _ in spans(scheduler.next_batch())] == [large, small]

    def test_a_prompt_that_can_never_fit_is_refused_with_numbers(self) -> None:
        with pytest.raises(RequestFailed, match="33 tokens takes 3 KV blocks.* has 2") as caught:
            make(num_blocks=2).add(Prompt(33))
        assert caught.value.kind is FailureKind.BAD_REQUEST

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
            ({"chunk_tokens": -1}, "chunk_tokens -1"),
            ({"max_suspended": -1}, "max_suspended -1"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            make(**options)


class TestChunks:
    def test_a_long_prompt_takes_several_steps_in_the_same_blocks(self) -> None:
        scheduler = make(chunk_tokens=32)
        prompt = Prompt(70)
        scheduler.add(prompt)
        seen, blocks = [], set()
        while batch := scheduler.next_batch():
            seen += [(start, stop) for _, start, stop in spans(batch)]
            assert prompt.blocks is not None
            blocks.add(prompt.blocks.block_ids)
            assert [each.is_last for each in batch] == [seen[-1][1] == 70]
            scheduler.end_step(batch)
        assert seen == [(0, 32), (32, 64), (64, 70)]
        assert blocks == {(0, 1, 2, 3, 4)}

    def test_chunks_share_a_step_with_others_within_the_budget(self) -> None:
        scheduler = make(max_batch_tokens=48, chunk_tokens=32)
        long, short = Prompt(64), Prompt(10)
        scheduler.add(long)
        scheduler.add(short)
        batch = scheduler.next_batch()
        assert batch is not None
        assert spans(batch) == [(long, 0, 32), (short, 0, 10)]
        assert batch.num_tokens == 42

    def test_what_is_left_of_the_budget_is_used_in_whole_blocks(self) -> None:
        scheduler = make(max_batch_tokens=60, chunk_tokens=40)
        first, second = Prompt(40), Prompt(50)
        scheduler.add(first)
        scheduler.add(second)
        assert spans(scheduler.next_batch()) == [(first, 0, 40), (second, 0, 16)]

    def test_a_chunk_ends_before_a_picture_that_must_be_whole_or_behind_it(self) -> None:
        scheduler = make(max_batch_tokens=48, chunk_tokens=32)
        prompt = Prompt(100, whole_spans=((20, 70), (70, 75)))
        scheduler.add(prompt)
        slices = []
        while batch := scheduler.next_batch():
            slices += [(each.start, each.stop) for each in batch]
            scheduler.end_step(batch)
        assert slices == [(0, 20), (20, 70), (70, 100)]

    def test_a_picture_that_must_be_whole_waits_for_a_batch_with_room(self) -> None:
        scheduler = make(max_batch_tokens=48, chunk_tokens=32)
        scheduler.add(Prompt(32))
        picture = Prompt(60, whole_spans=((0, 40),))
        scheduler.add(picture)
        first = scheduler.next_batch()
        assert first is not None
        assert [each.job.num_tokens for each in first] == [32]
        scheduler.end_step(first)
        assert spans(scheduler.next_batch()) == [(picture, 0, 40)]

    def test_a_chunk_smaller_than_a_block_still_makes_progress(self) -> None:
        scheduler = make(chunk_tokens=5)
        prompt = Prompt(12)
        compute(scheduler, prompt)
        assert prompt.num_computed_tokens == 12

    def test_started_prompts_go_on_while_one_without_blocks_waits(self) -> None:
        scheduler = make(chunk_tokens=16)
        started, blocked = Prompt(128), Prompt(48)
        scheduler.add(started)
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.end_step(batch)
        scheduler.add(blocked)
        assert spans(scheduler.next_batch()) == [(started, 16, 32)]


class TestOrder:
    def test_the_nearest_deadline_goes_first_then_who_came_first(self) -> None:
        scheduler = make()
        late, early, also_early = Prompt(1, deadline_s=9), Prompt(1, deadline_s=5), Prompt(1)
        also_early.deadline_s = 5
        for prompt in (late, early, also_early):
            scheduler.add(prompt)
        jobs = [job for job, _, _ in spans(scheduler.next_batch())]
        assert jobs == [early, also_early, late]

    def test_a_lower_priority_number_goes_first(self) -> None:
        scheduler = make()
        usual, urgent, patient = Prompt(1), Prompt(1, priority=-1), Prompt(1, priority=1)
        for prompt in (patient, usual, urgent):
            scheduler.add(prompt)
        jobs = [job for job, _, _ in spans(scheduler.next_batch())]
        assert jobs == [urgent, usual, patient]

    def test_a_patient_prompt_is_not_overtaken_for_ever(self) -> None:
        """Each level is worth ten seconds: prompts that come later than that go behind."""
        scheduler = make(max_batch_tokens=1)
        patient = Prompt(1, priority=3, deadline_s=100)
        scheduler.add(patient)
        order = []
        for second in range(60):  # an urgent prompt a second, one computed a second
            scheduler.add(Prompt(1, deadline_s=100 + second))
            batch = scheduler.next_batch()
            assert batch is not None
            order += [job for job, _, _ in spans(batch)]
            scheduler.end_step(batch)
            for job in order[-1:]:
                assert job.blocks is not None
                job.blocks.free()
        assert order.index(patient) == 30


class TestNesting:
    def start(self, scheduler: Scheduler, prompt: Prompt) -> PrefillBatch[Prompt]:
        scheduler.add(prompt)
        batch = scheduler.next_batch()
        assert batch is not None
        return batch

    def test_only_something_more_urgent_runs_in_between(self) -> None:
        scheduler = make(max_suspended=1)
        outer = self.start(scheduler, Prompt(16, priority=0))
        scheduler.add(Prompt(16, priority=0, deadline_s=1))
        assert not scheduler.should_preempt()
        assert scheduler.next_batch() is None
        urgent = Prompt(16, priority=-1)
        scheduler.add(urgent)
        assert scheduler.should_preempt()
        inner = scheduler.next_batch()
        assert spans(inner) == [(urgent, 0, 16)]
        assert inner is not None
        assert scheduler.num_suspended == 1
        with pytest.raises(ValueError, match="given last"):
            scheduler.end_step(outer)
        scheduler.end_step(inner)
        scheduler.end_step(outer)
        assert scheduler.num_waiting == 1

    def test_the_number_of_suspended_batches_is_capped(self) -> None:
        scheduler = make(max_suspended=1)
        self.start(scheduler, Prompt(16, priority=0))
        self.start(scheduler, Prompt(16, priority=-1))
        scheduler.add(Prompt(16, priority=-2))
        assert not scheduler.should_preempt()
        assert scheduler.next_batch() is None

    def test_without_suspension_nothing_runs_in_between(self) -> None:
        scheduler = make()
        self.start(scheduler, Prompt(16))
        scheduler.add(Prompt(16, priority=-5))
        assert not scheduler.should_preempt()
        assert scheduler.next_batch() is None

    def test_an_urgent_prompt_without_blocks_does_not_stop_a_step(self) -> None:
        scheduler = make(max_suspended=1)
        self.start(scheduler, Prompt(144))
        scheduler.add(Prompt(32, priority=-1))
        assert not scheduler.should_preempt()

    def test_a_suspended_batch_is_not_preempted_by_what_came_much_later(self) -> None:
        scheduler = make(max_suspended=1)
        self.start(scheduler, Prompt(16, priority=1, deadline_s=100))
        scheduler.add(Prompt(16, priority=0, deadline_s=111))
        assert not scheduler.should_preempt()


class TestCancelling:
    def test_a_waiting_prompt_takes_no_blocks(self) -> None:
        scheduler = make()
        prompt = Prompt(16)
        scheduler.add(prompt)
        scheduler.cancel(prompt)
        scheduler.cancel(prompt)
        assert scheduler.next_batch() is None
        assert scheduler._pool.num_free == 10

    def test_a_prompt_between_two_chunks_gives_its_blocks_back_at_once(self) -> None:
        scheduler = make(chunk_tokens=16)
        prompt = Prompt(64)
        scheduler.add(prompt)
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.end_step(batch)
        assert scheduler._pool.num_used == 4
        scheduler.cancel(prompt)
        assert scheduler._pool.num_used == 0

    def test_blocks_stay_taken_while_a_step_may_write_them(self) -> None:
        scheduler = make()
        gone, wanted = Prompt(16), Prompt(16)
        scheduler.add(gone)
        scheduler.add(wanted)
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.cancel(gone)
        assert not scheduler.is_abandoned(batch)
        assert scheduler._pool.num_used == 2
        scheduler.end_step(batch)
        assert scheduler._pool.num_used == 1

    def test_a_running_batch_that_nobody_wants_should_stop(self) -> None:
        scheduler = make()
        prompt = Prompt(16)
        scheduler.add(prompt)
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.cancel(prompt)
        assert scheduler.should_preempt()
        assert scheduler.is_abandoned(batch)
        scheduler.abort(batch)
        assert scheduler._pool.num_used == 0

    def test_a_suspended_prompt_gives_its_blocks_back_at_once(self) -> None:
        scheduler = make(max_suspended=1)
        outer_prompt, urgent = Prompt(48), Prompt(16, priority=-1)
        scheduler.add(outer_prompt)
        outer = scheduler.next_batch()
        scheduler.add(urgent)
        inner = scheduler.next_batch()
        assert outer is not None
        assert inner is not None
        scheduler.cancel(outer_prompt)
        assert scheduler._pool.num_used == 1
        scheduler.end_step(inner)
        assert scheduler.is_abandoned(outer)
        scheduler.abort(outer)
        assert scheduler._pool.num_used == 1  # the urgent prompt's, which left with it


class TestPrefix:
    def test_a_prompt_starts_behind_what_is_cached_and_the_hits_are_counted(self) -> None:
        scheduler = make(cache=True)
        compute(scheduler, prompt_of(scheduler, list(range(40))))
        again = prompt_of(scheduler, [*range(32), 7, 7, 7])
        scheduler.add(again)
        assert spans(scheduler.next_batch()) == [(again, 32, 35)]
        assert (again.num_cached_tokens, len(again.blocks or ())) == (32, 3)
        assert scheduler.prefix is not None
        counters = scheduler.prefix.counters()
        assert (counters.asked_tokens, counters.hit_tokens) == (75, 32)

    def test_the_budget_counts_only_what_is_computed(self) -> None:
        scheduler = make(20, cache=True)
        compute(scheduler, prompt_of(scheduler, [1] * 96))
        prompts = [prompt_of(scheduler, [*[1] * 96, n]) for n in range(3)]
        for prompt in prompts:
            scheduler.add(prompt)
        batch = scheduler.next_batch()
        assert batch is not None
        assert spans(batch) == [(prompt, 96, 97) for prompt in prompts]

    def test_a_finished_chunk_is_there_for_others(self) -> None:
        scheduler = make(cache=True, chunk_tokens=16)
        first = prompt_of(scheduler, [1] * 64)
        scheduler.add(first)
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.end_step(batch)
        second = prompt_of(scheduler, [1] * 40)
        scheduler.add(second)
        assert spans(scheduler.next_batch()) == [(first, 16, 32), (second, 16, 32)]

    def test_a_prompt_whose_cached_beginning_went_comes_back_uncovered(self) -> None:
        scheduler = make(cache=True)
        compute(scheduler, prompt_of(scheduler, [1] * 32))
        bare = prompt_of(scheduler, [1] * 40)
        bare.num_bare_tokens = 20
        assert scheduler.prefix is not None
        scheduler.prefix.clear()
        scheduler.add(bare)
        batch = scheduler.next_batch()
        assert batch is not None
        assert (batch.slices, batch.uncovered) == ((), (bare,))
        assert bare.blocks is None
        assert scheduler.next_batch() is None
        bare.num_bare_tokens = 0
        scheduler.add(bare)
        assert spans(scheduler.next_batch()) == [(bare, 0, 40)]

    def test_a_failed_step_leaves_nothing_in_the_cache(self) -> None:
        scheduler = make(cache=True)
        scheduler.add(prompt_of(scheduler, [1] * 32))
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.abort(batch)
        assert scheduler.prefix is not None
        assert scheduler.prefix.counters().cached_blocks == 0
        assert scheduler._pool.num_used == 0

    def test_a_cancelled_prompt_that_was_computed_is_cached(self) -> None:
        scheduler = make(cache=True)
        gone = prompt_of(scheduler, [1] * 32)
        scheduler.add(gone)
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.cancel(gone)
        scheduler.end_step(batch)
        assert scheduler.prefix is not None
        assert scheduler.prefix.counters().cached_blocks == 2
        assert scheduler._pool.num_used == 0


@dataclass
class Books:
    """What the machine below knows of the prompts it made."""

    known: list[Prompt] = field(default_factory=list)  # the scheduler's
    done: list[Prompt] = field(default_factory=list)  # computed; their blocks are the machine's
    gone: list[Prompt] = field(default_factory=list)  # cancelled or failed


class SchedulerMachine(RuleBasedStateMachine):
    """Prompts come, are computed in nested batches, fail or are cancelled in any state."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(12, cache=True, max_batch_tokens=64, chunk_tokens=32, max_suspended=2)
        self.pool = self.scheduler._pool
        self.books = Books()
        self.stack: list[PrefillBatch[Prompt]] = []
        self.cancelled: set[Prompt] = set()

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        priority=st.integers(-2, 2),
        num_bare_blocks=st.integers(0, 2),
    )
    def add(self, tokens: list[int], priority: int, num_bare_blocks: int) -> None:
        prompt = prompt_of(self.scheduler, [token for token in tokens for _ in range(8)])
        prompt.priority = priority
        cached = self.scheduler.prefix.num_cached_tokens(  # type: ignore[union-attr]
            prompt.block_keys, prompt.num_tokens
        )
        prompt.num_bare_tokens = min(cached, num_bare_blocks * BLOCK)
        self.scheduler.add(prompt)
        self.books.known.append(prompt)

    @rule()
    def begin(self) -> None:
        expected = self.scheduler.should_preempt()
        batch = self.scheduler.next_batch()
        if batch is None:
            return
        assert expected or not self.stack
        for prompt in batch.uncovered:
            self.books.known.remove(prompt)
            self.books.gone.append(prompt)
        for each in batch:
            assert each.start == each.job.num_computed_tokens >= each.job.num_bare_tokens
            assert each.start < each.stop <= each.job.num_tokens
        if batch.slices:
            self.stack.append(batch)
        assert len(self.stack) <= 3

    @precondition(lambda self: self.stack)
    @rule()
    def end(self) -> None:
        batch = self.stack.pop()
        if self.scheduler.is_abandoned(batch):
            self.scheduler.abort(batch)
        else:
            self.scheduler.end_step(batch)
        for each in batch:
            if each.job in self.cancelled:
                self.books.gone.append(each.job)
            elif each.is_last:
                self.books.known.remove(each.job)
                self.books.done.append(each.job)

    @precondition(lambda self: self.stack)
    @rule()
    def fail(self) -> None:
        batch = self.stack.pop()
        self.scheduler.abort(batch)
        for each in batch:
            if each.job not in self.cancelled:
                self.books.known.remove(each.job)
            self.books.gone.append(each.job)

    @precondition(lambda self: self.books.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.books.known) - 1))
        prompt = self.books.known.pop(index)
        self.scheduler.cancel(prompt)
        self.scheduler.cancel(prompt)
        if any(each.job is prompt for batch in self.stack for each in batch):
            self.cancelled.add(prompt)
        else:
            self.books.gone.append(prompt)

    @precondition(lambda self: self.books.done)
    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        """The decoder has pulled a prompt's blocks, or its task was cancelled."""
        prompt = self.books.done.pop(data.draw(st.integers(0, len(self.books.done) - 1)))
        assert len(prompt.blocks or ()) == self.scheduler.blocks_for(prompt.num_tokens)
        self.scheduler.cancel(prompt)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_invariants()
        everyone = (*self.books.known, *self.books.done, *self.cancelled)
        held = [b for prompt in everyone if prompt.blocks for b in prompt.blocks.block_ids]
        assert self.pool.num_used == len(set(held))
        assert all(self.pool.ref_count(each) == held.count(each) for each in set(held))
        assert not any(prompt.blocks and prompt.blocks.is_live for prompt in self.books.gone)

    def teardown(self) -> None:
        while self.stack:
            self.end()
        for prompt in (*self.books.known, *self.books.done):
            self.scheduler.cancel(prompt)
        assert self.scheduler.num_waiting == 0
        assert not self.scheduler._places
        assert not self.scheduler._cancelled
        assert self.pool.num_used == 0
        assert len(set(self.pool.allocate(12).block_ids)) == 12


TestSchedulerMachine = SchedulerMachine.TestCase
