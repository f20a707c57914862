"""A request's pictures and videos: from URLs to bytes that were checked and measured.

In: data URLs, and http(s) URLs where an operator allows their hosts. Out: `LoadedPicture`s in the
order given. Decoding runs in a bounded pool of threads. The sizes of pictures seen lately are
remembered by content, so a conversation that repeats its pictures does not decode them again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from services.gateway.admission import Slot
from services.gateway.problems import refuse
from shared.errors import FailureKind, RequestFailed
from shared.media.content_key import content_key
from shared.media.data_url import decode_data_url, is_data_url
from shared.media.fetch import MediaFetcher
from shared.media.picture import PictureLimits, open_picture
from shared.media.sizing.base import ImageSizing
from shared.media.video import VideoLimits, probe_video
from shared.modelspec import ModelSpec
from shared.text.prompt import Picture

MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class PictureSource:
    """Where a picture comes from, and which field of the request said so."""

    url: str
    field: str
    is_video: bool = False


@dataclass(frozen=True, slots=True)
class LoadedPicture:
    """A picture's file and what the prompt needs to know of it."""

    data: bytes
    picture: Picture


class PictureLoader:
    """Loads the pictures of one model's requests."""

    def __init__(
        self,
        spec: ModelSpec,
        sizer: ImageSizing,
        limits: PictureLimits,
        fetcher: MediaFetcher,
        pool: Executor,
        *,
        video_limits: VideoLimits | None = None,
    ) -> None:
        self._spec = spec
        self._sizer = sizer
        self._limits = limits
        self._video_limits = video_limits or VideoLimits()
        self._fetcher = fetcher
        self._pool = pool
        self._known: OrderedDict[str, Picture] = OrderedDict()

    async def load(self, sources: Sequence[PictureSource], slot: Slot) -> list[LoadedPicture]:
        """Raises `Refused` (400) that names the field of the first picture that is wrong."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._load(source, slot)) for source in sources]
        return [task.result() for task in tasks]

    async def _load(self, source: PictureSource, slot: Slot) -> LoadedPicture:
        loop = asyncio.get_running_loop()
        try:
            if is_data_url(source.url):
                return await loop.run_in_executor(self._pool, self._open_data_url, source)
            data = await self._fetcher.fetch(source.url)
            slot.hold(len(data))
            return await loop.run_in_executor(self._pool, self._open, data, source.is_video)
        except RequestFailed as failure:
            if failure.kind is not FailureKind.BAD_REQUEST:
                raise
            code = "bad_video" if source.is_video else "bad_picture"
            raise refuse(failure.message, param=source.field, code=code) from failure

    def _open_data_url(self, source: PictureSource) -> LoadedPicture:
        limits = self._video_limits if source.is_video else self._limits
        data = decode_data_url(source.url, limits.max_bytes)
        return self._open(data, source.is_video)

    def _open(self, data: bytes, is_video: bool) -> LoadedPicture:
        sha256 = hashlib.sha256(data).hexdigest()
        picture = self._known.get(sha256)
        if picture is None or picture.is_video != is_video:
            picture = (self._measure_clip if is_video else self._measure)(data, sha256)
        # Plain dict operations, so two threads at once do no harm.
        self._known[sha256] = picture
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return LoadedPicture(data, picture)

    def _measure(self, data: bytes, sha256: str) -> Picture:
        width, height = open_picture(data, self._limits).size
        layout = self._sizer.measure(height, width)
        key = content_key(sha256, self._spec.fingerprint, self._spec.preprocessor_hash)
        return Picture.of(sha256, key, layout)

    def _measure_clip(self, data: bytes, sha256: str) -> Picture:
        clips = self._spec.vision.clips if self._spec.vision else None
        if clips is None:
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"model_type={self._spec.model_type!r} reads no videos here",
            )
        layout = clips.measure(probe_video(data, self._video_limits))
        policy = f"{self._spec.preprocessor_hash} {clips.policy}"
        return Picture.of_clip(sha256, content_key(sha256, self._spec.fingerprint, policy), layout)
