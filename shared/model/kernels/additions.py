"""Sums of two rows.

In: an argument block with addresses. Out: bfloat16 rows, rounded once, as torch's operator does.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, njit, uint16
from numba.core import types
from numba.extending import intrinsic

from shared.model.kernels.lanes import LANES, load_one, store_lanes
from shared.model.kernels.machine_code import compiled
from shared.model.kernels.vector import offset, pointer_to, take_next

# Positions in the argument block. Strides count values.
NEXT, ROWS, WIDTH, X, X_STRIDE, Y, Y_STRIDE, OUT = range(8)
NUM_ARGUMENTS = 8


@intrinsic
def plus(typing_context: Any, x: Any, y: Any, place: Any) -> Any:
    """LANES bfloat16 values of `x + y`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(ir.IntType(64), 0)
        x, y = (load_one(builder, each, zero, types.uint16)[0] for each in arguments[:2])
        store_lanes(builder, builder.fadd(x, y), arguments[2], types.uint16)
        return context.get_dummy_value()

    return types.void(x, y, place), generate


@njit
def _add(a: Any, counter: Any, xs: Any, ys: Any, out: Any) -> None:
    width = a[WIDTH]
    while True:
        row = take_next(counter)
        if row >= a[ROWS]:
            return
        x, y = offset(xs, row * a[X_STRIDE]), offset(ys, row * a[Y_STRIDE])
        place = offset(out, row * width)
        for at in range(0, width, LANES):
            plus(offset(x, at), offset(y, at), offset(place, at))


@compiled
def add_bf16(arguments: Any) -> None:
    """Sum of bfloat16 rows."""
    a = carray(arguments, NUM_ARGUMENTS)
    out = pointer_to(a[OUT], uint16)
    _add(a, arguments, pointer_to(a[X], uint16), pointer_to(a[Y], uint16), out)
