"""What is computed of prompts whose later embeddings are still missing."""

from __future__ import annotations

import random

import pytest

from services.prefill.batch import PrefillBatch
from shared.errors import SettingsError
from tests.support.prefill_prompts import BLOCK, Prompt, Scheduler, make, prompt_of, spans


def early(num_blocks: int = 20, **options: int) -> Scheduler:
    return make(num_blocks, cache=True, **{"min_early_tokens": BLOCK, **options})


def waiting(scheduler: Scheduler, num_tokens: int, num_ready: int, first: int = 1) -> Prompt:
    """A prompt whose first `num_ready` tokens have their embeddings."""
    prompt = prompt_of(scheduler, list(range(first, first + num_tokens)))
    prompt.num_missing_tokens = num_tokens - num_ready
    scheduler.add(prompt)
    return prompt


def run(scheduler: Scheduler) -> list[tuple[Prompt, int, int]]:
    """Compute what there is to compute; all slices in order."""
    seen = []
    while batch := scheduler.next_batch():
        seen += spans(batch)
        scheduler.end_step(batch)
    return seen


def first_batch(scheduler: Scheduler) -> PrefillBatch[Prompt]:
    batch = scheduler.next_batch()
    assert batch is not None
    return batch


class TestBeginnings:
    def test_what_is_ready_is_computed_in_whole_blocks_and_the_blocks_are_given_back(self) -> None:
        scheduler = early()
        prompt = waiting(scheduler, 100, num_ready=40)
        batch = first_batch(scheduler)
        assert batch.is_early
        assert spans(batch) == [(prompt, 0, 32)]
        assert len(prompt.blocks or ()) == 2, "no more than the slice needs"
        scheduler.end_step(batch)
        assert prompt.blocks is None
        assert scheduler._pool.num_used == 0
        assert scheduler.next_batch() is None

    def test_each_picture_that_lands_brings_it_further_and_the_last_one_to_its_end(self) -> None:
        scheduler = early()
        prompt = waiting(scheduler, 100, num_ready=40)
        assert run(scheduler) == [(prompt, 0, 32)]
        prompt.num_missing_tokens = 30
        assert run(scheduler) == [(prompt, 32, 64)]
        prompt.num_missing_tokens = 0
        assert run(scheduler) == [(prompt, 64, 100)]
        assert len(prompt.blocks or ()) == 7

    def test_its_own_work_does_not_count_as_found_in_the_cache(self) -> None:
        scheduler = early()
        first = waiting(scheduler, 100, num_ready=100)
        run(scheduler)
        again = waiting(scheduler, 100, num_ready=100)
        again.num_missing_tokens = 60
        longer = prompt_of(scheduler, [*range(1, 33), *range(200, 260)])
        longer.num_missing_tokens = 20
        scheduler.add(longer)
        run(scheduler)
        longer.num_missing_tokens = again.num_missing_tokens = 0
        run(scheduler)
        assert [p.num_cached_tokens for p in (first, longer, again)] == [0, 32, 96]
        assert scheduler.prefix is not None
        counters = scheduler.prefix.counters()
        assert (counters.asked_tokens, counters.hit_tokens) == (100 + 92 + 100, 32 + 96)

    def test_too_little_is_not_worth_a_step(self) -> None:
        scheduler = early(min_early_tokens=48)
        prompt = waiting(scheduler, 100, num_ready=47)
        assert run(scheduler) == []
        prompt.num_missing_tokens = 100 - 90
        assert run(scheduler) == [(prompt, 0, 80)]

    @pytest.mark.parametrize("cache", [True, False])
    def test_it_is_off_without_a_number_or_a_cache(self, cache: bool) -> None:
        scheduler = make(cache=cache, min_early_tokens=0 if cache else BLOCK)
        prompt = Prompt(100, num_missing_tokens=10)
        scheduler.add(prompt)
        assert not scheduler.computes_early
        assert scheduler.next_batch() is None
        prompt.num_missing_tokens = 0
        assert spans(scheduler.next_batch()) == [(prompt, 0, 100)]

    def test_a_negative_number_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="min_early_tokens -1"):
            make(min_early_tokens=-1)


class TestSizes:
    def test_chunks_bound_a_slice(self) -> None:
        scheduler = early(chunk_tokens=32)
        prompt = waiting(scheduler, 150, num_ready=100)
        assert run(scheduler) == [(prompt, 0, 32), (prompt, 32, 64), (prompt, 64, 96)]

    def test_without_chunks_the_budget_does(self) -> None:
        scheduler = early(40, max_batch_tokens=64)
        prompt = waiting(scheduler, 200, num_ready=150)
        assert run(scheduler) == [(prompt, 0, 64), (prompt, 64, 128), (prompt, 128, 144)]

    def test_several_share_a_step_within_the_budget(self) -> None:
        scheduler = early(40, max_batch_tokens=64)
        one = waiting(scheduler, 100, num_ready=50)
        two = waiting(scheduler, 100, num_ready=50, first=500)
        assert spans(scheduler.next_batch()) == [(one, 0, 48), (two, 0, 16)]

    def test_a_picture_that_must_be_whole_is_not_cut(self) -> None:
        scheduler = early(40)
        prompt = waiting(scheduler, 200, num_ready=90)
        prompt.whole_spans = ((20, 40), (45, 75), (90, 120))
        prompt.num_missing_tokens = 200 - 45  # the second one is missing
        assert run(scheduler) == [(prompt, 0, 40)], "two blocks of it can be kept"
        prompt.num_missing_tokens = 200 - 90
        assert run(scheduler) == [(prompt, 32, 80)]
        prompt.num_missing_tokens = 0
        assert run(scheduler)[0][:2] == (prompt, 80)

    def test_a_chunk_ends_before_a_picture_that_must_be_whole(self) -> None:
        scheduler = early(40, chunk_tokens=48)
        prompt = waiting(scheduler, 200, num_ready=100)
        prompt.whole_spans = ((36, 90),)
        assert run(scheduler) == [(prompt, 0, 36), (prompt, 32, 90), (prompt, 80, 96)]

    def test_one_larger_than_a_chunk_is_computed_whole_once_it_is_there(self) -> None:
        scheduler = early(40, chunk_tokens=32)
        prompt = waiting(scheduler, 200, num_ready=10)
        prompt.whole_spans = ((10, 90), (100, 120))
        assert run(scheduler) == []
        prompt.num_missing_tokens = 100
        assert run(scheduler) == [(prompt, 0, 90), (prompt, 80, 96)]

    def test_a_missing_picture_within_a_span_of_two_holds_the_span_back(self) -> None:
        scheduler = early(40)
        prompt = waiting(scheduler, 200, num_ready=70)  # rows 40 to 70 are there, 70 to 100 not
        prompt.whole_spans = ((40, 100),)
        assert run(scheduler) == [(prompt, 0, 40)]
        prompt.num_missing_tokens = 0
        assert run(scheduler) == [(prompt, 32, 200)]


class TestOthers:
    def test_a_prompt_with_all_its_embeddings_goes_first_and_alone(self) -> None:
        scheduler = early()
        partial = waiting(scheduler, 100, num_ready=50)
        partial.priority = -5
        complete = waiting(scheduler, 20, num_ready=20, first=500)
        batch = first_batch(scheduler)
        assert not batch.is_early
        assert spans(batch) == [(complete, 0, 20)]

    def test_it_does_not_wait_for_an_early_step(self) -> None:
        scheduler = early(max_suspended=1)
        waiting(scheduler, 100, num_ready=50)
        outer = first_batch(scheduler)
        assert not scheduler.should_preempt()
        complete = waiting(scheduler, 20, num_ready=20, first=500)
        assert scheduler.should_preempt()
        inner = first_batch(scheduler)
        assert spans(inner) == [(complete, 0, 20)]
        scheduler.end_step(inner)
        scheduler.end_step(outer)

    def test_an_early_step_whose_prompt_became_complete_keeps_its_place(self) -> None:
        scheduler = early(max_suspended=1)
        prompt = waiting(scheduler, 100, num_ready=50)
        outer = first_batch(scheduler)
        later = waiting(scheduler, 20, num_ready=20, first=500)
        prompt.num_missing_tokens = 0
        assert not scheduler.should_preempt()
        assert scheduler.next_batch() is None
        scheduler.end_step(outer)
        assert spans(scheduler.next_batch()) == [(prompt, 48, 100), (later, 0, 20)]

    def test_a_prompt_that_waits_for_blocks_is_not_held_up_by_it(self) -> None:
        scheduler = early(10)
        waiting(scheduler, 100, num_ready=60)
        held = scheduler._pool.allocate(4)
        complete = waiting(scheduler, 160, num_ready=160, first=500)
        assert scheduler.next_batch() is None
        held.free()
        assert scheduler.next_batch() is not None
        assert complete.blocks is not None

    def test_half_of_the_free_blocks_stay_free(self) -> None:
        scheduler = early(10)
        one = waiting(scheduler, 120, num_ready=96)
        assert scheduler.next_batch() is None
        one.num_missing_tokens = 120 - 80
        assert spans(scheduler.next_batch()) == [(one, 0, 80)]

    def test_a_prompt_whose_bare_beginning_went_comes_back_at_once(self) -> None:
        scheduler = early()
        bare = waiting(scheduler, 100, num_ready=60)
        bare.num_bare_tokens = 20
        batch = first_batch(scheduler)
        assert (batch.slices, batch.uncovered) == ((), (bare,))
        assert scheduler.next_batch() is None


class TestLosses:
    def test_what_the_cache_lost_is_not_computed_again_before_the_prompt_is_complete(self) -> None:
        scheduler = early()
        prompt = waiting(scheduler, 100, num_ready=70)
        assert run(scheduler) == [(prompt, 0, 64)]
        scheduler._pool.allocate(20).free()  # evicts it
        assert run(scheduler) == []
        prompt.num_missing_tokens = 15  # one block more
        assert run(scheduler) == [(prompt, 0, 80)]
        scheduler._pool.allocate(20).free()
        prompt.num_missing_tokens = 0
        assert run(scheduler) == [(prompt, 0, 100)]

    def test_a_prompt_that_is_cancelled_while_it_waits_leaves_nothing(self) -> None:
        scheduler = early()
        prompt = waiting(scheduler, 100, num_ready=50)
        run(scheduler)
        scheduler.cancel(prompt)
        assert scheduler._pool.num_used == 0
        assert not scheduler._places
        assert not scheduler._early._begun

    def test_one_that_is_cancelled_in_a_step_gives_its_blocks_back_when_that_ends(self) -> None:
        scheduler = early()
        prompt = waiting(scheduler, 100, num_ready=50)
        batch = first_batch(scheduler)
        scheduler.cancel(prompt)
        assert scheduler.should_preempt()
        assert scheduler._pool.num_used == 3
        scheduler.abort(batch)
        assert scheduler._pool.num_used == 0

    def test_a_failed_step_leaves_nothing_in_the_cache(self) -> None:
        scheduler = early()
        waiting(scheduler, 100, num_ready=50)
        scheduler.abort(first_batch(scheduler))
        assert scheduler.prefix is not None
        assert scheduler.prefix.counters().cached_blocks == 0
        assert scheduler._pool.num_used == 0


@pytest.mark.parametrize("seed", range(5))
def test_whatever_lands_when_all_prompts_are_computed_and_early_work_is_bounded(seed: int) -> None:
    """Prompts that together do not fit into the pool, whose embeddings come in small pieces."""
    rng = random.Random(seed)
    scheduler = early(24, max_suspended=1, chunk_tokens=rng.choice([0, 32]))
    prompts = [waiting(scheduler, 150, rng.randrange(150), first=1000 * n) for n in range(1, 9)]
    done: set[Prompt] = set()
    early_slices = dict.fromkeys(prompts, 0)
    while len(done) < len(prompts):
        missing = [prompt for prompt in prompts if prompt.num_missing_tokens]
        if missing:
            late = rng.choice(missing)
            late.num_missing_tokens = max(0, late.num_missing_tokens - rng.randrange(1, 40))
        while batch := scheduler.next_batch():
            for each in batch:
                assert each.stop <= each.job.num_ready_tokens
                early_slices[each.job] += batch.is_early
            scheduler.end_step(batch)
            for job in [each.job for each in batch if each.is_last]:
                assert job.blocks is not None
                job.blocks.free()
                done.add(job)
        assert scheduler._pool.num_used == 0, "nobody who waits holds anything"
    assert max(early_slices.values()) <= 150 // BLOCK
    scheduler._pool.check_invariants()
