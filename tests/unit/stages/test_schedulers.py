"""The schedulers of encode and decode, driven with literals."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.decode.scheduler import DecodeScheduler
from services.decode.sequence import Sequence
from services.encoder.scheduler import EncodeScheduler, take_delay_s
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import RequestFailed, SettingsError
from shared.messages.descriptor import SamplingParams, WorkerRef
from shared.messages.events import FinishedEvent, FinishReason, TokenEvent
from shared.model.sampling_row import Sampled, SamplingState


@dataclass(eq=False)
class Picture:
    num_patches: int


def sequence(blocks: BlockHandle, *, max_tokens: int = 8, stop: tuple[int, ...] = ()) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)
    return Sequence(
        request_id="r",
        attempt=0,
        gateway=WorkerRef(name="g", incarnation=1),
        sampling=sampling,
        state=SamplingState(sampling, prompt_ids=[1, 2], answer_ids=[5]),
        blocks=blocks,
        kv_len=10,
        next_pos=7,
        last_token_id=5,
        next_index=1,
    )


class TestEncodeScheduler:
    def test_packs_pictures_up_to_the_patch_budget_in_order(self) -> None:
        scheduler: EncodeScheduler[Picture] = EncodeScheduler(max_batch_patches=100)
        pictures = [Picture(40), Picture(60), Picture(1)]
        for picture in pictures:
            scheduler.add(picture)
        assert scheduler.next_batch() == pictures[:2]
        assert scheduler.next_batch() == pictures[2:]
        assert scheduler.next_batch() == []

    def test_a_picture_beyond_the_budget_goes_alone(self) -> None:
        scheduler: EncodeScheduler[Picture] = EncodeScheduler(max_batch_patches=100)
        large, small = Picture(500), Picture(1)
        scheduler.add(large)
        scheduler.add(small)
        assert scheduler.next_batch() == [large]
        assert scheduler.next_batch() == [small]

    def test_a_cancelled_picture_is_never_encoded(self) -> None:
        scheduler: EncodeScheduler[Picture] = EncodeScheduler(max_batch_patches=100)
        picture = Picture(1)
        scheduler.add(picture)
        scheduler.cancel(picture)
        scheduler.cancel(picture)
        assert scheduler.next_batch() == []

    def test_the_less_an_encoder_holds_the_sooner_it_asks_and_alone_at_once(self) -> None:
        delays_s = [take_delay_s(num_held, num_encoders=3) for num_held in range(4)]
        assert delays_s == sorted(set(delays_s))
        assert delays_s[0] == 0.0
        assert take_delay_s(5, num_encoders=1) == take_delay_s(5, num_encoders=0) == 0.0

    def test_a_budget_below_one_patch_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="max_batch_patches is 0"):
            EncodeScheduler(max_batch_patches=0)


class TestDecodeScheduler:
    def make(self, max_batch: int = 2) -> tuple[DecodeScheduler, BlockPool]:
        pool = BlockPool(10, block_size=16)
        return DecodeScheduler(pool, max_batch=max_batch), pool

    def started(self, scheduler: DecodeScheduler) -> Sequence:
        blocks = scheduler.try_admit(10, 32)
        assert blocks is not None
        running = sequence(blocks)
        scheduler.start(running)
        return running

    def test_admits_while_there_are_slots_and_blocks(self) -> None:
        scheduler, pool = self.make()
        assert scheduler.try_admit(10, 64) is not None
        assert scheduler.try_admit(10, 6 * 16 + 1) is None  # 7 blocks, 6 free
        assert scheduler.try_admit(10, 16) is not None
        assert scheduler.try_admit(10, 16) is None  # no slot
        assert pool.num_free == 5

    def test_an_answer_that_can_never_fit_is_refused(self) -> None:
        scheduler, _ = self.make()
        with pytest.raises(RequestFailed, match="11 KV blocks.* has 10"):
            scheduler.try_admit(10, 161)

    def test_blocks_that_hold_the_sequence_already_are_shared_not_copied(self) -> None:
        scheduler, pool = self.make()
        with pool.allocate(3) as prefilled:
            blocks = scheduler.try_admit(10, 5 * 16, shared=prefilled.block_ids)
            assert blocks is not None
            assert blocks.block_ids[:3] == prefilled.block_ids
            assert (len(blocks), pool.num_free) == (5, 5)
            assert [pool.ref_count(i) for i in blocks.block_ids] == [2, 2, 2, 1, 1]
        assert pool.num_free == 5  # the first owner is gone, the sequence still holds them
        assert scheduler.try_admit(10, 6 * 16, shared=blocks.block_ids[:0]) is None
        scheduler.withdraw(blocks)
        assert pool.num_free == 10

    def test_more_shared_blocks_than_needed_are_left_to_their_owner(self) -> None:
        scheduler, pool = self.make()
        prefilled = pool.allocate(4)
        blocks = scheduler.try_admit(10, 2 * 16, shared=prefilled.block_ids)
        assert blocks is not None
        assert blocks.block_ids == prefilled.block_ids[:2]
        prefilled.free()
        assert pool.num_used == 2

    def test_a_withdrawn_admission_gives_all_back(self) -> None:
        scheduler, pool = self.make(max_batch=1)
        blocks = scheduler.try_admit(10, 64)
        assert blocks is not None
        scheduler.withdraw(blocks)
        assert (scheduler.num_free_slots, pool.num_free) == (1, 10)

    def test_every_started_sequence_takes_part_in_every_step(self) -> None:
        scheduler, _ = self.make()
        first, second = self.started(scheduler), self.started(scheduler)
        assert scheduler.next_step().batch == (first, second)
        scheduler.end_step()
        scheduler.retire(first)
        assert scheduler.next_step().batch == (second,)

    def test_blocks_stay_taken_while_a_step_may_write_them(self) -> None:
        scheduler, pool = self.make()
        running = self.started(scheduler)
        scheduler.next_step()
        scheduler.retire(running)
        scheduler.retire(running)
        assert pool.num_free == 8
        assert scheduler.num_free_slots == 2
        scheduler.end_step()
        assert pool.num_free == 10


class TestSequence:
    def test_a_token_advances_cache_position_and_index(self) -> None:
        running = sequence(BlockPool(1, 16).allocate(1))
        (event,) = running.append(Sampled(42))
        assert isinstance(event, TokenEvent)
        assert (event.index, event.token_id) == (1, 42)
        assert (running.kv_len, running.next_pos, running.next_index) == (11, 8, 2)

    def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(self) -> None:
        running = sequence(BlockPool(1, 16).allocate(1), stop=(9,))
        (event,) = running.append(Sampled(9))
        assert isinstance(event, FinishedEvent)
        assert (event.reason, event.num_tokens) == (FinishReason.STOP, 1)

    def test_the_last_allowed_token_is_sent_and_ends_the_answer(self) -> None:
        running = sequence(BlockPool(1, 16).allocate(1), max_tokens=2)
        token, end = running.append(Sampled(42))
        assert isinstance(token, TokenEvent)
        assert isinstance(end, FinishedEvent)
        assert (end.reason, end.num_tokens) == (FinishReason.LENGTH, 2)
