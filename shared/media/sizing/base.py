"""What every sizing rule gives: a picture's share of the prompt.

A picture stands in the prompt as runs of placeholders with text between and around them, which the
model was trained with (tile coordinates, start and end marks). Rules give both in order, so that
the prompt is tokenised with the text in place, as the reference processors do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shared.errors import FailureKind, RequestFailed
from shared.media.sizing.division import UnitRun

MAX_ASPECT_RATIO = 200

Piece = str | int


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """A picture as the vision tower sees it and as the prompt shows it.

    `grid_thw` counts patches before merging where the tower takes a picture at its own size, and
    tiles where it cuts the picture (0 by 0: only the whole picture). `pieces` are marks (text) and
    placeholder runs (their lengths). `num_tiles` pictures of the tower's own size are encoded.
    `units` are what the tower sees apart; empty where nobody has to know.
    """

    grid_thw: tuple[int, int, int]
    pieces: tuple[Piece, ...]
    num_tiles: int = 1
    units: tuple[UnitRun, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Placeholders, equal to embedding rows."""
        return sum(piece for piece in self.pieces if isinstance(piece, int))


class ImageSizing(Protocol):
    """A family's rule."""

    def measure(self, height: int, width: int) -> ImageLayout:
        """Raises `RequestFailed` (bad request) for a picture that is too narrow for the model."""
        ...


def refuse_extreme(height: int, width: int) -> None:
    """Narrower pictures would be blown up to any size by rules that look at one side."""
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise RequestFailed(
            FailureKind.BAD_REQUEST,
            f"a picture of {width}x{height} pixels has an aspect ratio of {ratio:.0f}, "
            f"the limit is {MAX_ASPECT_RATIO}",
        )
