"""A picture's runs must hold exactly its placeholders."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from shared.messages.codec import decode, encode
from shared.messages.descriptor import MediaItem, MediaPart


def item(**changes: object) -> MediaItem:
    fields = {
        "kind": "image",
        "sha256": "0" * 64,
        "content_key": "1" * 64,
        "grid_thw": (1, 2, 3),
        "offset": 5,
        "num_tokens": 6,
    }
    return MediaItem.model_validate({**fields, **changes})


def test_one_run_needs_no_list() -> None:
    assert item().spans == ((5, 11),)
    assert item() == decode(encode(item()), MediaItem)


def test_several_runs() -> None:
    several = item(runs=((5, 2), (9, 4)))
    assert several.spans == ((5, 7), (9, 13))
    assert (item().stop, several.stop) == (11, 13)
    assert decode(encode(several), MediaItem) == several


@pytest.mark.parametrize(
    ("runs", "complaint"),
    [
        (((5, 3), (7, 3)), "overlap, are empty or begin before the offset"),
        (((5, 6), (11, 0)), "overlap, are empty or begin before the offset"),
        (((4, 6),), "overlap, are empty or begin before the offset"),
        (((6, 6),), "do not hold 6 placeholders from 5"),
        (((5, 2), (9, 3)), "do not hold 6 placeholders from 5"),
    ],
)
def test_runs_that_do_not_add_up(runs: tuple[tuple[int, int], ...], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        item(runs=runs)


def test_units_hold_exactly_its_rows() -> None:
    divisible = item(units=((2, 2, 9), (1, 2, 7)))
    assert divisible.num_patches == 25
    assert item().num_patches == 6
    assert decode(encode(divisible), MediaItem) == divisible
    with pytest.raises(ValidationError, match="give 4 rows, not 6"):
        item(units=((2, 2, 9),))


def test_a_part_is_one_of_its_parts() -> None:
    fields = {"content_key": "2" * 64, "first_row": 2, "num_tokens": 3, "num_patches": 1}
    part = MediaPart.model_validate({**fields, "index": 1, "count": 2})
    assert part.rows == slice(2, 5)
    with pytest.raises(ValidationError, match="index=2 of count=2"):
        MediaPart.model_validate({**fields, "index": 2, "count": 2})
