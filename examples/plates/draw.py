"""Pictures of number plates and of coloured shapes, drawn from a spec.

A spec is a frozen value that names everything visible; `plate_spec` and `shapes_spec` choose one with a seeded
generator, `draw` turns it into a picture. The same spec gives the same pixels. Nothing here knows questions or models.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.plates.palette import COLOUR_NAMES, INKS, Rgb, jittered

MAX_AREA_PX = 224 * 224
"""Larger pictures are shrunk to this area before the model sees them."""
MIN_DIGIT_HEIGHT_PX = 22.0
"""Smallest digit height after shrinking."""
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
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
MAX_SHAPES = 6


@dataclass(frozen=True)
class PlateSpec:
    """One number, on a plate or bare on the background (`plate_colour` None). Lengths in pixels of the picture."""

    number: int
    size_px: tuple[int, int]
    background: str
    background_rgb: Rgb
    plate_colour: str | None
    plate_rgb: Rgb
    ink: str
    ink_rgb: Rgb
    font: str | None
    digit_height_px: float
    spacing: float
    padding: float
    centre: tuple[float, float]
    angle_deg: float
    border: bool
    noise: float
    noise_seed: int


@dataclass(frozen=True)
class Item:
    """One shape; centre and radius in pixels."""

    shape: str
    colour: str
    rgb: Rgb
    centre: tuple[float, float]
    radius_px: float
    angle_deg: float


@dataclass(frozen=True)
class ShapesSpec:
    """One to six shapes that do not touch, on a plain background."""

    size_px: tuple[int, int]
    background: str
    background_rgb: Rgb
    items: tuple[Item, ...]
    noise: float
    noise_seed: int


Spec = PlateSpec | ShapesSpec


@dataclass(frozen=True)
class Mark:
    """Where a digit ("0" to "9") or shape lies, in fractions of the picture; training uses it, the model never sees it."""

    label: str
    colour: str
    order: int
    centre: tuple[float, float]
    half_size: tuple[float, float]


@lru_cache(maxsize=4096)
def _font(file: str | None, size: int) -> ImageFont.FreeTypeFont:
    if file is None:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / file), size)


@lru_cache(maxsize=64)
def _em_per_digit_height(file: str | None) -> float:
    _, top, _, bottom = _font(file, 200).getbbox("0")
    return 200 / (bottom - top)


def _digit_layout(
    spec: PlateSpec,
) -> tuple[ImageFont.FreeTypeFont, list[float], tuple[float, float]]:
    """The font, the centre of each digit from the text's left edge, and the text's width and height, in pixels."""
    size = max(8, round(spec.digit_height_px * _em_per_digit_height(spec.font)))
    font = _font(spec.font, size)
    widths = [font.getlength(digit) for digit in str(spec.number)]
    gap = spec.spacing * spec.digit_height_px
    centres, x = [], 0.0
    for width in widths:
        centres.append(x + width / 2)
        x += width + gap
    return font, centres, (x - gap, spec.digit_height_px)


def plate_spec(rng: random.Random, number: int) -> PlateSpec:
    """A random look for `number`; digits at least MIN_DIGIT_HEIGHT_PX high once the picture is shrunk."""
    while True:
        spec = _any_plate_spec(rng, number)
        width, height = spec.size_px
        shrink = min(1.0, math.sqrt(MAX_AREA_PX / (width * height)))
        if spec.digit_height_px * shrink >= MIN_DIGIT_HEIGHT_PX and max(width, height) < 900:
            return spec


def _any_plate_spec(rng: random.Random, number: int) -> PlateSpec:
    low, high = (MIN_DIGIT_HEIGHT_PX, 60.0) if rng.random() < 0.7 else (40.0, 220.0)
    digit_height = math.exp(rng.uniform(math.log(low), math.log(high)))
    font = rng.choice(FONT_FILES)
    spacing = rng.choice((0.0, 0.0, 0.05, 0.12, 0.2))
    padding = rng.uniform(0.2, 0.55)
    bare = rng.random() < 0.2
    plate_colour = rng.choice(tuple(INKS))
    background = (
        plate_colour if bare else rng.choice([c for c in COLOUR_NAMES if c != plate_colour])
    )
    ink = rng.choice(INKS[plate_colour])
    text_width = _em_per_digit_height(font) * 0.62 * digit_height * len(str(number))
    plate_width = text_width + (spacing * len(str(number)) + 2 * padding) * digit_height
    plate_height = digit_height * (1 + 2 * padding)
    roomy = 2.4 if rng.random() < 0.15 else 1.5
    width = max(56, round(plate_width * rng.uniform(1.12, roomy)))
    height = max(56, round(plate_height * rng.uniform(1.12, roomy)))
    slack_x, slack_y = max(0.0, width - plate_width * 1.06), max(0.0, height - plate_height * 1.06)
    return PlateSpec(
        number=number,
        size_px=(width, height),
        background=background,
        background_rgb=jittered(background, rng),
        plate_colour=None if bare else plate_colour,
        plate_rgb=jittered(plate_colour, rng),
        ink=ink,
        ink_rgb=jittered(ink, rng),
        font=font,
        digit_height_px=digit_height,
        spacing=spacing,
        padding=padding,
        centre=(
            width / 2 + rng.uniform(-0.5, 0.5) * slack_x,
            height / 2 + rng.uniform(-0.5, 0.5) * slack_y,
        ),
        angle_deg=rng.uniform(-6, 6) if rng.random() < 0.5 else 0.0,
        border=rng.random() < 0.4,
        noise=rng.uniform(2, 9) if rng.random() < 0.4 else 0.0,
        noise_seed=rng.randrange(2**31),
    )


def shapes_spec(rng: random.Random, max_groups: int = 3, max_shapes: int = MAX_SHAPES) -> ShapesSpec:
    """One to `max_groups` groups of equal shapes of one colour, `max_shapes` shapes in all, in cells of a grid."""
    groups = rng.randint(1, max_groups)
    total = rng.randint(groups, max_shapes)
    background = rng.choice(("white", "white", "grey", "black", *COLOUR_NAMES))
    colours = [c for c in COLOUR_NAMES if c != background]
    kinds = rng.sample([(s, c) for s in SHAPES for c in colours], groups)
    chosen = kinds + [rng.choice(kinds) for _ in range(total - groups)]
    columns, rows = _grid_for(rng, total)
    cell = rng.uniform(38, 62) if total > 1 else rng.uniform(56, 150)
    if rng.random() < 0.15:
        cell *= rng.uniform(1.3, 3)
    width, height = max(56, round(columns * cell)), max(56, round(rows * cell))
    cells = rng.sample([(x, y) for x in range(columns) for y in range(rows)], total)
    background_rgb = jittered(background, rng)
    items = tuple(
        _item(rng, shape, colour, (x * width / columns, y * height / rows), cell)
        for (shape, colour), (x, y) in zip(chosen, cells, strict=True)
    )
    noise = rng.uniform(2, 9) if rng.random() < 0.3 else 0.0
    return ShapesSpec(
        (width, height), background, background_rgb, items, noise, rng.randrange(2**31)
    )


def _grid_for(rng: random.Random, total: int) -> tuple[int, int]:
    grids = [(c, r) for c in range(1, 6) for r in range(1, 5) if total <= c * r <= total + 6]
    return rng.choice([g for g in grids if max(g) <= 3 * min(g)] or grids)


def _item(
    rng: random.Random, shape: str, colour: str, corner: tuple[float, float], cell: float
) -> Item:
    radius = cell * rng.uniform(0.28, 0.42)
    reach = cell / 2 - radius * 1.08
    centre = (
        corner[0] + cell / 2 + rng.uniform(-reach, reach),
        corner[1] + cell / 2 + rng.uniform(-reach, reach),
    )
    return Item(shape, colour, jittered(colour, rng), centre, radius, rng.uniform(-14, 14))


def draw(spec: Spec) -> Image.Image:
    """The picture of a spec, RGB, `spec.size_px` large."""
    picture = _draw_plate(spec) if isinstance(spec, PlateSpec) else _draw_shapes(spec)
    return _with_noise(picture, spec.noise, spec.noise_seed) if spec.noise else picture


def marks(spec: Spec) -> list[Mark]:
    """Where each digit or shape of the drawn picture lies."""
    width, height = spec.size_px
    if isinstance(spec, ShapesSpec):
        return [
            Mark(
                item.shape,
                item.colour,
                0,
                (item.centre[0] / width, item.centre[1] / height),
                (item.radius_px * 0.8 / width, item.radius_px * 0.8 / height),
            )
            for item in spec.items
        ]
    _, centres, (text_width, text_height) = _digit_layout(spec)
    cosine, sine = math.cos(math.radians(spec.angle_deg)), math.sin(math.radians(spec.angle_deg))
    half = (0.3 * text_height / width, 0.5 * text_height / height)
    found = []
    for order, (digit, x) in enumerate(zip(str(spec.number), centres, strict=True), start=1):
        across = x - text_width / 2
        centre = (
            (spec.centre[0] + cosine * across) / width,
            (spec.centre[1] - sine * across) / height,
        )
        found.append(Mark(digit, spec.ink, order, centre, half))
    return found


def _draw_plate(spec: PlateSpec) -> Image.Image:
    font, centres, (text_width, text_height) = _digit_layout(spec)
    pad = spec.padding * spec.digit_height_px
    width, height = round(text_width + 2 * pad), round(text_height + 2 * pad)
    base = spec.background_rgb if spec.plate_colour is None else spec.plate_rgb
    layer = Image.new("RGBA", (width, height), (*base, 0))
    pen = ImageDraw.Draw(layer)
    if spec.plate_colour is not None:
        outline = spec.ink_rgb if spec.border else None
        line_px = max(1, round(spec.digit_height_px / 18))
        radius_px = height * 0.12
        pen.rounded_rectangle(
            (0, 0, width - 1, height - 1), radius_px, spec.plate_rgb, outline, line_px
        )
    for digit, x in zip(str(spec.number), centres, strict=True):
        left, top, right, bottom = font.getbbox(digit)
        at = (pad + x - (left + right) / 2, height / 2 - (top + bottom) / 2)
        pen.text(at, digit, font=font, fill=(*spec.ink_rgb, 255))
    if spec.angle_deg:
        layer = layer.rotate(spec.angle_deg, Image.Resampling.BICUBIC, expand=True)
    picture = Image.new("RGB", spec.size_px, spec.background_rgb)
    corner = (
        round(spec.centre[0] - layer.width / 2),
        round(spec.centre[1] - layer.height / 2),
    )
    picture.paste(layer, corner, layer)
    return picture


def _draw_shapes(spec: ShapesSpec) -> Image.Image:
    width, height = spec.size_px
    picture = Image.new("RGB", (width * 2, height * 2), spec.background_rgb)
    pen = ImageDraw.Draw(picture)
    for item in spec.items:
        x, y, radius = 2 * item.centre[0], 2 * item.centre[1], 2 * item.radius_px
        if item.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=item.rgb)
        else:
            pen.polygon(_outline(item.shape, x, y, radius, item.angle_deg), fill=item.rgb)
    return picture.reduce(2)


_CROSS = [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]
_CROSS_POINTS = _CROSS + [(-x, -y) for x, y in _CROSS]


def _outline(
    shape: str, x: float, y: float, radius: float, angle_deg: float
) -> list[tuple[float, float]]:
    """Corner points of a shape that fits into the circle of `radius` around (x, y)."""
    if shape == "cross":
        points = [(math.atan2(b, a), math.hypot(a, b) / math.sqrt(10)) for a, b in _CROSS_POINTS]
    elif shape == "star":
        points = [
            (math.pi * (k / 5 - 0.5), 1.0 if k % 2 == 0 else 0.42) for k in range(10)
        ]
    else:
        corners, turn = (4, 0.25) if shape == "square" else (3, -0.5)
        points = [(math.pi * (2 * k / corners + turn), 1.0) for k in range(corners)]
    tilt = math.radians(angle_deg)
    return [
        (x + radius * far * math.cos(bearing + tilt), y + radius * far * math.sin(bearing + tilt))
        for bearing, far in points
    ]


def _with_noise(picture: Image.Image, sigma: float, seed: int) -> Image.Image:
    pixels = np.asarray(picture, dtype=np.float32)
    rng = np.random.default_rng(seed)
    noisy = pixels + sigma * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
