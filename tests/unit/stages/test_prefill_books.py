"""The prefill scheduler under random operations: its books balance."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.prefill.batch import PrefillBatch
from tests.support.prefill_prompts import BLOCK, Prompt, make, prompt_of


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
        self.scheduler = make(
            12,
            cache=True,
            max_batch_tokens=64,
            chunk_tokens=32,
            max_suspended=2,
            min_early_tokens=8,
        )
        self.pool = self.scheduler._pool
        self.books = Books()
        self.stack: list[PrefillBatch[Prompt]] = []
        self.cancelled: set[Prompt] = set()

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        priority=st.integers(-2, 2),
        num_bare_blocks=st.integers(0, 2),
        num_missing=st.sampled_from([0, 0, 1, 20, 50]),
    )
    def add(self, tokens: list[int], priority: int, num_bare_blocks: int, num_missing: int) -> None:
        prompt = prompt_of(self.scheduler, [token for token in tokens for _ in range(8)])
        prompt.priority = priority
        cached = self.scheduler.prefix.num_cached_tokens(  # type: ignore[union-attr]
            prompt.block_keys, prompt.num_tokens
        )
        prompt.num_bare_tokens = min(cached, num_bare_blocks * BLOCK)
        # What is missing lies behind what comes from the cache.
        prompt.num_missing_tokens = min(num_missing, prompt.num_tokens - prompt.num_bare_tokens)
        self.scheduler.add(prompt)
        self.books.known.append(prompt)

    @precondition(lambda self: self.books.known)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        """An embedding of a prompt is there, in whatever state the prompt is."""
        prompt = self.books.known[data.draw(st.integers(0, len(self.books.known) - 1))]
        prompt.num_missing_tokens = max(0, prompt.num_missing_tokens - 20)

    @rule()
    def begin(self) -> None:
        expected = self.scheduler.should_preempt()
        num_waiting = self.scheduler.num_waiting
        batch = self.scheduler.next_batch()
        if batch is None:
            return
        assert expected or not self.stack
        if batch.is_early:
            assert not self.stack
            assert num_waiting == len([p for p in batch.uncovered if not p.num_missing_tokens])
        for prompt in batch.uncovered:
            self.books.known.remove(prompt)
            self.books.gone.append(prompt)
        for each in batch:
            assert each.start == each.job.num_computed_tokens >= each.job.num_bare_tokens
            assert each.start < each.stop <= each.job.num_ready_tokens
            assert batch.is_early == (each.job.num_missing_tokens > 0)
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
        early = [p for p in self.books.known if p.num_missing_tokens and p.blocks]
        assert all(any(each.job is p for b in self.stack for each in b) for p in early)
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
        assert not self.scheduler._early._begun
        assert self.pool.num_used == 0
        assert len(set(self.pool.allocate(12).block_ids)) == 12


TestSchedulerMachine = SchedulerMachine.TestCase
