"""Which items are divided, by literals."""

from __future__ import annotations

from services.gateway.division import num_free, numbers_of_parts
from shared.messages.descriptor import MediaItem, WorkerRef
from shared.messages.refs import EmbeddingClaim

ENCODERS = [WorkerRef(name=name, incarnation=1) for name in "abcde"]


def item(num_units: int, patches: int = 100) -> MediaItem:
    return MediaItem(
        kind="image",
        sha256="0" * 64,
        content_key="1" * 64,
        grid_thw=(1, 1, num_units),
        offset=0,
        num_tokens=4 * num_units,
        units=((num_units, 4, patches),),
    )


def parts(items: list[MediaItem], num_encoders: int = 5, min_part_patches: int = 100) -> list[int]:
    return numbers_of_parts(items, num_encoders=num_encoders, min_part_patches=min_part_patches)


def claim(encoder: WorkerRef | None) -> EmbeddingClaim:
    return EmbeddingClaim(
        content_key="k", request_id="r", attempt=0, deadline_unix_s=1.0, encoder=encoder
    )


class TestNumbersOfParts:
    def test_one_large_item_goes_to_all(self) -> None:
        assert parts([item(20)]) == [5]

    def test_a_few_items_are_all_divided_so_that_the_first_land_first(self) -> None:
        for number in (2, 5, 6, 10, 14):
            assert parts([item(20)] * number) == [5] * number

    def test_many_items_go_round_whole_and_the_rest_of_a_round_is_divided(self) -> None:
        assert parts([item(20)] * 15) == [1] * 15
        assert parts([item(20)] * 17) == [1] * 15 + [5] * 2

    def test_small_items_stay_whole_beside_a_large_one(self) -> None:
        assert parts([item(1), item(100), item(1)]) == [1, 5, 1]

    def test_no_part_is_smaller_than_asked(self) -> None:
        assert parts([item(20)], min_part_patches=700) == [2]
        assert parts([item(20)], min_part_patches=1001) == [1]
        assert parts([item(3)]) == [3]

    def test_nothing_is_divided_for_one_encoder_or_if_told_so(self) -> None:
        assert parts([item(20)], num_encoders=1) == [1]
        assert parts([item(20)], num_encoders=0) == [1]
        assert parts([item(20)], min_part_patches=0) == [1]

    def test_an_item_of_unknown_units_stays_whole(self) -> None:
        unknown = item(5).model_copy(update={"units": ()})
        assert parts([unknown, item(20)]) == [1, 5]


class TestNumFree:
    def test_encoders_at_work_are_not_free(self) -> None:
        assert num_free(ENCODERS, []) == 5
        assert num_free(ENCODERS, [claim(ENCODERS[0]), claim(ENCODERS[0])]) == 4

    def test_a_queued_task_takes_one(self) -> None:
        assert num_free(ENCODERS, [claim(None), claim(ENCODERS[1]), claim(None)]) == 2
        assert num_free(ENCODERS[:1], [claim(None)] * 3) == 0

    def test_an_encoder_that_left_counts_for_nothing(self) -> None:
        assert num_free(ENCODERS[:2], [claim(ENCODERS[4])]) == 2
