"""A request's media: from URLs and base64 to bytes that were checked and measured.

In: data URLs, base64, and http(s) URLs where an operator allows their hosts. Out: `LoadedMedium`s
in the order given. Decoding runs in a bounded pool of threads. What media seen lately measure is
remembered by content, so a conversation that repeats its media does not decode them again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from services.gateway.admission import Slot
from services.gateway.problems import refuse
from shared.errors import FailureKind, RequestFailed
from shared.media.audio import AudioLimits, read_audio
from shared.media.content_key import content_key
from shared.media.data_url import decode_base64, decode_data_url, is_data_url
from shared.media.fetch import MediaFetcher
from shared.media.kind import MediaKind
from shared.media.picture import PictureLimits, open_picture
from shared.media.video import VideoLimits, probe_video
from shared.modelspec import ModelSpec
from shared.text.prompt import Medium

MAX_REMEMBERED = 4096

NOUNS: Mapping[MediaKind, str] = {
    MediaKind.IMAGE: "picture",
    MediaKind.VIDEO: "video",
    MediaKind.AUDIO: "audio",
}
"""What a client is told of each kind, in messages and codes."""


@dataclass(frozen=True, slots=True)
class MediaSource:
    """Where a medium comes from, and which field of the request said so.

    `text` is a URL, or base64 where `is_base64`.
    """

    kind: MediaKind
    text: str
    field: str
    is_base64: bool = False


@dataclass(frozen=True, slots=True)
class LoadedMedium:
    """A medium's file and what the prompt needs to know of it."""

    data: bytes
    medium: Medium


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Bounds on files of each kind; how long a sound may last is the model's."""

    picture: PictureLimits
    video: VideoLimits
    max_audio_bytes: int

    def max_bytes(self, kind: MediaKind) -> int:
        """Of one file."""
        match kind:
            case MediaKind.IMAGE:
                return self.picture.max_bytes
            case MediaKind.VIDEO:
                return self.video.max_bytes
            case MediaKind.AUDIO:
                return self.max_audio_bytes


class MediaLoader:
    """Loads the media of one model's requests."""

    def __init__(
        self, spec: ModelSpec, limits: MediaLimits, fetcher: MediaFetcher, pool: Executor
    ) -> None:
        self._spec = spec
        self._limits = limits
        self._fetcher = fetcher
        self._pool = pool
        self._known: OrderedDict[str, Medium] = OrderedDict()
        self._measures: Mapping[MediaKind, Callable[[bytes, str], Medium]] = {
            MediaKind.IMAGE: self._measure_picture,
            MediaKind.VIDEO: self._measure_clip,
            MediaKind.AUDIO: self._measure_sound,
        }

    async def load(self, sources: Sequence[MediaSource], slot: Slot) -> list[LoadedMedium]:
        """Raises `Refused` (400) that names the field of the first medium that is wrong."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._load(source, slot)) for source in sources]
        return [task.result() for task in tasks]

    async def _load(self, source: MediaSource, slot: Slot) -> LoadedMedium:
        loop = asyncio.get_running_loop()
        try:
            if source.is_base64 or is_data_url(source.text):
                return await loop.run_in_executor(self._pool, self._open_text, source)
            data = await self._fetcher.fetch(source.text)
            slot.hold(len(data))
            return await loop.run_in_executor(self._pool, self._open, data, source.kind)
        except RequestFailed as failure:
            if failure.kind is not FailureKind.BAD_REQUEST:
                raise
            code = f"bad_{NOUNS[source.kind]}"
            raise refuse(failure.message, param=source.field, code=code) from failure

    def _open_text(self, source: MediaSource) -> LoadedMedium:
        decode = decode_base64 if source.is_base64 else decode_data_url
        data = decode(source.text, self._limits.max_bytes(source.kind))
        return self._open(data, source.kind)

    def _open(self, data: bytes, kind: MediaKind) -> LoadedMedium:
        sha256 = hashlib.sha256(data).hexdigest()
        medium = self._known.get(sha256)
        if medium is None or medium.kind != kind:
            medium = self._measures[kind](data, sha256)
        # Plain dict operations, so two threads at once do no harm.
        self._known[sha256] = medium
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return LoadedMedium(data, medium)

    def _measure_picture(self, data: bytes, sha256: str) -> Medium:
        assert self._spec.vision is not None, "a model without a tower was given a picture"
        width, height = open_picture(data, self._limits.picture).size
        layout = self._spec.vision.sizing.measure(height, width)
        return Medium.of(sha256, self._key(sha256), layout)

    def _measure_clip(self, data: bytes, sha256: str) -> Medium:
        clips = self._spec.vision.clips if self._spec.vision else None
        assert clips is not None, "a model without a tower was given a video"
        layout = clips.measure(probe_video(data, self._limits.video))
        return Medium.of_clip(sha256, self._key(sha256, clips.policy), layout)

    def _measure_sound(self, data: bytes, sha256: str) -> Medium:
        assert self._spec.audio is not None, "a model without a tower was given a sound"
        sizing = self._spec.audio.sizing
        limits = AudioLimits(self._limits.max_audio_bytes, sizing.max_duration_s)
        layout = sizing.measure(len(read_audio(data, sizing.rate_hz, limits)))
        return Medium.of_sound(sha256, self._key(sha256, sizing.policy), layout)

    def _key(self, sha256: str, rule: str = "") -> str:
        """The embedding's name; `rule` is what besides the folder's files decides about it."""
        policy = f"{self._spec.preprocessor_hash} {rule}" if rule else self._spec.preprocessor_hash
        return content_key(sha256, self._spec.fingerprint, policy)
