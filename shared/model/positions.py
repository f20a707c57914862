"""Positions of a prompt's tokens, on one axis or three.

In: token ids with placeholder runs, and the patch grid of each medium in order of appearance. Out:
positions and the position of the first token to be generated. Pure numpy: the gateway and the
schedulers may use it. It does not know how positions become angles.

Source: Wang et al. 2024 (Qwen2-VL, section 2.1); text counts up on all three axes, a picture holds
the temporal axis still and spreads over height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shared.errors import FailureKind, RequestFailed
from shared.modelspec import ModelSpec, VisionSpec

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MediaGrid:
    """Patch grid of one medium, before merging: frames, rows, columns.

    `seconds_per_frame` is None for a still picture and the time between two temporal patches for a
    clip.
    """

    t: int
    h: int
    w: int
    seconds_per_frame: float | None = None

    @property
    def is_video(self) -> bool:
        return self.seconds_per_frame is not None


def prompt_positions(
    token_ids: IntArray | Sequence[int], media: Sequence[MediaGrid], spec: ModelSpec
) -> tuple[IntArray, int]:
    """Positions of a whole prompt and the next position.

    `[n]` for models with plain positions and for prompts without media, `[3, n]` otherwise.
    """
    if spec.text.rope.mrope_section is None or spec.vision is None or not media:
        return np.arange(len(token_ids), dtype=np.int64), len(token_ids)
    if spec.text.mrope_per_frame:
        media = [frame for item in media for frame in _frames(item)]
    return mrope_positions(token_ids, media, spec.vision)


def media_spans(media_rows: IntArray) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive placeholders, `(start, stop)` each, from the ascending rows of all."""
    if len(media_rows) == 0:
        return ()
    runs = np.split(media_rows, np.flatnonzero(np.diff(media_rows) > 1) + 1)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs)


def mrope_positions(
    token_ids: IntArray | Sequence[int], media: Sequence[MediaGrid], spec: VisionSpec
) -> tuple[IntArray, int]:
    """Temporal, height and width positions `[3, n]` and the next position.

    `RequestFailed` when the placeholder runs do not match the grids.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    pieces: list[IntArray] = []
    cursor, position = 0, 0
    for item in media:
        placeholder = spec.video_token_id if item.is_video else spec.image_token_id
        start = _next_placeholder(ids, cursor, spec)
        num_tokens = spec.num_tokens((item.t, item.h, item.w))
        _check_run(ids[start : start + num_tokens], placeholder, num_tokens, start)
        pieces.append(_text_positions(position, start - cursor))
        position += start - cursor
        pieces.append(_media_positions(position, item, spec))
        # The next text starts after the longer side, whatever the clip's duration.
        position += max(item.h, item.w) // spec.merge_size
        cursor = start + num_tokens
    leftover = _next_placeholder(ids, cursor, spec)
    if leftover < len(ids):
        raise _mismatch(f"placeholder at token {leftover} has no medium; {len(media)} are given")
    pieces.append(_text_positions(position, len(ids) - cursor))
    positions = np.concatenate(pieces, axis=1)
    return positions, int(positions.max(initial=-1)) + 1


def uncut_stop(start: int, stop: int, spans: Sequence[tuple[int, int]]) -> int:
    """Where a chunk from `start` that should end at `stop` may end without cutting a span.

    In front of the span that holds `stop`; behind it if the chunk would be empty otherwise.
    """
    for first, end in spans:
        if first < stop < end:
            return first if first > start else end
    return stop


def _frames(item: MediaGrid) -> list[MediaGrid]:
    """A clip whose frames are runs of their own, with their times as text in between."""
    return [replace(item, t=1)] * item.t


def _next_placeholder(ids: IntArray, start: int, spec: VisionSpec) -> int:
    """Index of the first placeholder at or after `start`; the length where there is none."""
    is_media = ids[start:] == spec.image_token_id
    if spec.video_token_id is not None:
        is_media |= ids[start:] == spec.video_token_id
    return start + int(is_media.argmax()) if is_media.any() else len(ids)


def _check_run(run: IntArray, placeholder: int | None, num_tokens: int, start: int) -> None:
    found = int((run == placeholder).sum())
    if found != num_tokens:
        raise _mismatch(f"{num_tokens} placeholders expected from token {start}, {found} found")


def _mismatch(detail: str) -> RequestFailed:
    return RequestFailed(FailureKind.BAD_REQUEST, f"media and placeholders disagree: {detail}")


def _text_positions(start: int, num_tokens: int) -> IntArray:
    return np.tile(np.arange(start, start + num_tokens, dtype=np.int64), (3, 1))


def _media_positions(start: int, item: MediaGrid, spec: VisionSpec) -> IntArray:
    """`[3, num_tokens]`, frame by frame, row by row."""
    rows, columns = item.h // spec.merge_size, item.w // spec.merge_size
    interval = np.float32(1.0)
    if item.seconds_per_frame is not None and spec.tokens_per_second is not None:
        # In float32 as transformers does it: the product is cut, so its last bit may decide.
        interval = np.float32(spec.tokens_per_second) * np.float32(item.seconds_per_frame)
    frame, row, column = np.indices((item.t, rows, columns)).reshape(3, -1)
    temporal = (frame.astype(np.float32) * interval).astype(np.int64)
    return np.stack((temporal, row, column)).astype(np.int64) + start
