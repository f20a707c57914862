"""Raw bytes to the samples of a sound, safely.

In: bytes that anybody may have sent. Out: one channel of float32 samples at the wanted rate. The
format is told by the first bytes, no other reader is ever tried, and only decoders of sound are
ever opened: pictures that a file brings along (covers) are not looked at. Decoding stops as soon as
the sound is too long. Gateway and encoder both read with this module, so they agree on the number
of samples. Knows nothing of models.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import av.container
import av.error
import numpy as np
import numpy.typing as npt

from shared.errors import FailureKind, RequestFailed

FORMATS = ("WAV", "MP3", "FLAC", "Ogg", "M4A")

# Most of the files may hold nearly any codec; the reader itself would open any to learn more of it.
_CODECS = (
    "aac",
    "alac",
    "flac",
    "mp3",
    "mp3float",
    "opus",
    "pcm_alaw",
    "pcm_f32le",
    "pcm_f64le",
    "pcm_mulaw",
    "pcm_s16le",
    "pcm_s24le",
    "pcm_s32le",
    "pcm_u8",
    "vorbis",
)

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """Bounds on one sound: its file and what it decodes to.

    The rates bound what resampling makes of one decoded frame.
    """

    max_bytes: int = 16 * 1024 * 1024
    max_duration_s: float = 30.0
    min_rate_hz: int = 4_000
    max_rate_hz: int = 192_000
    max_channels: int = 8


def format_of(data: bytes) -> str | None:
    """The reader for a sound by its first bytes; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"fLaC":
        return "flac"
    if data[:4] == b"OggS":
        return "ogg"
    if data[4:8] == b"ftyp":
        return "mov"
    # A tag, or the eleven set bits that each frame begins with.
    if data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] and data[1] & 0xE0 == 0xE0):
        return "mp3"
    return None


def read_audio(data: bytes, rate_hz: int, limits: AudioLimits) -> Samples:
    """All samples of a sound, `[num_samples]` between -1 and 1, channels mixed into one.

    Raises `RequestFailed` (bad request) that says what is wrong with the file.
    """
    if len(data) > limits.max_bytes:
        raise _refused(f"it has {len(data)} bytes, the limit is {limits.max_bytes}")
    max_samples = int(limits.max_duration_s * rate_hz)
    pieces: list[Samples] = []
    num_samples = 0
    with _opened(data) as (container, stream):
        for piece in _resampled(container, stream, rate_hz, limits):
            pieces.append(piece)
            num_samples += len(piece)
            if num_samples > max_samples:
                raise _refused(f"it lasts more than {limits.max_duration_s:g} s, the limit")
    if not num_samples:
        raise _refused("it has no samples")
    samples = np.concatenate(pieces)
    if not np.isfinite(samples).all():
        raise _refused("it has samples that are no finite numbers")
    return samples


def _resampled(
    container: av.container.InputContainer, stream: Any, rate_hz: int, limits: AudioLimits
) -> Iterator[Samples]:
    """The sound piece by piece as it is decoded; a file at the wanted rate keeps its values."""
    resampler = av.AudioResampler(format="fltp", rate=rate_hz)
    shape, num_decoded = None, 0
    for frame in container.decode(stream):
        _check_frame(frame, limits)
        num_decoded += frame.samples
        shape = shape or (frame.sample_rate, frame.layout.name, frame.format.name)
        if (frame.sample_rate, frame.layout.name, frame.format.name) != shape:
            raise _refused("its rate, channels or sample format change in the middle")
        frame.pts = None  # gaps between time stamps are no silence
        for resampled in resampler.resample(frame):
            yield _values(resampled)
    # FLAC says how many samples there are; frames of it that are damaged are left out silently.
    is_declared = stream.codec_context.name == "flac" and stream.duration is not None
    num_declared = int(stream.duration * stream.time_base * stream.rate) if is_declared else None
    if num_declared is not None and num_declared != num_decoded:
        raise _refused(f"only {num_decoded} of its {num_declared} samples can be decoded")
    for resampled in resampler.resample(None) if shape else ():
        if resampled is not None:
            yield _values(resampled)


def _values(frame: av.AudioFrame) -> Samples:
    """The mean of the channels, as the reference's readers mix them; FFmpeg's own mix is louder."""
    values: Samples = frame.to_ndarray().mean(axis=0, dtype=np.float32)
    return values


def _check_frame(frame: av.AudioFrame, limits: AudioLimits) -> None:
    rate_hz, num_channels = frame.sample_rate, frame.layout.nb_channels
    if not limits.min_rate_hz <= rate_hz <= limits.max_rate_hz:
        raise _refused(
            f"it has {rate_hz} samples a second, "
            f"the limits are {limits.min_rate_hz} and {limits.max_rate_hz}"
        )
    if num_channels > limits.max_channels:
        raise _refused(f"it has {num_channels} channels, the limit is {limits.max_channels}")


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[av.container.InputContainer, Any]]:
    """The container and its first audio stream. Every error inside is the sender's."""
    reader = format_of(data)
    if reader is None:
        raise _refused(f"it is not a {', '.join(FORMATS)} file")
    options = {"codec_whitelist": ",".join(_CODECS)}
    try:
        with av.open(io.BytesIO(data), "r", format=reader, options=options) as container:
            if not container.streams.audio:
                raise _refused("it has no audio stream")
            stream = container.streams.audio[0]
            codec = stream.codec_context
            if codec is None or codec.name not in _CODECS:
                raise _refused(f"its codec {codec and codec.name!r} is not read")
            codec.thread_count = 1
            yield container, stream
    except (RequestFailed, GeneratorExit):
        raise
    # FFmpeg raises nearly anything on damaged bytes; all of it means the same to the sender.
    except (av.error.FFmpegError, ValueError, OSError, EOFError, IndexError) as error:
        raise _refused(f"it cannot be decoded ({error})") from error


def _refused(reason: str) -> RequestFailed:
    return RequestFailed(FailureKind.BAD_REQUEST, f"audio refused: {reason}")
