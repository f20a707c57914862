"""What a picture shows, as frozen values: `plate_spec` and `shapes_spec` choose one with a seeded
generator.

Nothing here draws; `draw` does, and the same spec gives the same pixels.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from examples.plates.fonts import em_per_digit_height
from examples.plates.palette import COLOUR_NAMES, INKS, Rgb, jittered

MAX_AREA_PX = 224 * 224
"""Larger pictures are shrunk to this area before the model sees them."""
MIN_DIGIT_HEIGHT_PX = 26.0
"""Smallest digit height after shrinking."""
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
MAX_SHAPES = 6
"""What the hints of the training can count to; pictures hold at most DRAWN_SHAPES."""
DRAWN_SHAPES = 5
DRAWN_COLOURS: tuple[str, ...] = ("red", "yellow", "green", "blue", "purple", "white", "black")
"""The colours that are drawn: orange and grey are too near to others to be told apart safely."""
DRAWN_FONTS: tuple[str | None, ...] = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
    None,
)


@dataclass(frozen=True)
class PlateSpec:
    """One number, on a plate or bare on the background (`plate_colour` None). Lengths in pixels of
    the picture."""

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

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Colours and outlines of its groups, in the order in which a description names them."""
        found = {(item.colour, item.shape) for item in self.items}
        return sorted(found, key=lambda kind: (SHAPES.index(kind[1]), COLOUR_NAMES.index(kind[0])))


Spec = PlateSpec | ShapesSpec


def plate_spec(rng: random.Random, number: int) -> PlateSpec:
    """A random look for `number`; digits at least MIN_DIGIT_HEIGHT_PX high once the picture is
    shrunk."""
    while True:
        spec = _any_plate_spec(rng, number)
        width, height = spec.size_px
        shrink = min(1.0, math.sqrt(MAX_AREA_PX / (width * height)))
        if spec.digit_height_px * shrink >= MIN_DIGIT_HEIGHT_PX and max(width, height) < 900:
            return spec


def _any_plate_spec(rng: random.Random, number: int) -> PlateSpec:
    low, high = (MIN_DIGIT_HEIGHT_PX, 52.0) if rng.random() < 0.9 else (40.0, 220.0)
    digit_height = math.exp(rng.uniform(math.log(low), math.log(high)))
    font = rng.choice(DRAWN_FONTS)
    spacing = rng.choice((0.0, 0.0, 0.05, 0.12, 0.2))
    padding = rng.uniform(0.2, 0.55)
    bare = rng.random() < 0.2
    plate_colour = rng.choice(DRAWN_COLOURS)
    background = (
        plate_colour if bare else rng.choice([c for c in DRAWN_COLOURS if c != plate_colour])
    )
    ink = rng.choice([c for c in INKS[plate_colour] if c in DRAWN_COLOURS])
    text_width = em_per_digit_height(font) * 0.62 * digit_height * len(str(number))
    plate_width = text_width + (spacing * len(str(number)) + 2 * padding) * digit_height
    plate_height = digit_height * (1 + 2 * padding)
    roomy = 1.8 if rng.random() < 0.1 else 1.35
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
        angle_deg=rng.uniform(-4, 4) if rng.random() < 0.3 else 0.0,
        border=rng.random() < 0.4,
        noise=rng.uniform(1, 5) if rng.random() < 0.25 else 0.0,
        noise_seed=rng.randrange(2**31),
    )


def shapes_spec(
    rng: random.Random, max_groups: int = 2, max_shapes: int = DRAWN_SHAPES
) -> ShapesSpec:
    """One to `max_groups` groups of equal shapes of one colour, `max_shapes` shapes in all, in
    cells of a grid."""
    groups = rng.randint(1, max_groups)
    total = rng.randint(groups, max_shapes)
    background = rng.choice(("white", "white", "black", *DRAWN_COLOURS))
    colours = [c for c in DRAWN_COLOURS if c != background]
    kinds = rng.sample([(s, c) for s in SHAPES for c in colours], groups)
    chosen = kinds + [rng.choice(kinds) for _ in range(total - groups)]
    columns, rows = _grid_for(rng, total)
    cell = rng.uniform(42, 62) if total > 1 else rng.uniform(56, 120)
    if rng.random() < 0.1:
        cell *= rng.uniform(1.3, 3)
    width, height = max(56, round(columns * cell)), max(56, round(rows * cell))
    cells = rng.sample([(x, y) for x in range(columns) for y in range(rows)], total)
    background_rgb = jittered(background, rng)
    items = tuple(
        _item(rng, shape, colour, (x * width / columns, y * height / rows), cell)
        for (shape, colour), (x, y) in zip(chosen, cells, strict=True)
    )
    noise = rng.uniform(1, 5) if rng.random() < 0.25 else 0.0
    return ShapesSpec(
        (width, height), background, background_rgb, items, noise, rng.randrange(2**31)
    )


def _grid_for(rng: random.Random, total: int) -> tuple[int, int]:
    grids = [(c, r) for c in range(1, 6) for r in range(1, 5) if total <= c * r <= total + 3]
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
