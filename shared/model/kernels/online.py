"""Building blocks of softmax over keys that come in groups, as LLVM instructions.

Queries lie side by side in a vector's lanes, keys one after the other: largest scores and sums need
no exchange between lanes. A group changes the largest score seen so far, and with it what has been
summed up: `soften` says by which factor.

Source: Milakov and Gimelshein 2018 (Online normalizer calculation for softmax, algorithm 3).
"""

from __future__ import annotations

from math import inf
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from shared.model.kernels.blocks import BLOCK_COLUMNS
from shared.model.kernels.lanes import (
    VECTOR,
    constant,
    exponential,
    load_one,
    spread,
    store_lanes,
)

LARGEST, TOTAL, FACTOR, LOW, HIGH = (place * BLOCK_COLUMNS for place in range(5))
"""Where a block of queries keeps, lane by lane: the largest score so far, the sum of exponentials,
what earlier sums are multiplied with, the first key it sees and the one behind the last."""

STATE_VALUES = 5 * BLOCK_COLUMNS

NO_SCORE = -1e30
"""Less than any score, but a number: no score at all minus none is zero."""

_I64 = ir.IntType(64)
_FLOATS = types.CPointer(types.float32)


@intrinsic
def soften(
    typing_context: Any, scores: Any, count: Any, first_key: Any, scale: Any, state: Any
) -> Any:
    """`count` scores of LANES queries, `BLOCK_COLUMNS` apart, to weights in place.

    Scores are of keys `first_key` and so on, and are scaled first; keys that a query does not see
    weigh nothing. Updates the largest score and the sum in `state`, and says the factor there.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, count, first_key, scale, state = arguments
        places = [builder.gep(state, [ir.Constant(_I64, at)]) for at in (LARGEST, TOTAL, FACTOR)]
        low, high, before, total = (
            load_one(builder, state, ir.Constant(_I64, at), types.float32)[0]
            for at in (LOW, HIGH, LARGEST, TOTAL)
        )
        zero, one, factor = ir.Constant(_I64, 0), ir.Constant(_I64, 1), spread(builder, scale)
        largest, sums = (cgutils.alloca_once(builder, VECTOR) for _ in range(2))
        builder.store(before, largest)
        with cgutils.for_range_slice(builder, zero, count, one, _I64) as (k, _):
            at = builder.mul(k, ir.Constant(_I64, BLOCK_COLUMNS))
            score = builder.fmul(load_one(builder, scores, at, types.float32)[0], factor)
            key = spread(builder, builder.sitofp(builder.add(first_key, k), ir.FloatType()))
            is_seen = builder.and_(
                builder.fcmp_ordered(">=", key, low), builder.fcmp_ordered("<", key, high)
            )
            score = builder.select(is_seen, score, constant(-inf))
            store_lanes(builder, score, builder.gep(scores, [at]), types.float32)
            is_larger = builder.fcmp_ordered(">", score, builder.load(largest))
            builder.store(builder.select(is_larger, score, builder.load(largest)), largest)
        shrink = exponential(builder, builder.fsub(before, builder.load(largest)))
        builder.store(builder.fmul(total, shrink), sums)
        with cgutils.for_range_slice(builder, zero, count, one, _I64) as (k, _):
            at = builder.mul(k, ir.Constant(_I64, BLOCK_COLUMNS))
            score = load_one(builder, scores, at, types.float32)[0]
            weight = exponential(builder, builder.fsub(score, builder.load(largest)))
            store_lanes(builder, weight, builder.gep(scores, [at]), types.float32)
            builder.store(builder.fadd(builder.load(sums), weight), sums)
        results = (builder.load(largest), builder.load(sums), shrink)
        for place, result in zip(places, results, strict=True):
            store_lanes(builder, result, place, types.float32)
        return context.get_dummy_value()

    return types.void(_FLOATS, types.int64, types.int64, types.float32, _FLOATS), generate


@intrinsic
def multiply_lanes(typing_context: Any, values: Any, factors: Any) -> Any:
    """LANES float32 values by as many factors, in place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(_I64, 0)
        value, factor = (load_one(builder, each, zero, types.float32)[0] for each in arguments)
        store_lanes(builder, builder.fmul(value, factor), arguments[0], types.float32)
        return context.get_dummy_value()

    return types.void(_FLOATS, _FLOATS), generate


@intrinsic
def copy_lanes(typing_context: Any, source: Any, target: Any) -> Any:
    """LANES values from one format to another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(_I64, 0)
        values = load_one(builder, arguments[0], zero, source.dtype)[0]
        store_lanes(builder, values, arguments[1], target.dtype)
        return context.get_dummy_value()

    return types.void(source, target), generate
