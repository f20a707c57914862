"""Drawings are a function of their spec, and marks lie where the ink is."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from examples.plates.draw import draw, marks
from examples.plates.specs import (
    DRAWN_FONTS,
    MAX_AREA_PX,
    MIN_DIGIT_HEIGHT_PX,
    plate_spec,
    shapes_spec,
)


@pytest.mark.parametrize("seed", range(6))
def test_same_seed_same_pixels(seed: int) -> None:
    first, second = (plate_spec(random.Random(seed), 1984) for _ in range(2))
    assert first == second
    assert draw(first).tobytes() == draw(second).tobytes()
    left, right = (draw(shapes_spec(random.Random(seed))) for _ in range(2))
    assert left.tobytes() == right.tobytes()


def test_pictures_have_the_size_of_their_spec() -> None:
    rng = random.Random(1)
    for spec in (plate_spec(rng, 7), shapes_spec(rng)):
        assert draw(spec).size == spec.size_px


def test_digits_stay_readable_after_shrinking() -> None:
    rng = random.Random(2)
    for _ in range(100):
        spec = plate_spec(rng, 4321)
        shrink = min(1.0, math.sqrt(MAX_AREA_PX / (spec.size_px[0] * spec.size_px[1])))
        assert spec.digit_height_px * shrink >= MIN_DIGIT_HEIGHT_PX


def test_every_digit_has_a_mark_inside_the_picture_in_reading_order() -> None:
    rng = random.Random(3)
    for _ in range(50):
        found = marks(plate_spec(rng, 9070))
        assert [mark.label for mark in found] == list("9070")
        assert [mark.order for mark in found] == [1, 2, 3, 4]
        places = [mark.centre[0] for mark in found]
        assert places == sorted(places)
        assert all(0 < value < 1 for mark in found for value in mark.centre)


def test_a_shape_covers_its_mark_with_its_colour() -> None:
    rng = random.Random(4)
    for _ in range(30):
        spec = shapes_spec(rng)
        pixels = np.asarray(draw(spec), dtype=int)
        for item in spec.items:
            x, y = (int(value) for value in item.centre)
            assert abs(pixels[y, x] - np.array(item.rgb)).max() < 48


def test_every_font_is_drawn() -> None:
    rng = random.Random(5)
    drawn = {plate_spec(rng, 5).font for _ in range(400)}
    assert drawn == set(DRAWN_FONTS)
