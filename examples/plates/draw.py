"""Pictures of number plates and of coloured shapes, drawn from a spec; the same spec gives the same
pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.plates.fonts import em_per_digit_height, font
from examples.plates.specs import PlateSpec, ShapesSpec, Spec


@dataclass(frozen=True)
class Mark:
    """Where a digit ("0" to "9") or shape lies, in fractions of the picture; training uses it, the
    model never sees it. `order` is a digit's place in the number, or that of a shape's group in the
    description, from 1."""

    label: str
    colour: str
    order: int
    centre: tuple[float, float]
    half_size: tuple[float, float]


def _digit_layout(
    spec: PlateSpec,
) -> tuple[ImageFont.FreeTypeFont, list[float], tuple[float, float]]:
    """The font, the centre of each digit from the text's left edge, and the text's width and
    height, in pixels."""
    size = max(8, round(spec.digit_height_px * em_per_digit_height(spec.font)))
    face = font(spec.font, size)
    widths = [face.getlength(digit) for digit in str(spec.number)]
    gap = spec.spacing * spec.digit_height_px
    centres, x = [], 0.0
    for width in widths:
        centres.append(x + width / 2)
        x += width + gap
    return face, centres, (x - gap, spec.digit_height_px)


def draw(spec: Spec) -> Image.Image:
    """The picture of a spec, RGB, `spec.size_px` large."""
    picture = _draw_plate(spec) if isinstance(spec, PlateSpec) else _draw_shapes(spec)
    return _with_noise(picture, spec.noise, spec.noise_seed) if spec.noise else picture


def marks(spec: Spec) -> list[Mark]:
    """Where each digit or shape of the drawn picture lies."""
    width, height = spec.size_px
    if isinstance(spec, ShapesSpec):
        kinds = spec.kinds
        return [
            Mark(
                item.shape,
                item.colour,
                1 + kinds.index((item.colour, item.shape)),
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
    face, centres, (text_width, text_height) = _digit_layout(spec)
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
        left, top, right, bottom = face.getbbox(digit)
        at = (pad + x - (left + right) / 2, height / 2 - (top + bottom) / 2)
        pen.text(at, digit, font=face, fill=(*spec.ink_rgb, 255))
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
        points = [(math.pi * (k / 5 - 0.5), 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
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
