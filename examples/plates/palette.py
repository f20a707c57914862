"""The colours the demo model knows by name, and the small jitter a drawing may add to them."""

from __future__ import annotations

import random

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (250, 220, 50),
    "green": (40, 150, 70),
    "blue": (40, 90, 205),
    "purple": (130, 60, 170),
    "white": (248, 248, 248),
    "grey": (150, 150, 150),
    "black": (25, 25, 25),
}
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
JITTER = 14
"""Largest change of one channel, in steps of 255; neighbours such as red and orange stay apart."""

INKS: dict[str, tuple[str, ...]] = {
    "white": ("black", "blue", "red", "green", "purple"),
    "yellow": ("black", "blue", "red"),
    "orange": ("black", "white"),
    "blue": ("white", "yellow"),
    "green": ("white", "yellow"),
    "red": ("white", "yellow"),
    "purple": ("white", "yellow"),
    "black": ("white", "yellow", "orange"),
    "grey": ("black", "white"),
}
"""Plate colour -> digit colours that can be read on it."""


def jittered(name: str, rng: random.Random) -> Rgb:
    """An RGB value near the named colour, each channel moved by at most JITTER."""
    red, green, blue = (
        min(255, max(0, channel + rng.randint(-JITTER, JITTER))) for channel in COLOURS[name]
    )
    return red, green, blue
