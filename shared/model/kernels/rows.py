"""A linear map of a few rows: weights are read once, in the format they are stored in.

In: an argument block with addresses. Out: rows in bfloat16 or float32. With few rows the time goes
into reading weights, so they stay bfloat16 or int8 in memory and are widened in registers. A row's
result does not depend on the rows beside it.
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
)

# Positions in the argument block. Strides count values, addresses of 0 mean "none".
NEXT, ROWS, COLUMNS, WIDTH, X, X_STRIDE, WEIGHT, SCALE, BIAS, OUT = range(10)
NUM_ARGUMENTS = 10

CHUNK = 32
"""Weight rows that a thread takes at a time, a multiple of 4."""

FAR = 2048
"""Rows of weights at least so long are fetched ahead within the row, shorter ones four rows on."""


@njit
def _finish(a: Any, out: Any, sums: Any, rows: int, columns: int, row: int, column: int) -> None:
    """Scale, bias and rounding of one tile; `out`'s format is the bias's too."""
    scale = pointer_to(a[SCALE], float32)
    bias = pointer_to(a[BIAS], out)
    for i in range(rows):
        for j in range(columns):
            value = load_value(sums, i * columns + j)
            if a[SCALE] != 0:
                value *= load_value(scale, column + j)
            if a[BIAS] != 0:
                value += load_value(bias, column + j)
            store_value(out, (row + i) * a[COLUMNS] + column + j, value)


@njit
def _four_columns(a: Any, x: Any, w: Any, out: Any, sums_array: Any, column: int) -> None:
    """All rows times weight rows `column .. column + 4`."""
    sums = pointer_to(sums_array.ctypes.data, float32)
    width, stride, rows = a[WIDTH], a[X_STRIDE], a[ROWS]
    ahead = 4 * width if width < FAR else FAR // 4
    weights = offset(w, column * width)
    second = offset(w, (column + 2) * width)
    row = 0
    while row + 6 <= rows:
        dot_tile(offset(x, row * stride), stride, 6, weights, width, 2, width, ahead, sums)
        _finish(a, out, sums, 6, 2, row, column)
        dot_tile(offset(x, row * stride), stride, 6, second, width, 2, width, ahead, sums)
        _finish(a, out, sums, 6, 2, row, column + 2)
        row += 6
    while row + 2 <= rows:
        dot_tile(offset(x, row * stride), stride, 2, weights, width, 4, width, ahead, sums)
        _finish(a, out, sums, 2, 4, row, column)
        row += 2
    if row < rows:
        dot_tile(offset(x, row * stride), stride, 1, weights, width, 4, width, ahead, sums)
        _finish(a, out, sums, 1, 4, row, column)


@njit
def _one_column(a: Any, x: Any, w: Any, out: Any, sums_array: Any, column: int) -> None:
    sums = pointer_to(sums_array.ctypes.data, float32)
    width, stride = a[WIDTH], a[X_STRIDE]
    weights = offset(w, column * width)
    for row in range(a[ROWS]):
        dot_tile(offset(x, row * stride), stride, 1, weights, width, 1, width, width, sums)
        _finish(a, out, sums, 1, 1, row, column)


@njit
def _run(a: Any, counter: Any, x: Any, w: Any, out: Any) -> None:
    sums = np.empty(16, np.float32)
    while True:
        column = take_next(counter) * CHUNK
        if column >= a[COLUMNS]:
            return
        stop = min(column + CHUNK, a[COLUMNS])
        while column + 4 <= stop:
            _four_columns(a, x, w, out, sums, column)
            column += 4
        while column < stop:
            _one_column(a, x, w, out, sums, column)
            column += 1


@compiled
def bf16_rows(arguments: Any) -> None:
    """bfloat16 rows, weights, bias and result."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, w, out = (
        pointer_to(a[X], uint16),
        pointer_to(a[WEIGHT], uint16),
        pointer_to(a[OUT], uint16),
    )
    _run(a, arguments, x, w, out)


@compiled
def wide_bf16_rows(arguments: Any) -> None:
    """bfloat16 weights, bias and result; rows that were widened to float32 before."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, w, out = pointer_to(a[X], float32), pointer_to(a[WEIGHT], uint16), pointer_to(a[OUT], uint16)
    _run(a, arguments, x, w, out)


@compiled
def wide_bf16_rows_int8(arguments: Any) -> None:
    """Widened rows, bfloat16 bias and result; int8 weights with a float32 scale per weight row."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, w, out = pointer_to(a[X], float32), pointer_to(a[WEIGHT], int8), pointer_to(a[OUT], uint16)
    _run(a, arguments, x, w, out)


@compiled
def float32_rows_int8(arguments: Any) -> None:
    """float32 rows, bias and result, int8 weights with a float32 scale per weight row."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, w, out = pointer_to(a[X], float32), pointer_to(a[WEIGHT], int8), pointer_to(a[OUT], float32)
    _run(a, arguments, x, w, out)
