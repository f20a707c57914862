"""Parts of divided pictures and videos: whole, in order, of about the same work."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.media.sizing.anyres import AnyresSizing
from shared.media.sizing.canvas import CanvasSizing
from shared.media.sizing.division import Part, divide, max_parts
from shared.media.sizing.fixed import FixedSizing
from shared.media.sizing.grid import GridSizing
from shared.media.sizing.split import SplitSizing

UNITS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 40), st.integers(1, 50)), min_size=1, max_size=6
)


@given(UNITS, st.integers(1, 20))
def test_parts_hold_every_unit_once_and_each_has_rows(
    units: list[tuple[int, int, int]], num_parts: int
) -> None:
    if num_parts > max_parts(units):
        with pytest.raises(ValueError, match="parts of an item"):
            divide(units, num_parts)
        return
    parts = divide(units, num_parts)
    assert len(parts) == num_parts
    assert (parts[0].first_unit, parts[0].first_row) == (0, 0)
    for part, after in pairwise(parts):
        assert (part.last_unit, part.last_row) == (after.first_unit, after.first_row)
    assert parts[-1].last_unit == sum(count for count, _, _ in units)
    assert parts[-1].last_row == sum(count * rows for count, rows, _ in units)
    assert all(part.num_rows > 0 for part in parts)
    assert sum(part.num_patches for part in parts) == sum(n * patches for n, _, patches in units)


def test_equal_units_are_spread_evenly() -> None:
    assert [p.last_unit - p.first_unit for p in divide([(13, 256, 1024)], 5)] == [3, 2, 3, 2, 3]
    assert [p.num_patches for p in divide([(10, 1, 7)], 5)] == [14] * 5


def test_a_heavy_unit_gets_a_part_of_its_own() -> None:
    assert [p.last_unit for p in divide([(1, 5, 90), (9, 5, 10)], 2)] == [1, 10]


def test_units_without_rows_go_with_others() -> None:
    assert divide([(2, 0, 1), (2, 3, 1), (1, 0, 1)], 2) == (
        Part(0, 3, 0, 3, 3),
        Part(3, 5, 3, 6, 2),
    )


def test_what_rules_say() -> None:
    assert GridSizing(14, 2).measure(280, 420).units == ((1, 150, 600),)
    assert FixedSizing(576).measure(10, 10).units == ()
    canvas = CanvasSizing(448, 256, 1, 12, "<img>", "</img>", 1024)
    assert canvas.measure(900, 1400).units == ((7, 256, 1024),)
    assert SplitSizing(512, 64, 1024, splits=True).measure(512, 1024).units == ((3, 64, 1),)


SQUARES = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
SIZES = st.integers(100, 3000)


@given(SIZES, SIZES, st.sampled_from([None, 4, 9]), st.integers(1, 7))
def test_tiles_of_an_anyres_part_hold_what_its_rows_are_made_of(
    height: int, width: int, max_tiles: int | None, num_parts: int
) -> None:
    sizing = AnyresSizing(384, 27, SQUARES, max_tiles=max_tiles)
    layout = sizing.measure(height, width)
    assert sum(count * rows for count, rows, _ in layout.units) == layout.num_tokens
    if num_parts > max_parts(layout.units):
        return
    _, tile_rows, tile_columns = layout.grid_thw
    for part in divide(layout.units, num_parts):
        first, last = sizing.tiles_of(part, height, width)
        assert 0 <= first < last <= layout.num_tiles
        assert (first == 0) == (part.first_unit == 0)
        # A row of tiles more than its own at either end, never the whole picture again.
        rows_needed = -(-(last - max(first, 1)) // tile_columns)
        assert rows_needed <= min(tile_rows, part.last_unit - max(part.first_unit, 1) + 1)
