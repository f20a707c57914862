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

# Positions in the argument blocks. Strides count values.
NEXT, ROWS, WIDTH, X, X_STRIDE, WEIGHT, OUT, EPS_BITS = range(8)
NUM_ARGUMENTS = 8

# Of heads: `ROWS` are tokens and `WIDTH` is a head's; the first `Q_HEADS` of each token's `HEADS`
# have weights of their own, the others those of keys.
HEADS, Q_HEADS, K_WEIGHT = range(8, 11)
NUM_HEAD_ARGUMENTS = 11


@njit
def _norm_row(source: Any, weight: Any, target: Any, width: int, eps: Any, square: Any) -> None:
    """`square` is room for one number."""
    dot_tile(source, 0, 1, source, 0, 1, width, 0, square)
    factor = np.float32(1.0) / np.float32(sqrt(square[0] / np.float32(width) + eps))
    for i in range(width):
        normed = as_stored(target, load_value(source, i) * factor)
        store_value(target, i, load_value(weight, i) * normed)


@njit
def _eps(a: Any) -> Any:
    return load_value(pointer_to(a.ctypes.data + 8 * EPS_BITS, float32), 0)


@compiled
def norm_bf16(arguments: Any) -> None:
    """Root-mean-square norm of bfloat16 rows."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, out = pointer_to(a[X], uint16), pointer_to(a[OUT], uint16)
    weight, width, eps = pointer_to(a[WEIGHT], uint16), a[WIDTH], _eps(a)
    square_array = np.empty(1, np.float32)
    square = pointer_to(square_array.ctypes.data, float32)
    while True:
        row = take_next(arguments)
        if row >= a[ROWS]:
            return
        source, target = offset(x, row * a[X_STRIDE]), offset(out, row * width)
        _norm_row(source, weight, target, width, eps, square)


@compiled
def norm_heads_bf16(arguments: Any) -> None:
    """The same of each head of queries and keys, which lie side by side."""
    a = carray(arguments, NUM_HEAD_ARGUMENTS)
    x, out = pointer_to(a[X], uint16), pointer_to(a[OUT], uint16)
    of_queries, of_keys = pointer_to(a[WEIGHT], uint16), pointer_to(a[K_WEIGHT], uint16)
    width, eps = a[WIDTH], _eps(a)
    square_array = np.empty(1, np.float32)
    square = pointer_to(square_array.ctypes.data, float32)
    while True:
        token = take_next(arguments)
        if token >= a[ROWS]:
            return
        source = offset(x, token * a[X_STRIDE])
        target = offset(out, token * a[HEADS] * width)
        for head in range(a[HEADS]):
            weight = of_queries if head < a[Q_HEADS] else of_keys
            at = head * width
            _norm_row(offset(source, at), weight, offset(target, at), width, eps, square)
