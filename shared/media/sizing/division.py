"""Where a picture or video can be divided, so that several encoders work on one. Pure.

In: an item's units, the smallest pieces that its tower sees apart, in the order of their rows. Out:
parts, each of which is encoded by itself; their rows one after the other are the item's. The same
units and the same number of parts always give the same parts: a part is found by its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

UnitRun = tuple[int, int, int]
"""So many units in a row, and the embedding rows and the patches of each of them."""


@dataclass(frozen=True, slots=True)
class Part:
    """Units `first_unit .. last_unit` of an item and their rows; ends excluded."""

    first_unit: int
    last_unit: int
    first_row: int
    last_row: int
    num_patches: int

    @property
    def num_rows(self) -> int:
        """Rows of the embedding that it gives."""
        return self.last_row - self.first_row


def max_parts(units: Sequence[UnitRun]) -> int:
    """So many parts at most: each has a row. 0 for an item whose units are not known."""
    return sum(count for count, rows, _ in units if rows)


def divide(units: Sequence[UnitRun], num_parts: int) -> tuple[Part, ...]:
    """Parts of about as many patches each. Raises `ValueError` for more than `max_parts`."""
    most = max_parts(units)
    if not 1 <= num_parts <= most:
        raise ValueError(f"{num_parts} parts of an item that has 1 to {most}")
    each = [(rows, patches) for count, rows, patches in units for _ in range(count)]
    rows_before = [0, *accumulate(rows for rows, _ in each)]
    patches_before = [0, *accumulate(patches for _, patches in each)]
    bounds = _bounds([rows for rows, _ in each], patches_before, num_parts)
    return tuple(
        Part(
            first,
            last,
            rows_before[first],
            rows_before[last],
            patches_before[last] - patches_before[first],
        )
        for first, last in pairwise(bounds)
    )


def _bounds(rows: Sequence[int], patches_before: Sequence[int], num_parts: int) -> list[int]:
    """Unit numbers at which parts begin, and the end. A part begins with a unit that has rows,
    except for the first, which takes what is in front of it; so every part has rows."""
    total = patches_before[-1]
    starts = [unit for unit, num_rows in enumerate(rows) if num_rows][1:]
    bounds, used = [0], 0
    for number in range(1, num_parts):
        # Each part that is still to come needs a start of its own.
        choice = range(used, len(starts) - (num_parts - 1 - number))
        best = min(
            choice, key=lambda i: abs(patches_before[starts[i]] * num_parts - total * number)
        )
        bounds.append(starts[best])
        used = best + 1
    return [*bounds, len(rows)]
