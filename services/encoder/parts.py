"""What a part of a divided picture or video needs of it.

In: the part as the gateway named it. Out: the same part by this process' own measure of the file,
and the tiles that it is made of. Where the two measures differ, the request fails: rows of another
part would look right and be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shared.errors import FailureKind, RequestFailed
from shared.media.sizing.anyres import AnyresSizing
from shared.media.sizing.base import ImageSizing
from shared.media.sizing.division import Part, UnitRun, divide, max_parts
from shared.messages.descriptor import MediaPart
from shared.model.towers.pixels import Pixels


def part_of(wanted: MediaPart, units: Sequence[UnitRun]) -> Part:
    """Raises `RequestFailed` (internal) if the gateway counted other rows."""
    if wanted.count > max_parts(units):
        raise RequestFailed(
            FailureKind.INTERNAL,
            f"part {wanted.index} of {wanted.count} is wanted of an item that has at most "
            f"{max_parts(units)} parts",
        )
    part = divide(units, wanted.count)[wanted.index]
    if (part.first_row, part.num_rows) != (wanted.first_row, wanted.num_tokens):
        raise RequestFailed(
            FailureKind.INTERNAL,
            f"part {wanted.index} of {wanted.count} has {part.num_rows} rows from "
            f"{part.first_row} on, the gateway computed {wanted.num_tokens} from "
            f"{wanted.first_row} on",
        )
    return part


def cut_tiles(pixels: Pixels, wanted: MediaPart, sizing: ImageSizing) -> Pixels:
    """The tiles of one part. The whole picture had to be resized for them."""
    part = part_of(wanted, sizing.measure(*pixels.size).units)
    first, last = part.first_unit, part.last_unit
    if isinstance(sizing, AnyresSizing):
        first, last = sizing.tiles_of(part, *pixels.size)
    return replace(pixels, values=pixels.values[first:last], part=part, first_tile=first)
