"""Steps within steps, and prompts that nobody wants any more."""

from __future__ import annotations

import pytest

from services.prefill.batch import PrefillBatch
from tests.support.prefill_prompts import Prompt, Scheduler, make, spans


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

    def test_an_urgent_prompt_without_blocks_does_not_hold_up_one_that_has_its_own(self) -> None:
        scheduler = make(chunk_tokens=32, max_batch_tokens=64, max_suspended=2)
        self.start(scheduler, Prompt(72))
        begun = Prompt(56, priority=-1)
        scheduler.end_step(self.start(scheduler, begun))
        scheduler.add(Prompt(56, priority=-2))
        assert scheduler.should_preempt()
        assert spans(scheduler.next_batch()) == [(begun, 32, 56)]

    def test_an_urgent_prompt_that_lost_what_it_was_to_begin_with_leaves_at_once(self) -> None:
        scheduler = make(max_suspended=1)
        self.start(scheduler, Prompt(144))
        lost = Prompt(64, priority=-1, num_bare_tokens=16)
        scheduler.add(lost)
        assert scheduler.should_preempt()
        batch = scheduler.next_batch()
        assert batch is not None
        assert batch.uncovered == (lost,)

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
