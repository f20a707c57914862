"""Messages and their content parts, as the OpenAI API and its common extensions have them.

In: JSON values. Out: frozen parts, or errors that name the field. What a URL or base64 text holds
is not looked at here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from services.gateway.openai_base import Schema as _Schema


class ImageUrl(_Schema):
    """A picture by URL; `detail` is accepted and ignored, the model's own limits decide."""

    url: Annotated[str, Field(min_length=1)]
    detail: str | None = None


class TextPart(_Schema):
    type: Literal["text"]
    text: str


class ImagePart(_Schema):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(_Schema):
    """A video by URL (not part of OpenAI's API; named as others name it)."""

    url: Annotated[str, Field(min_length=1)]


class VideoPart(_Schema):
    type: Literal["video_url"]
    video_url: VideoUrl


class AudioUrl(_Schema):
    """A sound by URL (not part of OpenAI's API; named as others name it)."""

    url: Annotated[str, Field(min_length=1)]


class AudioPart(_Schema):
    type: Literal["audio_url"]
    audio_url: AudioUrl


class InputAudio(_Schema):
    """A sound's file in base64. What it is its first bytes tell, whatever `format` says."""

    data: Annotated[str, Field(min_length=1)]
    format: Literal["wav", "mp3", "flac", "ogg", "opus", "m4a"]


class InputAudioPart(_Schema):
    type: Literal["input_audio"]
    input_audio: InputAudio


MediaPart = ImagePart | VideoPart | AudioPart | InputAudioPart

_TYPES = ("text", "image_url", "video_url", "audio_url", "input_audio")


def _part_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in _TYPES else None


# Tags are in angle brackets so that an error's path can leave them out.
Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[VideoPart, Tag("<video_url>")]
    | Annotated[AudioPart, Tag("<audio_url>")]
    | Annotated[InputAudioPart, Tag("<input_audio>")],
    Discriminator(
        _part_tag,
        custom_error_type="content_part",
        custom_error_message="a content part must be of type "
        f"{', '.join(_TYPES[:-1])} or {_TYPES[-1]}",
    ),
]


def _content_tag(value: Any) -> str:
    return "<parts>" if isinstance(value, list | tuple) else "<string>"


Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[tuple[Part, ...], Field(min_length=1), Tag("<parts>")],
    Discriminator(_content_tag),
]


class Message(_Schema):
    """One turn. `name` is accepted and ignored: chat templates do not know it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
