"""Attention of one new token per sequence, read straight from the pages of the KV cache.

In: an argument block with addresses of queries, cache, block tables and lengths. Out: float32 sums
rounded to the cache's format. One piece of work is one sequence and one KV head; its result does
not depend on the rest of the batch. Softmax is exact over the whole context: scores first, then
their weighted sum of values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, float32, int64, njit, uint16

from shared.model.kernels.lanes import LANES
from shared.model.kernels.machine_code import compiled
from shared.model.kernels.online import NO_SCORE, add_weighted, soften_one
from shared.model.kernels.vector import (
    dot_tile,
    offset,
    pointer_to,
    store_value,
    take_next,
)

# Positions in the argument block. Strides count values.
(
    NEXT,
    SEQS,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    BLOCK_SIZE,
    TABLE_STRIDE,
    MAX_CONTEXT,
    WINDOW,
    Q,
    Q_STRIDE,
    KEYS,
    VALUES,
    TABLES,
    CONTEXTS,
    OUT,
) = range(16)
NUM_ARGUMENTS = 16


@njit
def _scores(a: Any, q: Any, keys: Any, table: Any, first: int, stop: int, scores: Any) -> None:
    """Unscaled products of one query with tokens `first .. stop` into `scores[0 ..]`."""
    block_size, width = a[BLOCK_SIZE], a[HEAD_DIM]
    stride = a[KV_HEADS] * width
    token = first
    while token < stop:
        within = token % block_size
        count = min(block_size - within, stop - token)
        at = offset(keys, (table[token // block_size] * block_size + within) * stride)
        done = 0
        while done < count:
            place = offset(scores, token - first + done)
            row = offset(at, done * stride)
            if done + 4 <= count:
                dot_tile(q, 0, 1, row, stride, 4, width, 4 * stride, place)
                done += 4
            else:
                dot_tile(q, 0, 1, row, stride, 1, width, stride, place)
                done += 1
        token += count


@njit
def _softmax(scores: Any, place: Any, count: int, scale: Any) -> Any:
    """Scores to unnormalised weights, in place; returns their sum."""
    whole = (count + LANES - 1) // LANES * LANES
    for i in range(count, whole):
        scores[i] = NO_SCORE
    return soften_one(place, whole, scale)


@njit
def _weighted_sum(
    a: Any, values: Any, table: Any, first: int, stop: int, weights: Any, sums: Any
) -> None:
    block_size, width = a[BLOCK_SIZE], a[HEAD_DIM]
    stride = a[KV_HEADS] * width
    token = first
    while token < stop:
        within = token % block_size
        count = min(block_size - within, stop - token)
        at = offset(values, (table[token // block_size] * block_size + within) * stride)
        done = 0
        while done < count:
            place = offset(weights, token - first + done)
            row = offset(at, done * stride)
            if done + 4 <= count:
                add_weighted(row, stride, 4, place, width, sums)
                done += 4
            else:
                add_weighted(row, stride, 1, place, width, sums)
                done += 1
        token += count


@njit
def _attend(a: Any, counter: Any, q: Any, keys: Any, values: Any, out: Any) -> None:
    width, heads, kv_heads = a[HEAD_DIM], a[HEADS], a[KV_HEADS]
    group = heads // kv_heads
    scale = np.float32(1.0 / np.sqrt(width))
    contexts = carray(pointer_to(a[CONTEXTS], int64), a[SEQS])
    tables = carray(pointer_to(a[TABLES], int64), (a[SEQS], a[TABLE_STRIDE]))
    scores = np.empty(a[MAX_CONTEXT] + LANES, np.float32)
    sums = np.empty(width, np.float32)
    scores_at = pointer_to(scores.ctypes.data, float32)
    sums_at = pointer_to(sums.ctypes.data, float32)
    while True:
        piece = take_next(counter)
        if piece >= a[SEQS] * kv_heads:
            return
        seq, kv_head = piece // kv_heads, piece % kv_heads
        stop = contexts[seq]
        first = max(int64(0), stop - a[WINDOW]) if a[WINDOW] > 0 else int64(0)
        k, v = offset(keys, kv_head * width), offset(values, kv_head * width)
        for member in range(group):
            head = kv_head * group + member
            query = offset(q, seq * a[Q_STRIDE] + head * width)
            _scores(a, query, k, tables[seq], first, stop, scores_at)
            total = _softmax(scores, scores_at, stop - first, scale)
            sums[:] = np.float32(0.0)
            _weighted_sum(a, v, tables[seq], first, stop, scores_at, sums_at)
            for d in range(width):
                store_value(out, (seq * heads + head) * width + d, sums[d] / total)


@compiled
def attend_bf16(arguments: Any) -> None:
    """bfloat16 queries, cache and result."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], uint16), pointer_to(a[OUT], uint16)
    _attend(a, arguments, q, pointer_to(a[KEYS], uint16), pointer_to(a[VALUES], uint16), out)


@compiled
def attend_float32(arguments: Any) -> None:
    """float32 queries, cache and result."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], float32), pointer_to(a[OUT], float32)
    _attend(a, arguments, q, pointer_to(a[KEYS], float32), pointer_to(a[VALUES], float32), out)
