"""Raw bytes to the facts and frames of a clip, safely.

In: bytes that anybody may have sent. Out: how many frames a clip has, how fast and how large they
are, and single frames as RGB. The container is told by the first bytes and no other reader is ever
tried, because some formats (playlists) would make the reader open further files and addresses.
Knows nothing of models.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import av.container
import av.error
import numpy as np
import numpy.typing as npt

from shared.errors import FailureKind, RequestFailed

CONTAINERS = ("MP4", "MOV", "WebM", "Matroska", "AVI")

# VP8 hides frames among its packets: only a decoder can count what is shown.
_COUNTED_BY_DECODING = frozenset({"vp8"})

_BORDER_PIXELS = 65_536

RgbFrame = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """Bounds on one clip: its file and what it decodes to."""

    max_bytes: int = 24 * 1024 * 1024
    max_duration_s: float = 600.0
    max_frames: int = 36_000
    max_pixels: int = 8_847_360
    """Pixels of one frame; 4096 by 2160 is inside."""


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What a sampling rule needs to know of a clip; `fps` is the container's average."""

    num_frames: int
    fps: float
    height: int
    width: int


def container_of(data: bytes) -> str | None:
    """The reader for a clip's container by its first bytes; None for anything else."""
    if data[4:8] == b"ftyp" or data[4:8] == b"moov":
        return "mov"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    return None


def probe_video(data: bytes, limits: VideoLimits) -> VideoFacts:
    """Count the frames without decoding more than the first.

    Raises `RequestFailed` (bad request) that says what is wrong with the clip.
    """
    if len(data) > limits.max_bytes:
        raise _refused(f"it has {len(data)} bytes, the limit is {limits.max_bytes}")
    with _opened(data, limits.max_pixels) as (container, stream):
        fps = float(stream.average_rate or 0.0)
        if fps <= 0:
            raise _refused("its container does not tell how many frames a second has")
        num_frames = _count(container, stream, min(limits.max_frames, fps * limits.max_duration_s))
        if num_frames == 0:
            raise _refused("it has no frames")
        if num_frames > limits.max_frames:
            raise _refused(f"it has more than {limits.max_frames} frames, which is the limit")
        if num_frames / fps > limits.max_duration_s:
            raise _refused(
                f"it lasts more than {limits.max_duration_s:g} s, which is the limit "
                f"({fps:g} frames a second)"
            )
    # Opened anew: not every container can be rewound.
    first = next(read_frames(data, [0], limits.max_pixels))
    return VideoFacts(num_frames, fps, first.shape[0], first.shape[1])


def read_frames(data: bytes, indices: Sequence[int], max_pixels: int) -> Iterator[RgbFrame]:
    """The frames with these ascending indices, `[height, width, 3]` each, all of one size.

    A rotation that the container asks for is not applied. Raises `RequestFailed` (bad request)
    for a clip that is damaged, ends early or changes its size.
    """
    wanted = iter(indices)
    index = next(wanted, None)
    size: tuple[int, int] | None = None
    num_decoded = 0
    with _opened(data, max_pixels) as (container, _):
        for frame in container.decode(video=0):
            if index is None:
                return
            if num_decoded == index:
                _check_pixels(frame.width, frame.height, max_pixels)
                size = size or (frame.height, frame.width)
                if (frame.height, frame.width) != size:
                    raise _refused(
                        f"frame {index} has {frame.width}x{frame.height} pixels, "
                        f"earlier ones have {size[1]}x{size[0]}"
                    )
                yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
                index = next(wanted, None)
            num_decoded += 1
    if index is not None:
        raise _refused(f"frame {index} is needed, only {num_decoded} frames can be decoded")


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[tuple[av.container.InputContainer, Any]]:
    """The container and its first video stream. Every error inside is the sender's."""
    reader = container_of(data)
    if reader is None:
        raise _refused(f"it is not a {', '.join(CONTAINERS)} file")
    try:
        with av.open(io.BytesIO(data), "r", format=reader) as container:
            if not container.streams.video:
                raise _refused("it has no video stream")
            stream = container.streams.video[0]
            _check_pixels(stream.width, stream.height, max_pixels)
            # Frames may claim another size than the container, so the decoder is bounded, too; it
            # counts the borders that it works with, which frames themselves must not.
            most = 2 * max_pixels + _BORDER_PIXELS
            stream.codec_context.options = {"max_pixels": str(most)}
            stream.codec_context.thread_count = 1
            yield container, stream
    except (RequestFailed, GeneratorExit):
        raise
    # FFmpeg raises nearly anything on damaged bytes; all of it means the same to the sender.
    except (av.error.FFmpegError, ValueError, OSError, EOFError, IndexError) as error:
        raise _refused(f"it cannot be decoded ({error})") from error


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _refused(
            f"its frames have {width}x{height} = {width * height} pixels, the limit is {max_pixels}"
        )


def _count(container: av.container.InputContainer, stream: Any, limit: float) -> int:
    """Frames that a player would show, counted until the limit is passed."""
    num_frames = 0
    if stream.codec_context.name in _COUNTED_BY_DECODING:
        for _ in container.decode(video=0):
            num_frames += 1
            if num_frames > limit:
                break
        return num_frames
    for packet in container.demux(stream):
        num_frames += packet.size > 0 and not packet.is_discard
        if num_frames > limit:
            break
    return num_frames


def _refused(reason: str) -> RequestFailed:
    return RequestFailed(FailureKind.BAD_REQUEST, f"video refused: {reason}")
