"""Clips on their way in: what is counted, what is refused, which frames are taken."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from services.encoder.clips import frame_indices
from shared.errors import RequestFailed
from shared.media.sizing.clip import ClipSizing
from shared.media.video import VideoFacts, VideoLimits, container_of, probe_video, read_frames
from tests.support.video_folders import clip_file
from tests.support.vision_folders import picture_file

SIZING = ClipSizing(14, 2, 2, min_pixels=100_352, max_pixels=602_112)


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("matroska", "mpeg4")]
)
def test_facts_and_frames(container: str, codec: str) -> None:
    data = clip_file(20, container=container, codec=codec)
    assert probe_video(data, VideoLimits()) == VideoFacts(20, 10.0, 32, 48)
    with av.open(io.BytesIO(data)) as opened:
        every = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
    ours = list(read_frames(data, [0, 7, 19], 10_000))
    np.testing.assert_array_equal(np.stack(ours), np.stack([every[i] for i in (0, 7, 19)]))


@pytest.mark.parametrize(
    ("data", "limits", "words"),
    [
        (picture_file(8, 8), VideoLimits(), "not a MP4, MOV, WebM, Matroska, AVI file"),
        (b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", VideoLimits(), "not a MP4"),
        (clip_file(4)[:200], VideoLimits(), "cannot be decoded"),
        (b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 64, VideoLimits(), "video refused"),
        (clip_file(4), VideoLimits(max_bytes=100), "the limit is 100"),
        (clip_file(20), VideoLimits(max_frames=19), "more than 19 frames"),
        (clip_file(20), VideoLimits(max_duration_s=1.5), "more than 1.5 s"),
        (clip_file(4), VideoLimits(max_pixels=1000), "48x32 = 1536 pixels, the limit is 1000"),
    ],
)
def test_bad_clips_are_refused(data: bytes, limits: VideoLimits, words: str) -> None:
    with pytest.raises(RequestFailed, match=words):
        probe_video(data, limits)


def test_a_frame_that_is_not_there_is_refused() -> None:
    with pytest.raises(RequestFailed, match="frame 9 is needed, only 4 frames can be decoded"):
        list(read_frames(clip_file(4), [0, 9], 10_000))


def test_containers_by_their_first_bytes() -> None:
    assert container_of(clip_file(2)) == "mov"
    assert container_of(clip_file(2, container="avi")) == "avi"
    assert container_of(b"RIFF1234WEBPVP8 ") is None


# Facts, sampled frames, grid and seconds of a step by transformers 5.23's rule at 2 frames/s.
@pytest.mark.parametrize(
    ("facts", "num_frames", "grid", "seconds"),
    [
        (VideoFacts(300, 30.0, 480, 640), 20, (10, 34, 46), 1.0),
        (VideoFacts(20, 10.0, 480, 640), 4, (2, 34, 46), 1.0),
        (VideoFacts(3, 30.0, 480, 640), 2, (1, 34, 46), 0.1),
        (VideoFacts(1, 30.0, 480, 640), 1, (1, 34, 46), 1 / 15),
        (VideoFacts(77, 7.0, 480, 640), 22, (11, 34, 46), 1.0),
        (VideoFacts(100_000, 25.0, 480, 640), 768, (384, 34, 46), 2 / (768 / 100_000 * 25.0)),
    ],
)
def test_layouts(
    facts: VideoFacts, num_frames: int, grid: tuple[int, int, int], seconds: float
) -> None:
    layout = SIZING.measure(facts)
    assert (layout.num_frames, layout.grid_thw) == (num_frames, grid)
    assert layout.seconds_per_step == pytest.approx(seconds, rel=1e-12)
    assert layout.num_tokens == grid[0] * grid[1] * grid[2] // 4
    indices = frame_indices(facts.num_frames, num_frames)
    assert len(set(indices)) == num_frames
    assert indices == sorted(indices)
    assert indices[-1] < facts.num_frames
