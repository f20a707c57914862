"""Prompts that begin behind what is cached."""

from __future__ import annotations

from tests.support.prefill_prompts import compute, make, prompt_of, spans


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
