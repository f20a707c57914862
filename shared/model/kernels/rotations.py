"""Rotary position embedding of all heads in one pass.

In: an argument block with addresses. Out: bfloat16 heads. torch needs four passes; values are
rounded where its operators round them: every product and sum where the angles are bfloat16, only
the result where they are float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, float32, njit, uint16
from numba.core import types
from numba.extending import intrinsic

from shared.model.kernels.lanes import LANES, as_bf16, load_one, store_lanes
from shared.model.kernels.machine_code import compiled
from shared.model.kernels.vector import offset, pointer_to, take_next

# Positions in the argument block. Strides count values.
NEXT, TOKENS, HEADS, HEAD_DIM, X, X_STRIDE, COS, SIN, OUT = range(9)
NUM_ARGUMENTS = 9


@intrinsic
def turn(typing_context: Any, x: Any, other: Any, cos: Any, sin: Any, place: Any) -> Any:
    """LANES bfloat16 values of `x cos + other sin`; with bfloat16 angles both products are rounded
    before the sum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(ir.IntType(64), 0)
        formats = (types.uint16, types.uint16, cos.dtype, sin.dtype)
        values = (
            load_one(builder, each, zero, stored)[0]
            for each, stored in zip(arguments[:4], formats, strict=True)
        )
        x_lanes, other_lanes, cos_lanes, sin_lanes = values
        kept = builder.fmul(x_lanes, cos_lanes)
        added = builder.fmul(other_lanes, sin_lanes)
        if cos.dtype == types.uint16:
            kept, added = as_bf16(builder, kept), as_bf16(builder, added)
        store_lanes(builder, builder.fadd(kept, added), arguments[4], types.uint16)
        return context.get_dummy_value()

    return types.void(x, other, cos, sin, place), generate


@njit
def _rotate(a: Any, counter: Any, x: Any, cosines: Any, sines: Any, out: Any) -> None:
    width, half = a[HEAD_DIM], a[HEAD_DIM] // 2
    while True:
        token = take_next(counter)
        if token >= a[TOKENS]:
            return
        cos, sin = offset(cosines, token * width), offset(sines, token * width)
        for head in range(a[HEADS]):
            source = offset(x, token * a[X_STRIDE] + head * width)
            place = offset(out, (token * a[HEADS] + head) * width)
            for at in range(0, width, LANES):
                other = offset(source, at + half if at < half else at - half)
                turn(offset(source, at), other, offset(cos, at), offset(sin, at), offset(place, at))


@compiled
def rotate_bf16_by_f32(arguments: Any) -> None:
    """bfloat16 heads, float32 cosines and sines."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, out = pointer_to(a[X], uint16), pointer_to(a[OUT], uint16)
    _rotate(a, arguments, x, pointer_to(a[COS], float32), pointer_to(a[SIN], float32), out)


@compiled
def rotate_bf16(arguments: Any) -> None:
    """bfloat16 heads, cosines and sines."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, out = pointer_to(a[X], uint16), pointer_to(a[OUT], uint16)
    _rotate(a, arguments, x, pointer_to(a[COS], uint16), pointer_to(a[SIN], uint16), out)
