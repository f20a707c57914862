"""Positions by hand; agreement with transformers is a component test."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import RequestFailed
from shared.model.positions import MediaGrid, media_spans, mrope_positions, uncut_stop
from shared.modelspec import VisionSpec

IMAGE, VIDEO = 150, 151
SPEC = VisionSpec(
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
    out_hidden_size=32,
    tokens_per_second=2.0,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=152,
    vision_end_token_id=153,
    min_pixels=None,
    max_pixels=None,
)


def test_text_counts_up_on_all_axes() -> None:
    positions, next_pos = mrope_positions([5, 6, 7], [], SPEC)
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert next_pos == 3


def test_a_picture_spreads_over_height_and_width() -> None:
    ids = [5, *[IMAGE] * 6, 7]
    positions, next_pos = mrope_positions(ids, [MediaGrid(1, 4, 6)], SPEC)
    assert positions[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 4]
    assert positions[1].tolist() == [0, 1, 1, 1, 2, 2, 2, 4]
    assert positions[2].tolist() == [0, 1, 2, 3, 1, 2, 3, 4]
    assert next_pos == 5


def test_adjacent_pictures_are_told_apart_by_their_grids() -> None:
    positions, _ = mrope_positions([IMAGE] * 3, [MediaGrid(1, 2, 2), MediaGrid(1, 2, 4)], SPEC)
    assert positions[2].tolist() == [0, 1, 2]


def test_a_clip_follows_its_time() -> None:
    clip = MediaGrid(3, 2, 2, seconds_per_frame=1.5)
    positions, next_pos = mrope_positions([VIDEO] * 3, [clip], SPEC)
    assert positions[0].tolist() == [0, 3, 6]
    assert next_pos == 7


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([5, IMAGE, IMAGE, 6], [MediaGrid(1, 4, 4)], "4 placeholders expected from token 1, 2 fou"),
        ([5, IMAGE, IMAGE, 6], [MediaGrid(1, 2, 2)], "placeholder at token 2 has no medium; 1 are"),
        ([5, 6], [MediaGrid(1, 2, 2)], "1 placeholders expected from token 2, 0 found"),
        ([5, VIDEO], [MediaGrid(1, 2, 2)], "1 placeholders expected from token 1, 0 found"),
    ],
)
def test_disagreeing_media_are_refused(
    ids: list[int], grids: list[MediaGrid], message: str
) -> None:
    with pytest.raises(RequestFailed, match=message):
        mrope_positions(np.array(ids), grids, SPEC)


@pytest.mark.parametrize(
    ("rows", "spans"), [([], ()), ([3], ((3, 4),)), ([1, 2, 3, 6, 7, 9], ((1, 4), (6, 8), (9, 10)))]
)
def test_spans_are_runs_of_rows(rows: list[int], spans: tuple[tuple[int, int], ...]) -> None:
    assert media_spans(np.array(rows, dtype=np.int64)) == spans


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(0, 2, 2), (0, 3, 3), (0, 4, 3), (0, 8, 8), (3, 5, 8), (5, 6, 8), (0, 9, 8), (8, 9, 12)],
)
def test_chunks_end_beside_spans(start: int, stop: int, expected: int) -> None:
    assert uncut_stop(start, stop, [(3, 8), (8, 12)]) == expected
