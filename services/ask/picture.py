"""A picture file as a data URL.

In: a path. Out: `data:image/png;base64,...`. The kind is told from the first bytes, not from the
file's name, so a mistake is found here and not on the server.
"""

from __future__ import annotations

import base64
from pathlib import Path

from services.ask.errors import BadPicture

NUM_HEAD_BYTES = 12


NAME_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def is_picture_name(word: str) -> bool:
    """Whether nobody would ask this as a question: one word that ends like a picture's name."""
    return len(word.split()) == 1 and word.lower().endswith(NAME_ENDINGS)


def media_type(head: bytes) -> str | None:
    """The media type of a picture that begins with `head`, or None."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head.startswith(b"BM"):
        return "image/bmp"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    return None


def data_url(path: Path) -> str:
    """Raises `BadPicture` where the file cannot be read or is no picture."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadPicture(f"{path}: there is no such file") from None
    except OSError as error:
        raise BadPicture(f"{path}: {error.strerror or error}") from None
    kind = media_type(content[:NUM_HEAD_BYTES])
    if kind is None:
        raise BadPicture(f"{path}: not a PNG, JPEG, WebP, GIF or BMP picture")
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
