"""A file of a picture, a clip or a sound as a part of a chat request.

In: a path. Out: `{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}`. The
kind is told from the first bytes, not from the file's name, so a mistake is found here and not on
the server.
"""

from __future__ import annotations

import base64
from pathlib import Path

from services.ask.errors import BadMedium

NUM_HEAD_BYTES = 12
NAME_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"),
    *(".mp4", ".mov", ".webm", ".mkv", ".avi"),
    *(".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a"),
)
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
    (b"\x1a\x45\xdf\xa3", "video/webm"),
    (b"fLaC", "audio/flac"),
    (b"OggS", "audio/ogg"),
    (b"ID3", "audio/mpeg"),
)
_RIFF = {b"WEBP": "image/webp", b"AVI ": "video/x-msvideo", b"WAVE": "audio/wav"}


def is_file_name(word: str) -> bool:
    """Whether nobody would ask this as a question: one word that ends like the name of a picture,
    a clip or a sound."""
    return len(word.split()) == 1 and word.lower().endswith(NAME_ENDINGS)


def media_type(head: bytes) -> str | None:
    """The media type of a file that begins with `head`, or None."""
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return "audio/mp4" if head[8:11] == b"M4A" else "video/mp4"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    # An MP3 without a tag begins with its first frame: eleven set bits.
    return "audio/mpeg" if head[:1] == b"\xff" and head[1:2] >= b"\xe0" else None


def part(path: Path) -> dict[str, object]:
    """Raises `BadMedium` where the file cannot be read or is nothing that a model sees or hears."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadMedium(f"{path}: there is no such file") from None
    except OSError as error:
        raise BadMedium(f"{path}: {error.strerror or error}") from None
    kind = media_type(content[:NUM_HEAD_BYTES])
    if kind is None:
        raise BadMedium(
            f"{path}: not a picture (PNG, JPEG, WebP, GIF, BMP), a clip (MP4, MOV, WebM, Matroska, "
            "AVI) or a sound (WAV, MP3, FLAC, Ogg, M4A)"
        )
    name = f"{kind.partition('/')[0]}_url"
    url = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return {"type": name, name: {"url": url}}
