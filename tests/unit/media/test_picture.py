"""Only whole pictures of known formats and bounded size come through."""

import io
import struct
import zlib

import pytest
from PIL import Image

from shared.errors import RequestFailed
from shared.media.picture import PictureLimits, open_picture

LIMITS = PictureLimits(max_bytes=1_000_000, max_pixels=10_000)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((60, 40), 80).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_known_formats_become_rgb(kind, mode):
    picture = open_picture(encoded(noise(mode), kind), LIMITS)
    assert (picture.mode, picture.size) == ("RGB", (60, 40))


def test_transparency_and_palettes_become_rgb():
    for mode in ("RGBA", "P", "LA", "1"):
        assert open_picture(encoded(noise(mode), "PNG"), LIMITS).mode == "RGB"


def test_the_first_frame_of_an_animation():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert open_picture(data, LIMITS).getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert open_picture(encoded(noise(), "JPEG", exif=exif), LIMITS).size == (40, 60)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(kind, share):
    data = encoded(noise(), kind)
    with pytest.raises(RequestFailed, match="picture refused"):
        open_picture(data[: int(len(data) * share)], LIMITS)


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(RequestFailed, match="not a PNG"):
        open_picture(data, LIMITS)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "PDF"])
def test_other_formats_are_refused(kind):
    with pytest.raises(RequestFailed, match="not a PNG"):
        open_picture(encoded(noise(), kind), LIMITS)


def test_limits_are_named():
    with pytest.raises(RequestFailed, match=r"101x100 = 10100 pixels, the limit is 10000"):
        open_picture(encoded(Image.new("RGB", (101, 100)), "PNG"), LIMITS)
    with pytest.raises(RequestFailed, match="the limit is 10$"):
        open_picture(encoded(noise(), "PNG"), PictureLimits(max_bytes=10))


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises very many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 5_000), (65_000, 65_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_before_decoding(size):
    with pytest.raises(RequestFailed, match="pixels, the limit is 10000"):
        open_picture(bomb(*size), LIMITS)
