"""Building blocks of softmax over keys, as LLVM instructions.

One query has all its scores in a row. Several lie side by side in a vector's lanes, and keys come
in groups one after the other: largest scores and sums need no exchange between lanes. A group
changes the largest score seen so far, and with it what has been summed up: `soften` says by which
factor.

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
    LANES,
    VECTOR,
    bf16_words,
    constant,
    exponential,
    lane_sum,
    load_one,
    spread,
    store_lanes,
    widened,
)

LARGEST, TOTAL, FACTOR, LOW, HIGH = (place * BLOCK_COLUMNS for place in range(5))
"""Where a block of queries keeps, lane by lane: the largest score so far, the sum of exponentials,
what earlier sums are multiplied with, the first key it sees and the one behind the last."""

STATE_VALUES = 5 * BLOCK_COLUMNS

NO_SCORE = -1e30
"""Less than any score, but a number: no score at all minus none is zero."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = types.CPointer(types.float32)


@intrinsic
def soften(
    typing_context: Any,
    scores: Any,
    count: Any,
    first_key: Any,
    scale: Any,
    state: Any,
    weights: Any,
) -> Any:
    """`count` scores of LANES queries, `BLOCK_COLUMNS` apart, to weights, which may lie in place.

    Scores are of keys `first_key` and so on, and are scaled first; keys that a query does not see
    weigh nothing. Updates the largest score and the sum in `state`, and says the factor there.
    Where `weights` are words, each is of two keys, rounded to bfloat16, and the sum is of those.
    """
    in_pairs = weights.dtype == types.uint32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, count, first_key, scale, state, weights_at = arguments
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

        def weigh(key: Any) -> Any:
            at = builder.mul(key, ir.Constant(_I64, BLOCK_COLUMNS))
            score = load_one(builder, scores, at, types.float32)[0]
            weight = exponential(builder, builder.fsub(score, builder.load(largest)))
            words = bf16_words(builder, weight) if in_pairs else None
            weight = widened(builder, words) if in_pairs else weight
            builder.store(builder.fadd(builder.load(sums), weight), sums)
            return words if in_pairs else weight

        keys_of_step = 2 if in_pairs else 1
        steps = builder.sdiv(count, ir.Constant(_I64, keys_of_step))
        with cgutils.for_range_slice(builder, zero, steps, one, _I64) as (step, _):
            first = builder.mul(step, ir.Constant(_I64, keys_of_step))
            values = weigh(first)
            if in_pairs:
                second = weigh(builder.add(first, one))
                second = builder.shl(second, ir.Constant(second.type, [16] * LANES))
                values = builder.bitcast(builder.or_(values, second), VECTOR)
            at = builder.mul(step, ir.Constant(_I64, BLOCK_COLUMNS))
            store_lanes(builder, values, builder.gep(weights_at, [at]), weights.dtype)
        results = (builder.load(largest), builder.load(sums), shrink)
        for place, result in zip(places, results, strict=True):
            store_lanes(builder, result, place, types.float32)
        return context.get_dummy_value()

    numbers = (types.int64, types.int64, types.float32)
    return types.void(_FLOATS, *numbers, _FLOATS, weights), generate


@intrinsic
def soften_one(typing_context: Any, scores: Any, count: Any, scale: Any) -> Any:
    """The scores of one query, a multiple of LANES, to weights in place; returns their sum.

    Scores are scaled after the largest is taken from them.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, count, scale = arguments
        zero, step = ir.Constant(_I64, 0), ir.Constant(_I64, LANES)
        largest, sums = (cgutils.alloca_once(builder, VECTOR) for _ in range(2))
        builder.store(constant(NO_SCORE), largest)
        builder.store(constant(0.0), sums)
        with cgutils.for_range_slice(builder, zero, count, step, _I64) as (at, _):
            score = load_one(builder, scores, at, types.float32)[0]
            is_larger = builder.fcmp_ordered(">", score, builder.load(largest))
            builder.store(builder.select(is_larger, score, builder.load(largest)), largest)
        first = builder.load(largest)
        lanes = [builder.extract_element(first, ir.Constant(_I32, i)) for i in range(LANES)]
        top = lanes[0]
        for lane in lanes[1:]:
            top = builder.select(builder.fcmp_ordered(">", lane, top), lane, top)
        top, factor = spread(builder, top), spread(builder, scale)
        with cgutils.for_range_slice(builder, zero, count, step, _I64) as (at, _):
            score = builder.fsub(load_one(builder, scores, at, types.float32)[0], top)
            weight = exponential(builder, builder.fmul(score, factor))
            store_lanes(builder, weight, builder.gep(scores, [at]), types.float32)
            builder.store(builder.fadd(builder.load(sums), weight), sums)
        return lane_sum(builder, builder.load(sums))

    return types.float32(_FLOATS, types.int64, types.float32), generate


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
