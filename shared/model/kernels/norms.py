"""Root-mean-square norms in one call.

In: an argument block with addresses. Out: rows in the format they came in. torch needs six calls
for a norm: at one row the calls themselves take the time, at many the memory between them. Sums are
float32, and values are rounded where torch's operators round them.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numba import carray, float32, njit, uint16

from shared.model.kernels.machine_code import compiled
from shared.model.kernels.vector import (
    as_stored,
    dot_tile,
    load_value,
    offset,
    pointer_to,
    store_value,
    take_next,
)

# Positions in the argument block. Strides count values.
NEXT, ROWS, WIDTH, X, X_STRIDE, WEIGHT, OUT, EPS_BITS = range(8)
NUM_ARGUMENTS = 8


@njit
def _norm(a: Any, counter: Any, x: Any, weight: Any, out: Any) -> None:
    width = a[WIDTH]
    square = np.empty(1, np.float32)
    square_at = pointer_to(square.ctypes.data, float32)
    eps = load_value(pointer_to(a.ctypes.data + 8 * EPS_BITS, float32), 0)
    while True:
        row = take_next(counter)
        if row >= a[ROWS]:
            return
        source = offset(x, row * a[X_STRIDE])
        dot_tile(source, 0, 1, source, 0, 1, width, 0, square_at)
        factor = np.float32(1.0) / np.float32(sqrt(square[0] / np.float32(width) + eps))
        for i in range(width):
            normed = as_stored(out, load_value(source, i) * factor)
            store_value(out, row * width + i, load_value(weight, i) * normed)


@compiled
def norm_bf16(arguments: Any) -> None:
    """Root-mean-square norm of bfloat16 rows."""
    a = carray(arguments, NUM_ARGUMENTS)
    weight, out = pointer_to(a[WEIGHT], uint16), pointer_to(a[OUT], uint16)
    _norm(a, arguments, pointer_to(a[X], uint16), weight, out)
