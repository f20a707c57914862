"""A linear map with bfloat16 instructions: products of pairs, added up in float32.

In: an argument block with addresses, that of `shared/model/kernels/rows.py`. Out: bfloat16 rows.
For processors whose `vdpbf16ps` multiplies 32 values with 32 others: nothing becomes float32. int8
weights become bfloat16, which holds them exactly: in registers for few rows, for more rows once for
all in memory that stays in the cache. A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import initialize_native_asmparser
from numba import carray, float32, int8, njit, uint16
from numba.core import cgutils, types
from numba.extending import intrinsic

from shared.model.kernels.lanes import LANES, add_pair_products, prefetch
from shared.model.kernels.machine_code import compiled
from shared.model.kernels.narrow import PAIRED_LANES
from shared.model.kernels.rows import (
    COLUMNS,
    FAR,
    NUM_ARGUMENTS,
    OUT,
    ROWS,
    WEIGHT,
    WIDTH,
    X_STRIDE,
    X,
    finish,
)
from shared.model.kernels.vector import (
    offset,
    pointer_to,
    row_at,
    store_sums,
    take_next,
    tile_signature,
)

initialize_native_asmparser()  # some instructions are written as assembly

CHUNK = 64
"""Weight rows that a thread takes at a time."""

AHEAD = 512
"""How many values ahead of their use weights are fetched."""

FEW_INT8_ROWS = 16
"""With more, converted weights are kept for the other rows."""

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_HALF = PAIRED_LANES // 2
_SUMS = ir.VectorType(_F32, _HALF)
_PAIRS = ir.VectorType(_I32, _HALF)
_BYTES = ir.VectorType(ir.IntType(8), _HALF)


def _pairs(builder: Any, pointer: Any, at: Any, dtype: Any) -> Any:
    """PAIRED_LANES values at `pointer[at]` as bfloat16."""
    if dtype == types.int8:
        low, high = (
            _bytes_as_float32(builder, pointer, builder.add(at, ir.Constant(at.type, start)))
            for start in (0, _HALF)
        )
        function = ir.FunctionType(_PAIRS, [_SUMS, _SUMS])
        return builder.asm(function, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", [high, low], False)
    place = builder.bitcast(builder.gep(pointer, [at]), _PAIRS.as_pointer())
    return builder.load(place, align=2)


def _bytes_as_float32(builder: Any, pointer: Any, at: Any) -> Any:
    place = builder.bitcast(builder.gep(pointer, [at]), _BYTES.as_pointer())
    return builder.sitofp(builder.sext(builder.load(place, align=1), _PAIRS), _SUMS)


def _half_sums(builder: Any, vector: Any) -> Any:
    """The upper half of the lanes added to the lower."""
    masks = (
        ir.Constant(ir.VectorType(_I32, LANES), list(range(start, start + LANES)))
        for start in (0, LANES)
    )
    return builder.fadd(*(builder.shuffle_vector(vector, vector, mask) for mask in masks))


@intrinsic(prefer_literal=True)
def pair_tile(
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
    """`sums[i * w_rows + j] = x[i] . w[j]` over `width` values, as `dot_tile` has it.

    `x` points to bfloat16, `w` to bfloat16 or int8.
    """
    rows, columns = x_rows.literal_value, w_rows.literal_value
    signature = tile_signature(x, x_rows, w, w_rows)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_start, x_stride, _, w_start, w_stride, _, width, ahead, sums = arguments
        totals = [cgutils.alloca_once(builder, _SUMS) for _ in range(rows * columns)]
        for total in totals:
            builder.store(ir.Constant(_SUMS, [0.0] * (PAIRED_LANES // 2)), total)

        x_at = [row_at(builder, x_start, x_stride, i) for i in range(rows)]
        w_at = [row_at(builder, w_start, w_stride, j) for j in range(columns)]
        start, step = (ir.Constant(width.type, value) for value in (0, PAIRED_LANES))
        with cgutils.for_range_slice(builder, start, width, step, width.type) as (at, _):
            for pointer in w_at:
                prefetch(builder, builder.gep(pointer, [builder.add(at, ahead)]))
            kept = [_pairs(builder, pointer, at, w.dtype) for pointer in w_at]
            for i, pointer in enumerate(x_at):
                values = _pairs(builder, pointer, at, x.dtype)
                for total, weights in zip(totals[i * columns :], kept, strict=False):
                    sums_so_far = builder.load(total)
                    added = add_pair_products(builder, sums_so_far, values, weights)
                    builder.store(added, total)
        store_sums(builder, [_half_sums(builder, builder.load(each)) for each in totals], sums)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def convert(typing_context: Any, source: Any, count: Any, target: Any) -> Any:
    """`count` int8 values, a multiple of PAIRED_LANES, as bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_at, count, target = arguments
        start, step = (ir.Constant(_I64, value) for value in (0, PAIRED_LANES))
        with cgutils.for_range_slice(builder, start, count, step, _I64) as (at, _):
            values = _pairs(builder, source_at, at, types.int8)
            place = builder.bitcast(builder.gep(target, [at]), _PAIRS.as_pointer())
            builder.store(values, place, align=2)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.CPointer(types.uint16)), generate


@njit
def _four_columns(a: Any, x: Any, w: Any, out: Any, sums: Any, column: int, apart: int) -> None:
    """All rows times four weight rows: `column`, `column + apart` and so on."""
    width, rows, stride, w_stride = a[WIDTH], a[ROWS], a[X_STRIDE], apart * a[WIDTH]
    weights = offset(w, column * width)
    row = 0
    while row + 4 <= rows:
        # Later rows find these weights in the cache; meanwhile the memory fetches the next ones.
        ahead = width if row and width < FAR else AHEAD
        pair_tile(offset(x, row * stride), stride, 4, weights, w_stride, 4, width, ahead, sums)
        finish(a, out, sums, 4, 4, row, column, apart)
        row += 4
    while row + 2 <= rows:
        pair_tile(offset(x, row * stride), stride, 2, weights, w_stride, 4, width, AHEAD, sums)
        finish(a, out, sums, 2, 4, row, column, apart)
        row += 2
    if row < rows:
        pair_tile(offset(x, row * stride), stride, 1, weights, w_stride, 4, width, AHEAD, sums)
        finish(a, out, sums, 1, 4, row, column, apart)


@njit
def _one_column(a: Any, x: Any, w: Any, out: Any, sums: Any, column: int) -> None:
    width, stride = a[WIDTH], a[X_STRIDE]
    weights = offset(w, column * width)
    for row in range(a[ROWS]):
        pair_tile(offset(x, row * stride), stride, 1, weights, width, 1, width, AHEAD, sums)
        finish(a, out, sums, 1, 1, row, column, 1)


@njit
def _columns(a: Any, x: Any, w: Any, out: Any, sums: Any, first: int, stop: int) -> None:
    """All rows times weight rows `first .. stop`; `w` is where row 0 would lie."""
    # Four streams through a chunk, each without a gap, are read fastest.
    fours = (stop - first) // 4
    for four in range(fours):
        _four_columns(a, x, w, out, sums, first + four, fours)
    for column in range(first + 4 * fours, stop):
        _one_column(a, x, w, out, sums, column)


@compiled
def pair_rows(arguments: Any) -> None:
    """bfloat16 rows, weights, bias and result."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, w, out = pointer_to(a[X], uint16), pointer_to(a[WEIGHT], uint16), pointer_to(a[OUT], uint16)
    sums_array = np.empty(16, np.float32)
    sums = pointer_to(sums_array.ctypes.data, float32)
    while True:
        first = take_next(arguments) * CHUNK
        if first >= a[COLUMNS]:
            return
        _columns(a, x, w, out, sums, first, min(first + CHUNK, a[COLUMNS]))


@compiled
def pair_rows_int8(arguments: Any) -> None:
    """bfloat16 rows, bias and result; int8 weights with a float32 scale per weight row."""
    a = carray(arguments, NUM_ARGUMENTS)
    x, w, out = pointer_to(a[X], uint16), pointer_to(a[WEIGHT], int8), pointer_to(a[OUT], uint16)
    sums_array = np.empty(16, np.float32)
    sums = pointer_to(sums_array.ctypes.data, float32)
    is_few, width = a[ROWS] <= FEW_INT8_ROWS, a[WIDTH]
    chunk = np.empty(0 if is_few else CHUNK * width, np.uint16)
    place = pointer_to(chunk.ctypes.data, uint16)
    while True:
        first = take_next(arguments) * CHUNK
        if first >= a[COLUMNS]:
            return
        stop = min(first + CHUNK, a[COLUMNS])
        if is_few:
            _columns(a, x, w, out, sums, first, stop)
        else:
            convert(offset(w, first * width), (stop - first) * width, place)
            _columns(a, x, offset(place, -first * width), out, sums, first, stop)
