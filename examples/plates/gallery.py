"""Pictures for the demo and the README: `python -m examples.plates.gallery examples/pictures`."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from examples.plates.draw import draw
from examples.plates.palette import COLOURS
from examples.plates.specs import Item, PlateSpec, ShapesSpec, Spec, shapes_spec


def plate(
    number: int,
    look: tuple[str, str, str],
    size_px: tuple[int, int] = (196, 112),
    digit_height_px: float = 52.0,
    font: str | None = "DejaVuSans-Bold.ttf",
    angle_deg: float = 0.0,
) -> PlateSpec:
    """A plate in the middle of its picture; `look` names background, plate and ink."""
    background, plate_colour, ink = look
    return PlateSpec(
        number=number,
        size_px=size_px,
        background=background,
        background_rgb=COLOURS[background],
        plate_colour=plate_colour,
        plate_rgb=COLOURS[plate_colour],
        ink=ink,
        ink_rgb=COLOURS[ink],
        font=font,
        digit_height_px=digit_height_px,
        spacing=0.12,
        padding=0.35,
        centre=(size_px[0] / 2, size_px[1] / 2),
        angle_deg=angle_deg,
        border=True,
        noise=0.0,
        noise_seed=0,
    )


def row(background: str, *things: tuple[str, str], cell_px: int = 60) -> ShapesSpec:
    """Shapes side by side; each thing is a colour and a shape."""
    items = tuple(
        Item(shape, colour, COLOURS[colour], (cell_px * (k + 0.5), cell_px / 2), 21.0, 0.0)
        for k, (colour, shape) in enumerate(things)
    )
    size_px = (cell_px * len(things), cell_px)
    return ShapesSpec(size_px, background, COLOURS[background], items, 0.0, 0)


PICTURES: dict[str, Spec] = {
    "plate-57": plate(57, ("blue", "white", "black"), (160, 112), 58.0),
    "plate-1984": plate(1984, ("green", "yellow", "black"), (224, 98), 46.0, angle_deg=4.0),
    "plate-8": plate(8, ("white", "green", "white"), (112, 112), 64.0, "DejaVuSerif-Bold.ttf"),
    "plate-306": plate(
        306, ("black", "red", "white"), (640, 360), 150.0, "DejaVuSansMono-Bold.ttf"
    ),
    "star": row("white", ("purple", "star"), cell_px=84),
    "shapes": row("white", ("red", "circle"), ("blue", "square"), ("red", "circle")),
    "crowd": shapes_spec(random.Random(80)),
}


def main(folder: Path) -> None:
    """Writes one PNG for each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, spec in PICTURES.items():
        draw(spec).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
