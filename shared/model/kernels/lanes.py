"""Vectors of `LANES` float32 values as instructions of an LLVM builder.

In: a builder and LLVM values, formats as numba's types. Out: LLVM values. Nothing here knows what
the values are summed up to.
"""

from __future__ import annotations

from math import factorial, inf, log
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

LANES = 8
"""Values in a vector; also the length that a reduced dimension must be a multiple of."""

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_STORED = {
    types.float32: (_F32, 4),
    types.uint32: (_I32, 4),
    types.uint16: (_I16, 2),
    types.int8: (ir.IntType(8), 1),
}

_INTEGERS = 1.5 * 2.0**23
"""float32 numbers of this size are integers."""

VECTOR = ir.VectorType(_F32, LANES)
WORDS = ir.VectorType(_I32, LANES)


def fused_multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32"
    )
    return builder.call(function, [a, b, c])


def add_pair_products(builder: Any, total: Any, x: Any, w: Any) -> Any:
    """`total + x[2i] w[2i] + x[2i + 1] w[2i + 1]`, lane by lane; `x` and `w` hold bfloat16 pairs.

    For processors with bfloat16 instructions, whatever the number of lanes.
    """
    function = ir.FunctionType(total.type, [total.type, x.type, w.type])
    return builder.asm(function, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [total, x, w], False)


def bf16_words(builder: Any, vector: Any) -> Any:
    """float32 rounded to bfloat16, each in the lower half of a word, by such an instruction."""
    halves = ir.VectorType(_I16, LANES)
    function = ir.FunctionType(halves, [VECTOR])
    rounded = builder.asm(function, "vcvtneps2bf16 $1, $0", "=v,v", [vector], False)
    return builder.zext(rounded, WORDS)


def constant(value: float) -> Any:
    """A vector of one float32 number."""
    return ir.Constant(VECTOR, [value] * LANES)


def spread(builder: Any, value: Any) -> Any:
    """A vector of one float32 value, or one word."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    single = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    mask = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(single, undefined, mask)


def exponential(builder: Any, x: Any) -> Any:
    """`e ** x` to 2e-7, relative; zero below -87, infinite above 88, and NaN of NaN.

    `x` is a multiple of ln 2 and a rest of at most half of it, which a Taylor series covers.
    """
    # Added to so large a number, the multiple is rounded, and it stands in the lowest bits.
    shifted = fused_multiply_add(builder, x, constant(1 / log(2)), constant(_INTEGERS))
    multiple = builder.fsub(shifted, constant(_INTEGERS))
    high = float(np.float32(log(2)))
    rest = fused_multiply_add(builder, multiple, constant(-high), x)
    rest = fused_multiply_add(builder, multiple, constant(high - log(2)), rest)
    series = constant(1 / factorial(7))
    for power in range(6, -1, -1):
        series = fused_multiply_add(builder, series, rest, constant(1 / factorial(power)))
    exponent = builder.shl(builder.bitcast(shifted, WORDS), ir.Constant(WORDS, [23] * LANES))
    scale = builder.add(exponent, ir.Constant(WORDS, [0x3F800000] * LANES))
    result = builder.fmul(series, builder.bitcast(scale, VECTOR))
    for comparison, bound, beyond in (("<", -87.0, 0.0), (">", 88.0, inf)):
        is_beyond = builder.fcmp_ordered(comparison, x, constant(bound))
        result = builder.select(is_beyond, constant(beyond), result)
    return result


def as_bf16(builder: Any, vector: Any) -> Any:
    """float32 rounded to bfloat16 and widened again."""
    return widened(builder, builder.zext(rounded_bits(builder, vector), WORDS))


def widened(builder: Any, words: Any) -> Any:
    """bfloat16 in the lower halves of words as float32."""
    return builder.bitcast(builder.shl(words, ir.Constant(WORDS, [16] * LANES)), VECTOR)


def prefetch(builder: Any, pointer: Any) -> None:
    """Ask for a cache line that will be read soon; any address is allowed."""
    byte_pointer = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [byte_pointer, _I32, _I32, _I32]),
        "llvm.prefetch.p0i8",
    )
    read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
    builder.call(function, [builder.bitcast(pointer, byte_pointer), read, keep, data])


def rounded_bits(builder: Any, value: Any) -> Any:
    """float32, one or a vector, to the nearest bfloat16, ties to even; not-a-number stays so."""
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else 0
    word, half = (ir.VectorType(kind, lanes) if lanes else kind for kind in (_I32, _I16))

    def number(constant: int) -> Any:
        return ir.Constant(word, [constant] * lanes if lanes else constant)

    bits = builder.bitcast(value, word)
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    rounded = builder.add(builder.add(bits, number(0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, number(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, number(16)), half)


def load_pair(builder: Any, pointer: Any, at: Any, dtype: Any) -> list[Any]:
    """`2 * LANES` values at `pointer[at]` as two float32 vectors.

    bfloat16 comes as even and odd values: a shift and a mask instead of two shuffles and two
    shifts.
    """
    if dtype != types.uint16:
        second = builder.add(at, ir.Constant(at.type, LANES))
        return [load_one(builder, pointer, place, dtype)[0] for place in (at, second)]
    place = builder.bitcast(builder.gep(pointer, [at]), WORDS.as_pointer())
    pairs = builder.load(place, align=2)
    odd = builder.and_(pairs, ir.Constant(WORDS, [-0x10000] * LANES))
    return [widened(builder, pairs), builder.bitcast(odd, VECTOR)]


def load_one(builder: Any, pointer: Any, at: Any, dtype: Any) -> list[Any]:
    """`LANES` values at `pointer[at]` as one float32 vector; words keep their bits."""
    element, size = _STORED[dtype]
    place = builder.bitcast(builder.gep(pointer, [at]), ir.VectorType(element, LANES).as_pointer())
    values = builder.load(place, align=size)
    if dtype == types.uint16:
        return [widened(builder, builder.zext(values, WORDS))]
    if dtype == types.int8:
        return [builder.sitofp(builder.sext(values, WORDS), VECTOR)]
    return [builder.bitcast(values, VECTOR)]


def store_lanes(builder: Any, vector: Any, pointer: Any, dtype: Any) -> None:
    """`LANES` float32 values to `pointer` in its format; words keep their bits."""
    values = rounded_bits(builder, vector) if dtype == types.uint16 else vector
    place = builder.bitcast(pointer, values.type.as_pointer())
    builder.store(values, place, align=_STORED[dtype][1])


def lane_sum(builder: Any, vector: Any) -> Any:
    """The lanes' sum by halves, always in the same order."""
    lanes = [builder.extract_element(vector, ir.Constant(_I32, i)) for i in range(LANES)]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [builder.fadd(a, b) for a, b in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]


def four_lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """Four vectors' `lane_sum`s as one vector, added in the same order."""

    def fold(a: Any, b: Any, left: list[int], right: list[int]) -> Any:
        masks = (ir.Constant(ir.VectorType(_I32, 4), lanes) for lanes in (left, right))
        return builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))

    halves = [fold(vector, vector, [0, 1, 2, 3], [4, 5, 6, 7]) for vector in vectors]
    first = fold(halves[0], halves[1], [0, 1, 4, 5], [2, 3, 6, 7])
    second = fold(halves[2], halves[3], [0, 1, 4, 5], [2, 3, 6, 7])
    return fold(first, second, [0, 2, 4, 6], [1, 3, 5, 7])
