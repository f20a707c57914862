"""The fonts that digits are drawn in."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

FONT_FILES: tuple[str | None, ...] = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    None,
)
"""Font files of matplotlib; None is Pillow's built-in font."""


@lru_cache(maxsize=4096)
def font(file: str | None, size: int) -> ImageFont.FreeTypeFont:
    """The font of a name in FONT_FILES at `size` pixels an em."""
    if file is None:
        built_in = ImageFont.load_default(size)
        assert isinstance(built_in, ImageFont.FreeTypeFont)
        return built_in
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / file), size)


@lru_cache(maxsize=64)
def em_per_digit_height(file: str | None) -> float:
    """Pixels an em for each pixel of digit height: what to multiply a digit height with."""
    _, top, _, bottom = font(file, 200).getbbox("0")
    return 200 / (bottom - top)
