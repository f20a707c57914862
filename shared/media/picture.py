"""Raw bytes to a picture, safely.

In: bytes that anybody may have sent. Out: an RGB picture, upright and fully decoded. The number of
pixels is checked before anything is decoded, and decoding runs to the end so that a truncated file
is noticed here and not in a worker. Knows nothing of models.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from shared.errors import FailureKind, RequestFailed

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """Bounds on one picture: its file and what it decodes to."""

    max_bytes: int = 16 * 1024 * 1024
    max_pixels: int = 64_000_000


def open_picture(data: bytes, limits: PictureLimits) -> Image.Image:
    """Decode a PNG, JPEG, WebP, GIF (its first frame) or BMP.

    Raises `RequestFailed` (bad request) that says what is wrong with it.
    """
    if len(data) > limits.max_bytes:
        raise _refused(f"it has {len(data)} bytes, the limit is {limits.max_bytes}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_pixels(opened.size, limits)
            opened.load()
            return ImageOps.exif_transpose(opened).convert("RGB")
    except RequestFailed:
        raise
    except UnidentifiedImageError as error:
        raise _refused(f"it is not a {', '.join(FORMATS)} file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refused(f"it has too many pixels, the limit is {limits.max_pixels}") from error
    # Decoders raise nearly anything on damaged bytes; all of it means the same to the sender.
    except Exception as error:
        raise _refused(f"it cannot be decoded ({error})") from error


def _check_pixels(size: tuple[int, int], limits: PictureLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise _refused(
            f"it has {width}x{height} = {width * height} pixels, the limit is {limits.max_pixels}"
        )


def _refused(reason: str) -> RequestFailed:
    return RequestFailed(FailureKind.BAD_REQUEST, f"picture refused: {reason}")
