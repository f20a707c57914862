"""Building blocks of products of many rows, as LLVM instructions.

A product of many rows keeps a block of sums in registers: `BLOCK_ROWS` rows of activations times
`BLOCK_COLUMNS` rows of weights. Each step along the reduced dimension needs one value of each, so
both sides are laid out with these values side by side; `transpose` does that and widens to float32
on the way. Every sum is one chain of fused multiply-adds from the first product to the last:
neither the number of rows nor the place of a row changes a bit of it.

Where the processor has bfloat16 instructions, a word may hold a pair of values that are neighbours
along the reduced dimension: pointers to words (`uint32`) instead of float32 say so.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from shared.model.kernels.lanes import (
    LANES,
    VECTOR,
    WORDS,
    add_pair_products,
    fused_multiply_add,
    load_one,
    spread,
    store_lanes,
)
from shared.model.kernels.vector import row_at

BLOCK_ROWS = 6
BLOCK_COLUMNS = 2 * LANES
"""Twelve vectors of sums, two of weights and one of activations: as many as AVX2 has registers."""

STEPS = 4
"""Steps along the reduced dimension in one turn of the loop; its length is a multiple of them."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def transpose(
    typing_context: Any, source: Any, stride: Any, last: Any, target: Any, target_stride: Any
) -> Any:
    """`target[k * target_stride + i] = source[min(i, last) * stride + k]`, `i` and `k` below LANES.

    `target` is float32, or words like `source`; all LANES values of each `k` are written, the
    lowest `k` first.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, stride, last, target, target_stride = arguments
        rows = []
        for i in range(LANES):
            number = ir.Constant(_I64, i)
            row = builder.select(builder.icmp_signed("<", number, last), number, last)
            at = builder.mul(row, stride)
            rows.append(load_one(builder, start, at, source.dtype)[0])
        for k, vector in enumerate(_transposed(builder, rows)):
            place = builder.gep(target, [builder.mul(target_stride, ir.Constant(_I64, k))])
            builder.store(vector, builder.bitcast(place, VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, target, types.int64), generate


@intrinsic
def multiply_block(
    typing_context: Any, rows: Any, columns: Any, depth: Any, sums: Any, goes_on: Any
) -> Any:
    """`sums[i, j] += rows[k, i] * columns[k, j]` over `depth` steps `k`, a multiple of `STEPS`.

    `sums` `[BLOCK_ROWS, BLOCK_COLUMNS]` are float32; `rows` `[depth, BLOCK_ROWS]` and `columns`
    `[depth, BLOCK_COLUMNS]` are float32 or words of two steps each. Unless `goes_on`, sums start
    from zero.
    """
    add = _add_outer_product_of_pairs if rows.dtype == types.uint32 else _add_outer_product

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, columns, depth, sums, goes_on = arguments
        num_vectors = BLOCK_COLUMNS // LANES
        places = [
            builder.bitcast(builder.gep(sums, [ir.Constant(_I64, n * LANES)]), VECTOR.as_pointer())
            for n in range(BLOCK_ROWS * num_vectors)
        ]
        totals = [cgutils.alloca_once(builder, VECTOR) for _ in places]
        for total in totals:
            builder.store(ir.Constant(VECTOR, [0.0] * LANES), total)
        with builder.if_then(builder.icmp_signed("!=", goes_on, ir.Constant(_I64, 0))):
            for total, place in zip(totals, places, strict=True):
                builder.store(builder.load(place, align=4), total)
        zero, step = ir.Constant(_I64, 0), ir.Constant(_I64, STEPS)
        with cgutils.for_range_slice(builder, zero, depth, step, _I64) as (turn, _):
            for k in range(STEPS):
                at = builder.add(turn, ir.Constant(_I64, k))
                add(builder, rows, columns, at, totals)
        for total, place in zip(totals, places, strict=True):
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    floats = types.CPointer(types.float32)
    return types.void(rows, rows, types.int64, floats, types.int64), generate


@intrinsic(prefer_literal=True)
def multiply_rows(
    typing_context: Any,
    rows: Any,
    stride: Any,
    count: Any,
    columns: Any,
    apart: Any,
    depth: Any,
    sums: Any,
    sums_stride: Any,
    goes_on: Any,
) -> Any:
    """`sums[i, j] += rows[i, k] * columns[k, j]` over `depth` steps `k`.

    For `count` rows, a literal, `stride` apart, and `BLOCK_COLUMNS` columns, whose steps lie
    `apart`. As in `multiply_block` both are float32 or words of two steps each, and sums start from
    zero unless `goes_on`.
    """
    add = _add_pairs if rows.dtype == types.uint32 else fused_multiply_add

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows_at, stride, _, columns_at, apart, depth, sums, sums_stride, goes_on = arguments
        lanes = range(0, BLOCK_COLUMNS, LANES)
        starts = [row_at(builder, rows_at, stride, i) for i in range(count.literal_value)]
        places = [
            builder.gep(row_at(builder, sums, sums_stride, i), [ir.Constant(_I64, lane)])
            for i in range(count.literal_value)
            for lane in lanes
        ]
        totals = [cgutils.alloca_once(builder, VECTOR) for _ in places]
        for total in totals:
            builder.store(ir.Constant(VECTOR, [0.0] * LANES), total)
        zero, one = ir.Constant(_I64, 0), ir.Constant(_I64, 1)
        with builder.if_then(builder.icmp_signed("!=", goes_on, zero)):
            for total, place in zip(totals, places, strict=True):
                builder.store(load_one(builder, place, zero, types.float32)[0], total)
        with cgutils.for_range_slice(builder, zero, depth, one, _I64) as (k, _):
            here = builder.gep(columns_at, [builder.mul(k, apart)])
            values = [_vector(builder, here, lane, rows.dtype) for lane in lanes]
            for i, start in enumerate(starts):
                factor = spread(builder, builder.load(builder.gep(start, [k])))
                for total, value in zip(totals[i * len(values) :], values, strict=False):
                    builder.store(add(builder, factor, value, builder.load(total)), total)
        for total, place in zip(totals, places, strict=True):
            store_lanes(builder, builder.load(total), place, types.float32)
        return context.get_dummy_value()

    floats, number = types.CPointer(types.float32), types.int64
    signature = types.void(*(rows, number, count, rows, number), *(number, floats, number, number))
    return signature, generate


@intrinsic
def lay_beside(typing_context: Any, rows: Any, stride: Any, target: Any) -> Any:
    """LANES columns of one step of a block: of the float32 row at `rows`, or, as words, of the two
    bfloat16 rows that lie `stride` words apart there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, place = arguments
        if rows.dtype == types.float32:
            (values,) = load_one(builder, source, ir.Constant(_I64, 0), rows.dtype)
        else:
            halves = ir.VectorType(ir.IntType(16), LANES).as_pointer()
            first, second = (
                builder.zext(builder.load(builder.bitcast(at, halves), align=2), WORDS)
                for at in (source, builder.gep(source, [stride]))
            )
            shift = ir.Constant(WORDS, [16] * LANES)
            values = builder.bitcast(builder.or_(first, builder.shl(second, shift)), VECTOR)
        store_lanes(builder, values, place, rows.dtype)
        return context.get_dummy_value()

    return types.void(rows, types.int64, rows), generate


@intrinsic
def finish_lanes(
    typing_context: Any,
    sums: Any,
    scale: Any,
    bias: Any,
    place: Any,
    is_scaled: Any,
    is_biased: Any,
) -> Any:
    """Store LANES sums at `place` in its format, scaled and shifted where asked for.

    `scale` points to float32, `bias` to values in `place`'s format.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, scale, bias, place, is_scaled, is_biased = arguments
        zero, value = ir.Constant(_I64, 0), cgutils.alloca_once(builder, VECTOR)
        builder.store(load_one(builder, sums, zero, types.float32)[0], value)
        with builder.if_then(builder.icmp_signed("!=", is_scaled, zero)):
            factor = load_one(builder, scale, zero, types.float32)[0]
            builder.store(builder.fmul(builder.load(value), factor), value)
        with builder.if_then(builder.icmp_signed("!=", is_biased, zero)):
            added = load_one(builder, bias, zero, signature.args[2].dtype)[0]
            builder.store(builder.fadd(builder.load(value), added), value)
        store_lanes(builder, builder.load(value), place, signature.args[3].dtype)
        return context.get_dummy_value()

    floats = types.CPointer(types.float32)
    return types.void(floats, floats, bias, place, types.int64, types.int64), generate


def _add_outer_product(builder: Any, rows: Any, columns: Any, at: Any, totals: list[Any]) -> None:
    """Step `at` of a block."""
    num_vectors = BLOCK_COLUMNS // LANES
    here = builder.gep(columns, [builder.mul(at, ir.Constant(_I64, BLOCK_COLUMNS))])
    weights = [
        load_one(builder, here, ir.Constant(_I64, n * LANES), types.float32)[0]
        for n in range(num_vectors)
    ]
    first = builder.gep(rows, [builder.mul(at, ir.Constant(_I64, BLOCK_ROWS))])
    for i in range(BLOCK_ROWS):
        value = builder.load(builder.gep(first, [ir.Constant(_I64, i)]))
        values = spread(builder, value)
        for n, weight in enumerate(weights):
            total = totals[i * num_vectors + n]
            builder.store(fused_multiply_add(builder, values, weight, builder.load(total)), total)


def _add_outer_product_of_pairs(
    builder: Any, rows: Any, columns: Any, at: Any, totals: list[Any]
) -> None:
    """Steps `2 * at` and `2 * at + 1` of a block."""
    num_vectors = BLOCK_COLUMNS // LANES
    here = builder.gep(columns, [builder.mul(at, ir.Constant(_I64, BLOCK_COLUMNS))])
    vectors = builder.bitcast(here, WORDS.as_pointer())
    weights = [
        builder.load(builder.gep(vectors, [ir.Constant(_I64, n)]), align=4)
        for n in range(num_vectors)
    ]
    first = builder.gep(rows, [builder.mul(at, ir.Constant(_I64, BLOCK_ROWS))])
    for i in range(BLOCK_ROWS):
        pairs = spread(builder, builder.load(builder.gep(first, [ir.Constant(_I64, i)])))
        for n, weight in enumerate(weights):
            total = totals[i * num_vectors + n]
            builder.store(add_pair_products(builder, builder.load(total), pairs, weight), total)


def _add_pairs(builder: Any, pairs: Any, others: Any, total: Any) -> Any:
    return add_pair_products(builder, total, pairs, others)


def _vector(builder: Any, pointer: Any, at: int, dtype: Any) -> Any:
    """LANES values as float32, or words as words."""
    values = load_one(builder, pointer, ir.Constant(_I64, at), dtype)[0]
    return builder.bitcast(values, WORDS) if dtype == types.uint32 else values


def _transposed(builder: Any, vectors: list[Any]) -> list[Any]:
    """Columns of a square of values: pairs, then fours, then halves change places."""
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    pairs = _exchanged(builder, vectors, 1, low, high)
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    fours = _exchanged(builder, pairs, 2, low, high)
    low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    halves = _exchanged(builder, fours, 4, low, high)
    return [halves[k] for k in (0, 2, 1, 3, 4, 6, 5, 7)]


def _exchanged(
    builder: Any, vectors: list[Any], apart: int, low: list[int], high: list[int]
) -> list[Any]:
    """Vectors `i` and `i + apart` shuffled into those two places by the masks `low`, `high`."""
    result = list(vectors)
    masks = [ir.Constant(ir.VectorType(_I32, LANES), mask) for mask in (low, high)]
    for i in range(LANES):
        if not i & apart:
            a, b = vectors[i], vectors[i + apart]
            result[i], result[i + apart] = (builder.shuffle_vector(a, b, mask) for mask in masks)
    return result
