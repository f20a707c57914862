"""Attention of many new tokens, read straight from the pages of the KV cache.

In: an argument block with addresses of queries, cache, block tables and what each token sees. Out:
rows in the cache's format. One piece of work is a few tokens of one sequence with all heads that
share a KV head: a group of keys is arranged once for all of them, and only keys that one of them
sees are read. Groups begin at fixed places of a context, so a token's result does not depend on the
rest of the batch, nor on the steps in which a prompt is computed.

Where the processor has bfloat16 instructions, pairs of bfloat16 values are multiplied as they are:
of neighbours in a query and a key, and of two keys' weights and values. Sums stay float32. Such
memory is counted in words (`uint32`), all other arranged memory holds float32.

Source: Dao et al. 2022 (FlashAttention, algorithm 1), queries and keys in exchanged roles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite.binding import initialize_native_asmparser
from numba import carray, float32, int64, njit, uint16, uint32

from shared.model.kernels.blocks import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    lay_beside,
    multiply_block,
    transpose,
)
from shared.model.kernels.lanes import LANES
from shared.model.kernels.machine_code import compiled
from shared.model.kernels.online import (
    FACTOR,
    HIGH,
    LARGEST,
    LOW,
    NO_SCORE,
    STATE_VALUES,
    TOTAL,
    copy_lanes,
    multiply_lanes,
    soften,
)
from shared.model.kernels.prompt_layout import (
    BLOCK_SIZE,
    GROUP_KEYS,
    HEAD_DIM,
    HEADS,
    KEYS,
    KV_HEADS,
    MEMBERS,
    NUM_ARGUMENTS,
    NUM_PIECES,
    OUT,
    PIECES,
    PLACES,
    Q_STRIDE,
    SCRATCH,
    SCRATCH_STRIDE,
    STOPS,
    TABLE_STRIDE,
    TABLES,
    VALUE_PANEL,
    VALUES,
    WINDOW,
    Q,
    block_values,
    key_panel,
    num_blocks_of,
    num_value_panels,
    row_values,
    shared_values,
)
from shared.model.kernels.vector import (
    load_value,
    num_in,
    offset,
    pointer_to,
    store_value,
    take_next,
    viewed,
)

initialize_native_asmparser()  # some instructions are written as assembly


@njit
def _block_at(group: int, num_rows: int, block: int) -> Any:
    """First row and head of a block, counted within its piece, its size, and rows between lanes."""
    if num_rows < group:
        per_row = (group + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
        head = block % per_row * BLOCK_COLUMNS
        return block // per_row, head, min(BLOCK_COLUMNS, group - head), 0
    per_head = (num_rows + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = block % per_head * BLOCK_COLUMNS
    return row, block // per_head, min(BLOCK_COLUMNS, num_rows - row), 1


@njit
def _begin(
    a: Any, q: Any, first_row: int, num_rows: int, kv_head: int, block: int, place: Any, words: Any
) -> None:
    """Arrange a block's queries and note which keys each of them sees."""
    width, group = a[HEAD_DIM], a[HEADS] // a[KV_HEADS]
    row, head, size, step = _block_at(group, num_rows, block)
    row, head = first_row + row, kv_head * group + head
    depth, stride = width // num_in(q), (a[Q_STRIDE] if step else width) // num_in(q)
    start = offset(q, row * (a[Q_STRIDE] // num_in(q)) + head * depth)
    for half in range(0, BLOCK_COLUMNS, LANES):
        first = min(half, size - 1)
        for k in range(0, depth, LANES):
            source = offset(start, first * stride + k)
            target = offset(viewed(place, words), k * BLOCK_COLUMNS + half)
            transpose(source, stride, size - 1 - first, target, BLOCK_COLUMNS)
    state = offset(place, block_values(width) - STATE_VALUES)
    for at in range(width * BLOCK_COLUMNS, block_values(width)):
        store_value(place, at, np.float32(0.0))
    places, stops = pointer_to(a[PLACES], int64), pointer_to(a[STOPS], int64)
    for lane in range(BLOCK_COLUMNS):
        seen = row + min(lane, size - 1) * step
        low = max(int64(0), places[seen] - a[WINDOW] + 1) if a[WINDOW] > 0 else int64(0)
        store_value(state, LARGEST + lane, np.float32(NO_SCORE))
        store_value(state, LOW + lane, np.float32(low))
        store_value(state, HIGH + lane, np.float32(stops[seen]))


@njit
def _range(state: Any) -> Any:
    """The keys that a block's queries see together."""
    low, high = load_value(state, LOW), load_value(state, HIGH)
    for lane in range(1, BLOCK_COLUMNS):
        low = min(low, load_value(state, LOW + lane))
        high = max(high, load_value(state, HIGH + lane))
    return int64(low), int64(high)


@njit
def _read(a: Any, cache: Any, table: Any, kv_head: int, first: int, stop: int, rows: Any) -> None:
    """Keys or values `first .. first + GROUP_KEYS` as rows of float32 or words, as `rows` has it;
    zeros from `stop` on."""
    depth, block_size = a[HEAD_DIM] // num_in(cache), a[BLOCK_SIZE]
    for i in range(GROUP_KEYS):
        token, row = first + i, offset(rows, i * row_values(depth))
        if token >= stop:
            zeros = viewed(row, pointer_to(a[SCRATCH], float32))
            for d in range(row_values(depth)):
                store_value(zeros, d, np.float32(0.0))
            continue
        slot = table[token // block_size] * block_size + token % block_size
        source = offset(cache, (slot * a[KV_HEADS] + kv_head) * depth)
        for d in range(0, depth, LANES):
            copy_lanes(offset(source, d), offset(row, d))


@njit
def _arrange_keys(width: int, rows: Any, panels: Any) -> None:
    depth = width // num_in(rows)
    for panel in range(GROUP_KEYS // BLOCK_ROWS):
        source = offset(rows, panel * BLOCK_ROWS * row_values(depth))
        target = offset(panels, panel * key_panel(depth))
        for k in range(0, depth, LANES):
            place = offset(target, k * BLOCK_ROWS)
            transpose(offset(source, k), row_values(depth), BLOCK_ROWS - 1, place, BLOCK_ROWS)


@njit
def _arrange_values(width: int, rows: Any, panels: Any) -> None:
    """Unlike in a key's, in a value's row neighbours do not meet: two rows' values do."""
    stride = row_values(width // num_in(rows))
    for step in range(GROUP_KEYS // num_in(rows)):
        for panel in range(num_value_panels(width)):
            source = offset(rows, step * num_in(rows) * stride + panel * BLOCK_ROWS // num_in(rows))
            lay_beside(source, stride, offset(panels, panel * VALUE_PANEL + step * BLOCK_ROWS))


@njit
def _meet(a: Any, keys: Any, values: Any, scores: Any, first: int, place: Any) -> None:
    """A block of queries with a group of keys."""
    width, depth = a[HEAD_DIM], a[HEAD_DIM] // num_in(keys)
    num_sums = BLOCK_ROWS * BLOCK_COLUMNS
    queries, weights = viewed(place, keys), viewed(scores, keys)
    for panel in range(GROUP_KEYS // BLOCK_ROWS):
        row = offset(keys, panel * key_panel(depth))
        multiply_block(row, queries, depth, offset(scores, panel * num_sums), 0)
    sums = offset(place, width * BLOCK_COLUMNS)
    state = offset(place, block_values(width) - STATE_VALUES)
    scale = np.float32(1.0 / np.sqrt(width))
    for half in range(0, BLOCK_COLUMNS, LANES):
        at, target = offset(scores, half), offset(weights, half)
        soften(at, GROUP_KEYS, first, scale, offset(state, half), target)
        for d in range(width):
            at = offset(sums, d * BLOCK_COLUMNS + half)
            multiply_lanes(at, offset(state, FACTOR + half))
    for panel in range(num_value_panels(width)):
        row = offset(values, panel * VALUE_PANEL)
        at = offset(sums, panel * num_sums)
        multiply_block(row, weights, GROUP_KEYS // num_in(keys), at, 1)


@njit
def _finish(
    a: Any, first_row: int, num_rows: int, kv_head: int, block: int, place: Any, rows: Any, out: Any
) -> None:
    """A block's sums over their weights into the result; `rows` is free memory."""
    width, group = a[HEAD_DIM], a[HEADS] // a[KV_HEADS]
    sums = offset(place, width * BLOCK_COLUMNS)
    state = offset(place, block_values(width) - STATE_VALUES)
    for lane in range(BLOCK_COLUMNS):
        share = np.float32(1.0) / load_value(state, TOTAL + lane)
        store_value(state, FACTOR + lane, share)
    for half in range(0, BLOCK_COLUMNS, LANES):
        for d in range(width):
            at = offset(sums, d * BLOCK_COLUMNS + half)
            multiply_lanes(at, offset(state, FACTOR + half))
        for d in range(0, width, LANES):
            at = offset(sums, d * BLOCK_COLUMNS + half)
            transpose(at, BLOCK_COLUMNS, LANES - 1, offset(rows, half * width + d), width)
    row, head, size, step = _block_at(group, num_rows, block)
    start = ((first_row + row) * a[HEADS] + kv_head * group + head) * width
    stride = a[HEADS] * width if step else width
    for lane in range(size):
        for d in range(0, width, LANES):
            target = offset(out, start + lane * stride + d)
            copy_lanes(offset(rows, lane * width + d), target)


@njit
def _attend(a: Any, counter: Any, q: Any, out: Any, memory: Any) -> None:
    """`memory` is the scratch memory, typed as what is arranged: float32, or words for pairs."""
    width, group = a[HEAD_DIM], a[HEADS] // a[KV_HEADS]
    member = take_next(offset(counter, MEMBERS))
    rows = offset(memory, member * a[SCRATCH_STRIDE])
    free = viewed(rows, pointer_to(a[SCRATCH], float32))
    keys = viewed(pointer_to(a[KEYS], float32), q)
    values = viewed(pointer_to(a[VALUES], float32), q)
    scores = offset(free, GROUP_KEYS * row_values(width))
    key_panels = offset(rows, GROUP_KEYS * (row_values(width) + BLOCK_COLUMNS))
    value_panels = offset(key_panels, GROUP_KEYS // BLOCK_ROWS * key_panel(width))
    blocks, room = offset(free, shared_values(width)), block_values(width)
    pieces, tables = pointer_to(a[PIECES], int64), pointer_to(a[TABLES], int64)
    while True:
        item = take_next(counter)
        if item >= a[NUM_PIECES] * a[KV_HEADS]:
            return
        piece, kv_head = item // a[KV_HEADS], item % a[KV_HEADS]
        seq, first_row, num_rows = pieces[3 * piece], pieces[3 * piece + 1], pieces[3 * piece + 2]
        table = offset(tables, seq * a[TABLE_STRIDE])
        low, stop = int64(1) << 62, int64(0)
        for block in range(num_blocks_of(group, num_rows)):
            place = offset(blocks, block * room)
            _begin(a, q, first_row, num_rows, kv_head, block, place, rows)
            first, last = _range(offset(place, room - STATE_VALUES))
            low, stop = min(low, first), max(stop, last)
        for start in range(low // GROUP_KEYS * GROUP_KEYS, stop, GROUP_KEYS):
            _read(a, keys, table, kv_head, start, stop, rows)
            _arrange_keys(width, rows, key_panels)
            _read(a, values, table, kv_head, start, stop, rows)
            _arrange_values(width, rows, value_panels)
            for block in range(num_blocks_of(group, num_rows)):
                place = offset(blocks, block * room)
                first, last = _range(offset(place, room - STATE_VALUES))
                if first < start + GROUP_KEYS and start < last:
                    _meet(a, key_panels, value_panels, scores, start, place)
        for block in range(num_blocks_of(group, num_rows)):
            place = offset(blocks, block * room)
            _finish(a, first_row, num_rows, kv_head, block, place, free, out)


@compiled
def attend_prompts_bf16(arguments: Any) -> None:
    """bfloat16 queries, cache and result; products of float32."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], uint16), pointer_to(a[OUT], uint16)
    _attend(a, arguments, q, out, pointer_to(a[SCRATCH], float32))


@compiled
def attend_prompts_pairs(arguments: Any) -> None:
    """bfloat16 queries, cache and result; products of pairs. Needs a multiple of `PAIRED_WIDTH`."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], uint32), pointer_to(a[OUT], uint16)
    _attend(a, arguments, q, out, pointer_to(a[SCRATCH], uint32))


@compiled
def attend_prompts_float32(arguments: Any) -> None:
    """float32 queries, cache and result."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], float32), pointer_to(a[OUT], float32)
    _attend(a, arguments, q, out, pointer_to(a[SCRATCH], float32))
