"""Which prompts the prefill scheduler puts into a step, and how much of each."""

from __future__ import annotations

import pytest

from shared.errors import FailureKind, RequestFailed, SettingsError
from tests.support.prefill_prompts import Prompt, compute, make, spans


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
