"""Building blocks of the compiled kernels, as LLVM instructions.

numba has neither vectors nor bfloat16; what needs them is written here once: products of a few rows
with a few weight rows, and conversions between bfloat16 bits and float32. Every sum of products has
one order, fixed by `LANES` alone, so a result does not depend on how many rows share a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from shared.model.kernels.lanes import (
    LANES,
    four_lane_sums,
    fused_multiply_add,
    lane_sum,
    load_one,
    load_pair,
    prefetch,
    rounded_bits,
)

_Load = Callable[[Any, Any, Any, Any], list[Any]]

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_STORED = {types.float32: (_F32, 4), types.uint16: (_I16, 2), types.int8: (ir.IntType(8), 1)}


@intrinsic
def pointer_to(typing_context: Any, address: Any, dtype: Any) -> Any:
    """The integer `address` as a pointer to values of `dtype`."""
    pointer = types.CPointer(dtype.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, dtype), generate


@intrinsic
def offset(typing_context: Any, pointer: Any, count: Any) -> Any:
    """The pointer `count` values further on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), generate


@intrinsic
def viewed(typing_context: Any, pointer: Any, example: Any) -> Any:
    """The pointer, to values of what `example` points to."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(example))

    return example(pointer, example), generate


@intrinsic
def num_in(typing_context: Any, pointer: Any) -> Any:
    """Values in what the pointer counts by: two bfloat16 in a word, else one."""
    count = 2 if pointer.dtype == types.uint32 else 1

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), count)

    return types.int64(pointer), generate


@intrinsic
def take_next(typing_context: Any, counter: Any) -> Any:
    """Take the next number from a counter that several threads share."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", arguments[0], one, "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
def request(typing_context: Any, pointer: Any) -> Any:
    """Ask for the cache line at `pointer`, which may lie outside of any array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(pointer), generate


@intrinsic
def load_value(typing_context: Any, pointer: Any, index: Any) -> Any:
    """One value as float32, whatever the pointer's format."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(builder.gep(arguments[0], [arguments[1]]))
        if pointer.dtype == types.uint16:
            shifted = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
            return builder.bitcast(shifted, _F32)
        return builder.sitofp(value, _F32) if pointer.dtype == types.int8 else value

    return types.float32(pointer, types.int64), generate


@intrinsic
def store_value(typing_context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Store a float32 in the pointer's format; bfloat16 takes the nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, value = builder.gep(arguments[0], [arguments[1]]), arguments[2]
        if pointer.dtype == types.uint16:
            value = rounded_bits(builder, value)
        builder.store(value, target)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), generate


@intrinsic
def as_stored(typing_context: Any, pointer: Any, value: Any) -> Any:
    """What `store_value` followed by `load_value` would give."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if pointer.dtype != types.uint16:
            return arguments[1]
        bits = builder.zext(rounded_bits(builder, arguments[1]), _I32)
        return builder.bitcast(builder.shl(bits, ir.Constant(_I32, 16)), _F32)

    return types.float32(pointer, types.float32), generate


def tile_signature(x: Any, x_rows: Any, w: Any, w_rows: Any) -> Any:
    """Of a product of a few rows with a few weight rows: each with its stride and number, then the
    width, how far ahead weights are requested, and the sums."""
    rows_of_x, rows_of_w = (x, types.int64, x_rows), (w, types.int64, w_rows)
    return types.void(
        *rows_of_x, *rows_of_w, types.int64, types.int64, types.CPointer(types.float32)
    )


@intrinsic(prefer_literal=True)
def dot_tile(
    typing_context: Any,
    x: Any,
    x_stride: Any,
    x_rows: Any,
    w: Any,
    w_stride: Any,
    w_rows: Any,
    width: Any,
    ahead: Any,
    sums: Any,
) -> Any:
    """`sums[i * w_rows + j] = x[i] . w[j]` over `width` values, a multiple of `LANES`.

    `x` and `w` point to float32, bfloat16 bits or (`w`) int8; strides count values. bfloat16 `w` is
    read in pairs, so float32 `x` beside it must be arranged as `widen` does. `x_rows` and `w_rows`
    are literals: their product is held in registers. Weights `ahead` values further on are
    requested from memory.
    """
    rows, columns = x_rows.literal_value, w_rows.literal_value
    signature = tile_signature(x, x_rows, w, w_rows)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_start, x_stride, _, w_start, w_stride, _, width, ahead, sums = arguments
        vector = ir.VectorType(_F32, LANES)
        totals = [cgutils.alloca_once(builder, vector) for _ in range(rows * columns)]
        for total in totals:
            builder.store(ir.Constant(vector, [0.0] * LANES), total)
        x_at = [row_at(builder, x_start, x_stride, i) for i in range(rows)]
        w_at = [row_at(builder, w_start, w_stride, j) for j in range(columns)]

        # The side with fewer vectors stays in registers while the other passes by.
        x_side, w_side = (x_at, x.dtype, columns), (w_at, w.dtype, 1)
        held, passing = (w_side, x_side) if rows > columns else (x_side, w_side)

        def multiply(at: Any, load: _Load) -> None:
            kept = [load(builder, pointer, at, held[1]) for pointer in held[0]]
            for i, pointer in enumerate(passing[0]):
                for part, values in enumerate(load(builder, pointer, at, passing[1])):
                    for j, others in enumerate(kept):
                        total = totals[i * passing[2] + j * held[2]]
                        product = fused_multiply_add(
                            builder, values, others[part], builder.load(total)
                        )
                        builder.store(product, total)

        def number(value: int) -> Any:
            return ir.Constant(width.type, value)

        # Four vectors a turn, one request per cache line of weights, then what is left.
        whole, paired = (builder.and_(width, number(-count * LANES)) for count in (4, 2))
        with cgutils.for_range_slice(builder, number(0), whole, number(4 * LANES), width.type) as (
            at,
            _,
        ):
            for pointer in w_at:
                prefetch(builder, builder.gep(pointer, [builder.add(at, ahead)]))
            multiply(at, load_pair)
            multiply(builder.add(at, number(2 * LANES)), load_pair)
        with builder.if_then(builder.icmp_signed("<", whole, paired)):
            multiply(whole, load_pair)
        with builder.if_then(builder.icmp_signed("<", paired, width)):
            multiply(paired, load_one)
        store_sums(builder, [builder.load(total) for total in totals], sums)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def widen(typing_context: Any, x: Any, width: Any, out: Any) -> Any:
    """`width` bfloat16 values as float32, in the order that `dot_tile` reads bfloat16 weights.

    Of every 16 values the even ones come first, then the odd ones; 8 at the end stay as they are.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, width, target = arguments
        place = ir.VectorType(_F32, LANES).as_pointer()

        def move(at: Any, load: _Load) -> None:
            for part, values in enumerate(load(builder, source, at, x.dtype)):
                to = builder.gep(target, [builder.add(at, ir.Constant(at.type, part * LANES))])
                builder.store(values, builder.bitcast(to, place), align=4)

        paired = builder.and_(width, ir.Constant(width.type, -2 * LANES))
        step = ir.Constant(width.type, 2 * LANES)
        with cgutils.for_range_slice(
            builder, ir.Constant(width.type, 0), paired, step, width.type
        ) as (at, _):
            move(at, load_pair)
        with builder.if_then(builder.icmp_signed("<", paired, width)):
            move(paired, load_one)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.CPointer(types.float32)), generate


def row_at(builder: Any, start: Any, stride: Any, index: int) -> Any:
    return builder.gep(start, [builder.mul(stride, ir.Constant(stride.type, index))])


def store_sums(builder: Any, totals: list[Any], sums: Any) -> None:
    """Each vector's lanes added by halves, always in the same order; four vectors at a time."""
    whole = len(totals) // 4 * 4
    for start in range(0, whole, 4):
        four = four_lane_sums(builder, totals[start : start + 4])
        place = builder.gep(sums, [ir.Constant(_I32, start)])
        builder.store(four, builder.bitcast(place, four.type.as_pointer()), align=4)
    for index in range(whole, len(totals)):
        place = builder.gep(sums, [ir.Constant(_I32, index)])
        builder.store(lane_sum(builder, totals[index]), place)
