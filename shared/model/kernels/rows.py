"""A linear map of a few rows: weights are read once, in the format they are stored in.

In: an argument block with addresses. Out: rows in bfloat16 or float32. With few rows the time goes
into reading weights, so they stay bfloat16 or int8 in memory and are widened in registers, and are
read in few long streams: hardware fetches those ahead, but not the next short row of several. A
row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, float32, int8, njit, uint16

from shared.model.kernels.machine_code import compiled
from shared.model.kernels.vector import (
    dot_tile,
    load_value,
    offset,
    pointer_to,
    store_value,
    take_next,
    widen,
)

# Positions in the argument block. Strides count values, addresses of 0 mean "none".
NEXT, ROWS, COLUMNS, WIDTH, X, X_STRIDE, WEIGHT, SCALE, BIAS, OUT = range(10)
NUM_ARGUMENTS = 10

CHUNK = 32
"""Weight rows that a thread takes at a time."""

AHEAD = 512
"""How many values ahead of their use weights are fetched."""

FAR = 2048
"""Rows of weights at least so long are streams by themselves, and too long to fetch whole."""


@njit
def finish(
    a: Any, out: Any, sums: Any, rows: int, columns: int, row: int, column: int, apart: int
) -> None:
    """Scale, bias and rounding of one tile; `out`'s format is the bias's too."""
    scale = pointer_to(a[SCALE], float32)
    bias = pointer_to(a[BIAS], out)
    for i in range(rows):
        for j in range(columns):
            value, at = load_value(sums, i * columns + j), column + j * apart
            if a[SCALE] != 0:
                value *= load_value(scale, at)
            if a[BIAS] != 0:
                value += load_value(bias, at)
            store_value(out, (row + i) * a[COLUMNS] + at, value)


@njit
def _four_columns(
    a: Any, x: Any, stride: int, w: Any, out: Any, sums_array: Any, column: int, apart: int
) -> None:
    """All rows times four weight rows: `column`, `column + apart` and so on."""
    sums = pointer_to(sums_array.ctypes.data, float32)
    width, rows, w_stride = a[WIDTH], a[ROWS], apart * a[WIDTH]
    weights = offset(w, column * width)
    second = offset(weights, 2 * w_stride)
    ahead = 4 * width if apart == 1 else AHEAD
    row = 0
    while row + 4 <= rows:
        here = offset(x, row * stride)
        dot_tile(here, stride, 4, weights, w_stride, 2, width, ahead, sums)
        finish(a, out, sums, 4, 2, row, column, apart)
        dot_tile(here, stride, 4, second, w_stride, 2, width, ahead, sums)
        finish(a, out, sums, 4, 2, row, column + 2 * apart, apart)
        row += 4
    while row + 2 <= rows:
        dot_tile(offset(x, row * stride), stride, 2, weights, w_stride, 4, width, ahead, sums)
        finish(a, out, sums, 2, 4, row, column, apart)
        row += 2
    if row < rows:
        dot_tile(offset(x, row * stride), stride, 1, weights, w_stride, 4, width, ahead, sums)
        finish(a, out, sums, 1, 4, row, column, apart)


@njit
def _one_column(
    a: Any, x: Any, stride: int, w: Any, out: Any, sums_array: Any, column: int
) -> None:
    sums = pointer_to(sums_array.ctypes.data, float32)
    width = a[WIDTH]
    weights = offset(w, column * width)
    for row in range(a[ROWS]):
        dot_tile(offset(x, row * stride), stride, 1, weights, width, 1, width, AHEAD, sums)
        finish(a, out, sums, 1, 1, row, column, 1)


@njit
def _run(a: Any, counter: Any, x_array: Any, stride: int, w: Any, out: Any) -> None:
    sums = np.empty(8, np.float32)
    x = pointer_to(x_array.ctypes.data, float32)
    # Four streams through a chunk, each without a gap, are read fastest. Products of many rows hold
    # reading up: then short rows that lie side by side are fetched while the four before are used.
    is_held_up = a[ROWS] >= 4 and a[WIDTH] < FAR
    while True:
        first = take_next(counter) * CHUNK
        if first >= a[COLUMNS]:
            return
        stop = min(first + CHUNK, a[COLUMNS])
        fours = (stop - first) // 4
        apart = 1 if is_held_up else fours
        for four in range(fours):
            column = first + (4 * four if is_held_up else four)
            _four_columns(a, x, stride, w, out, sums, column, apart)
        for column in range(first + 4 * fours, stop):
            _one_column(a, x, stride, w, out, sums, column)


@compiled
def bf16_rows(arguments: Any) -> None:
    """bfloat16 rows, weights, bias and result."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, w, out = pointer_to(a[X], uint16), pointer_to(a[WEIGHT], uint16), pointer_to(a[OUT], uint16)
    rows, width = a[ROWS], a[WIDTH]
    wide = np.empty(rows * width, np.float32)
    for row in range(rows):
        place = pointer_to(wide.ctypes.data, float32)
        widen(offset(x, row * a[X_STRIDE]), width, offset(place, row * width))
    _run(a, arguments, wide, width, w, out)


@compiled
def bf16_rows_int8(arguments: Any) -> None:
    """bfloat16 rows, bias and result; int8 weights with a float32 scale per weight row."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, w, out = pointer_to(a[X], uint16), pointer_to(a[WEIGHT], int8), pointer_to(a[OUT], uint16)
    rows, width = a[ROWS], a[WIDTH]
    wide = np.empty(rows * width, np.float32)
    for row in range(rows):
        source = offset(x, row * a[X_STRIDE])
        for i in range(width):
            wide[row * width + i] = load_value(source, i)
    _run(a, arguments, wide, width, w, out)


@compiled
def float32_rows_int8(arguments: Any) -> None:
    """float32 rows, bias and result, int8 weights with a float32 scale per weight row."""
    a = carray(arguments, NUM_ARGUMENTS)
    w, out = pointer_to(a[WEIGHT], int8), pointer_to(a[OUT], float32)
    x = carray(pointer_to(a[X], float32), a[ROWS] * a[X_STRIDE])
    _run(a, arguments, x, a[X_STRIDE], w, out)
