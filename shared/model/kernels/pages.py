"""Attention of one new token per sequence, read straight from the pages of the KV cache.

In: an argument block with addresses of queries, cache, block tables and lengths. Out: float32 sums
rounded to the cache's format. One piece of work is one sequence and one KV head with all query
heads that share it: a key is read, and turned over so that vectors hold one value of many keys,
once for all of them. A piece's result does not depend on the rest of the batch. Softmax is exact
over the whole context: scores first, then their weighted sum of values.

Where the processor has bfloat16 instructions, pairs of neighbours in a query and a key are
multiplied as they are; such memory is counted in words (`uint32`). Weights stay float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite.binding import initialize_native_asmparser
from numba import carray, float32, int64, njit, uint16, uint32

from shared.model.kernels.blocks import BLOCK_COLUMNS, multiply_rows, transpose
from shared.model.kernels.lanes import LANES
from shared.model.kernels.machine_code import compiled
from shared.model.kernels.online import NO_SCORE, copy_lanes, soften_one
from shared.model.kernels.vector import (
    load_value,
    num_in,
    offset,
    pointer_to,
    request,
    store_value,
    take_next,
    viewed,
)

initialize_native_asmparser()  # some instructions are written as assembly

# Positions in the argument block. Strides count values.
(
    NEXT,
    SEQS,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    BLOCK_SIZE,
    TABLE_STRIDE,
    WINDOW,
    Q,
    Q_STRIDE,
    KEYS,
    VALUES,
    TABLES,
    CONTEXTS,
    OUT,
) = range(15)
NUM_ARGUMENTS = 15

GROUP_KEYS = BLOCK_COLUMNS
"""Keys side by side in vectors. Groups begin at fixed places of a context."""

LINE_VALUES = 16
"""float32 values, or pairs, in a cache line; of bfloat16 there are twice as many."""


@njit
def _whole(count: int) -> int:
    """So many values or more, in whole groups."""
    return (count + GROUP_KEYS - 1) // GROUP_KEYS * GROUP_KEYS


@njit
def _find(a: Any, table: Any, start: int, stop: int, slots: Any) -> None:
    """The slots of tokens `start .. stop`, one behind the other."""
    token = start
    while token < stop:
        block, within = token // a[BLOCK_SIZE], token % a[BLOCK_SIZE]
        count = min(a[BLOCK_SIZE] - within, stop - token)
        for i in range(count):
            slots[token - start + i] = table[block] * a[BLOCK_SIZE] + within + i
        token += count


@njit
def _read(
    cache: Any, apart: int, depth: int, slots: Any, first: int, stop: int, rows: Any, stride: int
) -> None:
    """Keys or values `first .. first + GROUP_KEYS` of a head into `rows`, in their format.

    Each is `depth` long and `apart` from the next slot's. From `stop` on there are zeros: whatever
    lay there must not meet even a weight of nothing.
    """
    for i in range(first, min(first + GROUP_KEYS, stop)):
        if i + GROUP_KEYS < stop:
            later = offset(cache, slots[i + GROUP_KEYS] * apart)
            for d in range(0, depth, LINE_VALUES):
                request(offset(later, d))
        source, row = offset(cache, slots[i] * apart), offset(rows, (i - first) * stride)
        for d in range(0, depth, LANES):
            copy_lanes(offset(source, d), offset(row, d))
    for i in range(stop, first + GROUP_KEYS):
        row = viewed(offset(rows, (i - first) * stride), pointer_to(int64(0), float32))
        for d in range(stride):
            store_value(row, d, np.float32(0.0))


@njit
def _turn_over(rows: Any, depth: int, panel: Any) -> None:
    """Keys `[GROUP_KEYS, depth]` as `[depth, GROUP_KEYS]`."""
    for half in range(0, GROUP_KEYS, LANES):
        for d in range(0, depth, LANES):
            source = offset(rows, half * depth + d)
            target = offset(panel, d * GROUP_KEYS + half)
            transpose(source, depth, LANES - 1, target, GROUP_KEYS)


@njit
def _multiply(
    rows: Any,
    stride: int,
    num_rows: int,
    columns: Any,
    apart: int,
    depth: int,
    sums: Any,
    sums_stride: int,
    goes_on: int,
) -> None:
    """`multiply_rows` of any number of rows with `GROUP_KEYS` columns."""
    row = 0
    while row < num_rows:
        at, to = offset(rows, row * stride), offset(sums, row * sums_stride)
        if row + 4 <= num_rows:
            multiply_rows(at, stride, 4, columns, apart, depth, to, sums_stride, goes_on)
            row += 4
        elif row + 2 <= num_rows:
            multiply_rows(at, stride, 2, columns, apart, depth, to, sums_stride, goes_on)
            row += 2
        else:
            multiply_rows(at, stride, 1, columns, apart, depth, to, sums_stride, goes_on)
            row += 1


@njit
def _score(a: Any, q: Any, keys: Any, slots: Any, count: int, scores: Any, free: Any) -> None:
    """Unscaled products of a group's queries with `count` keys, one query's after another's."""
    group, depth = a[HEADS] // a[KV_HEADS], a[HEAD_DIM] // num_in(q)
    rows, panel = free, offset(free, GROUP_KEYS * depth)
    for first in range(0, count, GROUP_KEYS):
        _read(keys, a[KV_HEADS] * depth, depth, slots, first, count, rows, depth)
        _turn_over(rows, depth, panel)
        place = offset(scores, first)
        _multiply(q, depth, group, panel, GROUP_KEYS, depth, place, _whole(count), 0)


@njit
def _soften(a: Any, num_unseen: int, count: int, scores: Any, totals: Any) -> None:
    """Scores to unnormalised weights, in place, and their sums."""
    scale, stride = np.float32(1.0 / np.sqrt(a[HEAD_DIM])), _whole(count)
    for head in range(a[HEADS] // a[KV_HEADS]):
        own = offset(scores, head * stride)
        for at in range(num_unseen):
            store_value(own, at, np.float32(NO_SCORE))
        for at in range(count, stride):
            store_value(own, at, np.float32(NO_SCORE))
        store_value(totals, head, soften_one(own, stride, scale))


@njit
def _sum_up(
    a: Any, weights: Any, values: Any, slots: Any, count: int, sums: Any, rows: Any
) -> None:
    """A group's sums of `count` values by weight, `[group, whole head_dim]`."""
    group, width = a[HEADS] // a[KV_HEADS], a[HEAD_DIM]
    wide, stride = _whole(width), _whole(count)
    for first in range(0, count, GROUP_KEYS):
        _read(values, a[KV_HEADS] * width, width, slots, first, count, rows, wide)
        own = offset(weights, first)
        for d in range(0, wide, GROUP_KEYS):
            columns, place = offset(rows, d), offset(sums, d)
            # The first sums begin from nothing.
            _multiply(own, stride, group, columns, wide, GROUP_KEYS, place, wide, first)


@njit
def _attend(a: Any, counter: Any, q: Any, keys: Any, values: Any, out: Any, words: Any) -> None:
    """`words` points to what products of queries and keys are taken of: words, or float32."""
    width, heads, kv_heads = a[HEAD_DIM], a[HEADS], a[KV_HEADS]
    group, depth, wide = heads // kv_heads, width // num_in(words), _whole(width)
    contexts = carray(pointer_to(a[CONTEXTS], int64), a[SEQS])
    tables = carray(pointer_to(a[TABLES], int64), (a[SEQS], a[TABLE_STRIDE]))
    longest = contexts.max() + GROUP_KEYS
    slots, score_array = np.empty(longest, np.int64), np.empty(group * _whole(longest), np.float32)
    room = np.zeros(
        (group + 2 * GROUP_KEYS) * depth + (group + GROUP_KEYS) * wide + group, np.float32
    )
    scores = pointer_to(score_array.ctypes.data, float32)
    queries = viewed(pointer_to(room.ctypes.data, float32), words)
    free = offset(queries, group * depth)
    rows = viewed(offset(free, 2 * GROUP_KEYS * depth), scores)
    sums = offset(rows, GROUP_KEYS * wide)
    totals = offset(sums, group * wide)
    while True:
        piece = take_next(counter)
        if piece >= a[SEQS] * kv_heads:
            return
        seq, kv_head = piece // kv_heads, piece % kv_heads
        stop = contexts[seq]
        first = max(int64(0), stop - a[WINDOW]) if a[WINDOW] > 0 else int64(0)
        start = first // GROUP_KEYS * GROUP_KEYS
        count = stop - start
        _find(a, tables[seq], start, stop, slots)
        own = offset(q, (seq * a[Q_STRIDE] + kv_head * group * width) // num_in(q))
        for at in range(0, group * depth, LANES):
            copy_lanes(offset(own, at), offset(queries, at))
        _score(a, queries, offset(keys, kv_head * depth), slots, count, scores, free)
        _soften(a, first - start, count, scores, totals)
        _sum_up(a, scores, offset(values, kv_head * width), slots, count, sums, rows)
        for head in range(group):
            total, at = load_value(totals, head), (seq * heads + kv_head * group + head) * width
            for d in range(width):
                store_value(out, at + d, load_value(sums, head * wide + d) / total)


@compiled
def attend_bf16(arguments: Any) -> None:
    """bfloat16 queries, cache and result; products of float32."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], uint16), pointer_to(a[OUT], uint16)
    keys, values = pointer_to(a[KEYS], uint16), pointer_to(a[VALUES], uint16)
    _attend(a, arguments, q, keys, values, out, pointer_to(a[Q], float32))


@compiled
def attend_pairs(arguments: Any) -> None:
    """bfloat16 queries, cache and result; products of pairs. Needs a multiple of `PAIRED_WIDTH`."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], uint32), pointer_to(a[OUT], uint16)
    keys, values = pointer_to(a[KEYS], uint32), pointer_to(a[VALUES], uint16)
    _attend(a, arguments, q, keys, values, out, q)


@compiled
def attend_float32(arguments: Any) -> None:
    """float32 queries, cache and result."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], float32), pointer_to(a[OUT], float32)
    _attend(a, arguments, q, pointer_to(a[KEYS], float32), pointer_to(a[VALUES], float32), out, q)
