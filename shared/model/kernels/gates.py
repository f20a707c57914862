"""The gate of an MLP in one pass: `silu(gate) * up`.

In: an argument block with addresses. Out: bfloat16 rows. torch needs two passes and a copy between
them; values are rounded where its operators round them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, njit, uint16
from numba.core import types
from numba.extending import intrinsic

from shared.model.kernels.lanes import (
    LANES,
    as_bf16,
    constant,
    exponential,
    load_one,
    store_lanes,
)
from shared.model.kernels.machine_code import compiled
from shared.model.kernels.vector import offset, pointer_to, take_next

# Positions in the argument block. Strides count values; `up` lies `WIDTH` values behind `gate`.
NEXT, ROWS, WIDTH, GATE, STRIDE, OUT = range(6)
NUM_ARGUMENTS = 6


@intrinsic
def silu_times(typing_context: Any, gate: Any, up: Any, place: Any) -> Any:
    """LANES bfloat16 values of `silu(gate) * up`, the first factor rounded too."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(ir.IntType(64), 0)
        gate, up = (load_one(builder, each, zero, types.uint16)[0] for each in arguments[:2])
        inverse = exponential(builder, builder.fsub(constant(-0.0), gate))
        silu = builder.fdiv(gate, builder.fadd(constant(1.0), inverse))
        product = builder.fmul(as_bf16(builder, silu), up)
        store_lanes(builder, product, arguments[2], types.uint16)
        return context.get_dummy_value()

    return types.void(gate, up, place), generate


@njit
def _gate(a: Any, counter: Any, gates: Any, out: Any) -> None:
    width = a[WIDTH]
    while True:
        row = take_next(counter)
        if row >= a[ROWS]:
            return
        gate, place = offset(gates, row * a[STRIDE]), offset(out, row * width)
        up = offset(gate, width)
        for at in range(0, width, LANES):
            silu_times(offset(gate, at), offset(up, at), offset(place, at))


@compiled
def swiglu_bf16(arguments: Any) -> None:
    """`silu(gate) * up` of bfloat16 rows that hold a gate and, behind it, what it lets through."""
    a = carray(arguments, NUM_ARGUMENTS)
    _gate(a, arguments, pointer_to(a[GATE], uint16), pointer_to(a[OUT], uint16))
