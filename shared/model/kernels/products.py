"""A linear map of many rows: weights stay narrow in memory and are widened a few at a time.

In: an argument block with addresses. Out: rows in bfloat16 or float32. First `arrange` lays the
activations out in panels of `BLOCK_ROWS` rows, float32; then every thread takes some blocks of
weight rows at a time, arranges them piece by piece in memory that stays in its cache, and
multiplies all panels with them. A row's result depends neither on the rows beside it nor on their
number.

Source: Goto and van de Geijn 2008 (Anatomy of high-performance matrix multiplication, section 4).
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, int8, njit, uint16

from shared.model.kernels.blocks import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    finish_lanes,
    multiply_block,
    transpose,
)
from shared.model.kernels.lanes import LANES
from shared.model.kernels.machine_code import compiled
from shared.model.kernels.vector import (
    load_value,
    offset,
    pointer_to,
    request,
    store_value,
    take_next,
)

# Positions in the argument block. Strides count values, addresses of 0 mean "none".
(
    NEXT,
    MEMBERS,
    ROWS,
    COLUMNS,
    WIDTH,
    X,
    X_STRIDE,
    WEIGHT,
    SCALE,
    BIAS,
    OUT,
    PANELS,
    SCRATCH,
    SCRATCH_STRIDE,
    BLOCKS,
) = range(15)
NUM_ARGUMENTS = 15

DEPTH = 448
"""Steps of the reduced dimension in one piece: a block of weights stays in a first cache."""

LINE = 32
"""bfloat16 values in a cache line."""

NEAR_PANELS = 8
"""Panels that stay in a second cache while they meet one block after the other."""

BLOCK_VALUES = BLOCK_ROWS * BLOCK_COLUMNS
PANEL_VALUES = DEPTH * BLOCK_ROWS + LANES
"""Room for one piece of a panel: the last transposed vector reaches past its end."""


def panel_values(width: int) -> int:
    """Room for one panel."""
    return -(-width // DEPTH) * PANEL_VALUES


def scratch_values(num_blocks: int, num_panels: int) -> int:
    """Room that each thread needs for arranged weights and for sums."""
    return num_blocks * (DEPTH * BLOCK_COLUMNS + num_panels * BLOCK_VALUES)


@njit
def _arrange_rows(a: Any, counter: Any, x: Any) -> None:
    rows, num_panels = a[ROWS], (a[ROWS] + BLOCK_ROWS - 1) // BLOCK_ROWS
    panels = pointer_to(a[PANELS], float32)
    while True:
        panel = take_next(counter)
        if panel >= num_panels:
            return
        first = panel * BLOCK_ROWS
        last = min(rows - first, BLOCK_ROWS) - 1
        source = offset(x, first * a[X_STRIDE])
        for k in range(0, a[WIDTH], LANES):
            piece = offset(panels, (k // DEPTH * num_panels + panel) * PANEL_VALUES)
            place = offset(piece, k % DEPTH * BLOCK_ROWS)
            transpose(offset(source, k), a[X_STRIDE], last, place, BLOCK_ROWS)


@njit
def _arrange_weights(a: Any, w: Any, column: int, start: int, depth: int, blocks: Any) -> None:
    """Weight rows from `column` on, values `start .. start + depth` of each."""
    width, last = a[WIDTH], a[COLUMNS] - 1
    for block in range(a[BLOCKS]):
        first = column + block * BLOCK_COLUMNS
        if first > last:
            return
        second = min(first + LANES, last)
        source, other = offset(w, first * width + start), offset(w, second * width + start)
        # What is arranged next lies elsewhere, where hardware does not look ahead.
        later = offset(source, BLOCK_COLUMNS * width)
        if block + 1 == a[BLOCKS]:
            later = offset(w, column * width + start + DEPTH)
        target = offset(blocks, block * DEPTH * BLOCK_COLUMNS)
        for k in range(0, depth, LANES):
            if k % LINE == 0:
                for row in range(BLOCK_COLUMNS):
                    request(offset(later, row * width + k))
            place = offset(target, k * BLOCK_COLUMNS)
            transpose(offset(source, k), width, last - first, place, BLOCK_COLUMNS)
            place = offset(place, LANES)
            transpose(offset(other, k), width, last - second, place, BLOCK_COLUMNS)


@njit
def _finish(a: Any, column: int, block: Any, first: int, out: Any) -> None:
    """One block of sums, whose rows and columns start at `first` and `column`, into the result."""
    scale, bias = pointer_to(a[SCALE], float32), pointer_to(a[BIAS], out)
    for i in range(min(BLOCK_ROWS, a[ROWS] - first)):
        row = (first + i) * a[COLUMNS]
        for part in range(0, BLOCK_COLUMNS, LANES):
            sums, at = offset(block, i * BLOCK_COLUMNS + part), column + part
            if at + LANES <= a[COLUMNS]:
                place = offset(out, row + at)
                finish_lanes(sums, offset(scale, at), offset(bias, at), place, a[SCALE], a[BIAS])
                continue
            for j in range(a[COLUMNS] - at):
                value = load_value(sums, j)
                if a[SCALE] != 0:
                    value *= load_value(scale, at + j)
                if a[BIAS] != 0:
                    value += load_value(bias, at + j)
                store_value(out, row + at + j, value)


@njit
def _multiply(a: Any, counter: Any, w: Any, out: Any) -> None:
    width = a[WIDTH]
    num_panels = (a[ROWS] + BLOCK_ROWS - 1) // BLOCK_ROWS
    member = take_next(offset(counter, MEMBERS))
    own = offset(pointer_to(a[SCRATCH], float32), member * a[SCRATCH_STRIDE])
    blocks, sums = own, offset(own, a[BLOCKS] * DEPTH * BLOCK_COLUMNS)
    panels = pointer_to(a[PANELS], float32)
    while True:
        column = take_next(counter) * a[BLOCKS] * BLOCK_COLUMNS
        if column >= a[COLUMNS]:
            return
        num_left = (a[COLUMNS] - column + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
        num_blocks = min(a[BLOCKS], num_left)
        for start in range(0, width, DEPTH):
            depth = min(DEPTH, width - start)
            _arrange_weights(a, w, column, start, depth, blocks)
            piece = offset(panels, start // DEPTH * num_panels * PANEL_VALUES)
            for near in range(0, num_panels, NEAR_PANELS):
                for block in range(num_blocks):
                    here = offset(blocks, block * DEPTH * BLOCK_COLUMNS)
                    for panel in range(near, min(near + NEAR_PANELS, num_panels)):
                        rows = offset(piece, panel * PANEL_VALUES)
                        total = offset(sums, (block * num_panels + panel) * BLOCK_VALUES)
                        multiply_block(rows, here, depth, total, start)
        for block in range(num_blocks):
            for panel in range(num_panels):
                total = offset(sums, (block * num_panels + panel) * BLOCK_VALUES)
                _finish(a, column + block * BLOCK_COLUMNS, total, panel * BLOCK_ROWS, out)


@compiled
def arrange_bf16(arguments: Any) -> None:
    """bfloat16 rows into panels."""
    a = carray(arguments, NUM_ARGUMENTS)
    _arrange_rows(a, arguments, pointer_to(a[X], uint16))


@compiled
def arrange_float32(arguments: Any) -> None:
    """float32 rows into panels."""
    a = carray(arguments, NUM_ARGUMENTS)
    _arrange_rows(a, arguments, pointer_to(a[X], float32))


@compiled
def multiply_bf16(arguments: Any) -> None:
    """Panels times bfloat16 weights; bias and result bfloat16."""
    a = carray(arguments, NUM_ARGUMENTS)
    _multiply(a, arguments, pointer_to(a[WEIGHT], uint16), pointer_to(a[OUT], uint16))


@compiled
def multiply_int8_to_bf16(arguments: Any) -> None:
    """Panels times int8 weights with a float32 scale per weight row; bias and result bfloat16."""
    a = carray(arguments, NUM_ARGUMENTS)
    _multiply(a, arguments, pointer_to(a[WEIGHT], int8), pointer_to(a[OUT], uint16))


@compiled
def multiply_int8_to_float32(arguments: Any) -> None:
    """Panels times int8 weights with a float32 scale per weight row; bias and result float32."""
    a = carray(arguments, NUM_ARGUMENTS)
    _multiply(a, arguments, pointer_to(a[WEIGHT], int8), pointer_to(a[OUT], float32))
