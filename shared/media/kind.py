"""The kinds of media that a request may carry."""

from __future__ import annotations

from enum import StrEnum


class MediaKind(StrEnum):
    """What a medium is; the value is also what chat templates call its part."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"
