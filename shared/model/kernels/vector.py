"""Building blocks of the compiled kernels, as LLVM instructions.

numba has neither vectors nor bfloat16; what needs them is written here once: products of a few rows
with a few weight rows, and conversions between bfloat16 bits and float32. Every sum of products has
one order, fixed by `LANES` alone, so a result does not depend on how many rows share a call.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 8
"""Partial sums of one product; also the length that a reduced dimension must be a multiple of."""

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


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
def take_next(typing_context: Any, counter: Any) -> Any:
    """Take the next number from a counter that several threads share."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", arguments[0], one, "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


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
            value = _rounded_bits(builder, value)
        builder.store(value, target)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), generate


@intrinsic
def as_stored(typing_context: Any, pointer: Any, value: Any) -> Any:
    """What `store_value` followed by `load_value` would give."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if pointer.dtype != types.uint16:
            return arguments[1]
        bits = builder.zext(_rounded_bits(builder, arguments[1]), _I32)
        return builder.bitcast(builder.shl(bits, ir.Constant(_I32, 16)), _F32)

    return types.float32(pointer, types.float32), generate


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

    `x` and `w` point to float32, bfloat16 bits or (`w`) int8; strides count values. `x_rows` and
    `w_rows` are literals: their product is held in registers. Weights `ahead` values further on are
    requested from memory.
    """
    rows, columns = x_rows.literal_value, w_rows.literal_value
    signature = types.void(
        x,
        types.int64,
        x_rows,
        w,
        types.int64,
        w_rows,
        types.int64,
        types.int64,
        types.CPointer(types.float32),
    )

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_start, x_stride, _, w_start, w_stride, _, width, ahead, sums = arguments
        vector = ir.VectorType(_F32, LANES)
        totals = [cgutils.alloca_once(builder, vector) for _ in range(rows * columns)]
        for total in totals:
            builder.store(ir.Constant(vector, [0.0] * LANES), total)
        x_at = [_row(builder, x_start, x_stride, i) for i in range(rows)]
        w_at = [_row(builder, w_start, w_stride, j) for j in range(columns)]
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
        )

        def multiply(at: Any) -> None:
            ws = [_load(builder, pointer, at, w.dtype) for pointer in w_at]
            for i, pointer in enumerate(x_at):
                xs = _load(builder, pointer, at, x.dtype)
                for j, weights in enumerate(ws):
                    total = totals[i * columns + j]
                    builder.store(builder.call(fma, [xs, weights, builder.load(total)]), total)

        def number(value: int) -> Any:
            return ir.Constant(width.type, value)

        # Four vectors a turn, one request per cache line of weights, then what is left.
        whole = builder.and_(width, number(-4 * LANES))
        with cgutils.for_range_slice(builder, number(0), whole, number(4 * LANES), width.type) as (
            at,
            _,
        ):
            for pointer in w_at:
                _prefetch(builder, builder.gep(pointer, [builder.add(at, ahead)]))
            for step in range(4):
                multiply(builder.add(at, number(step * LANES)))
        with cgutils.for_range_slice(builder, whole, width, number(LANES), width.type) as (at, _):
            multiply(at)
        for index, total in enumerate(totals):
            target = builder.gep(sums, [ir.Constant(_I32, index)])
            builder.store(_lane_sum(builder, builder.load(total)), target)
        return context.get_dummy_value()

    return signature, generate


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for a cache line that will be read soon; any address is allowed."""
    byte_pointer = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [byte_pointer, _I32, _I32, _I32]),
        "llvm.prefetch.p0i8",
    )
    read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
    builder.call(function, [builder.bitcast(pointer, byte_pointer), read, keep, data])


def _rounded_bits(builder: Any, value: Any) -> Any:
    """float32 to the nearest bfloat16, ties to even; not-a-number stays so."""
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, ir.Constant(_I32, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, ir.Constant(_I32, 16)), _I16)


def _row(builder: Any, start: Any, stride: Any, index: int) -> Any:
    return builder.gep(start, [builder.mul(stride, ir.Constant(stride.type, index))])


def _load(builder: Any, pointer: Any, at: Any, dtype: Any) -> Any:
    """`LANES` values at `pointer[at]` as float32."""
    element = {types.float32: _F32, types.uint16: _I16, types.int8: ir.IntType(8)}[dtype]
    place = builder.bitcast(builder.gep(pointer, [at]), ir.VectorType(element, LANES).as_pointer())
    values = builder.load(place, align=element.width // 8 if dtype != types.float32 else 4)
    floats, words = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
    if dtype == types.uint16:
        shift = ir.Constant(words, [16] * LANES)
        return builder.bitcast(builder.shl(builder.zext(values, words), shift), floats)
    if dtype == types.int8:
        return builder.sitofp(builder.sext(values, words), floats)
    return values


def _lane_sum(builder: Any, vector: Any) -> Any:
    """The lanes' sum by halves, always in the same order."""
    lanes = [builder.extract_element(vector, ir.Constant(_I32, i)) for i in range(LANES)]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [builder.fadd(a, b) for a, b in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]
