"""Attention of many new tokens, read straight from the pages of the KV cache.

In: an argument block with addresses of queries, cache, block tables and what each token sees. Out:
rows in the cache's format. One piece of work is a few tokens of one sequence with all heads that
share a KV head: a group of keys is arranged once for all of them, and only keys that one of them
sees are read. Groups begin at fixed places of a context, so a token's result does not depend on the
rest of the batch, nor on the steps in which a prompt is computed.

Source: Dao et al. 2022 (FlashAttention, algorithm 1), queries and keys in exchanged roles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, float32, int64, njit, uint16
from numba.extending import register_jitable

from shared.model.kernels.blocks import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
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
from shared.model.kernels.vector import load_value, offset, pointer_to, store_value, take_next

# Positions in the argument block. Strides count values. `PIECES` are sequence, first row and number
# of rows; `PLACES` and `STOPS` say for each row its place in its context and how far it sees.
(
    NEXT,
    MEMBERS,
    NUM_PIECES,
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
    PIECES,
    PLACES,
    STOPS,
    OUT,
    SCRATCH,
    SCRATCH_STRIDE,
) = range(20)
NUM_ARGUMENTS = 20

GROUP_KEYS = 8 * BLOCK_ROWS
"""Keys that are arranged and met at a time."""


@register_jitable
def _row_values(width: int) -> int:
    """Room for one key or value, with what the last vector of a panel reads beyond it."""
    return width + LANES


@register_jitable
def _key_panel(width: int) -> int:
    return width * BLOCK_ROWS + LANES


@register_jitable
def _num_value_panels(width: int) -> int:
    return (width + BLOCK_ROWS - 1) // BLOCK_ROWS


VALUE_PANEL = GROUP_KEYS * BLOCK_ROWS + LANES


@register_jitable
def _block_values(width: int) -> int:
    """Room for a block of queries: themselves, their sums and their state."""
    sums: int = _num_value_panels(width) * BLOCK_ROWS
    return (width + sums) * BLOCK_COLUMNS + STATE_VALUES


@register_jitable
def _shared_values(width: int) -> int:
    """Room for a group of keys and values, and for the scores of one block."""
    keys: int = GROUP_KEYS // BLOCK_ROWS * _key_panel(width)
    values: int = _num_value_panels(width) * VALUE_PANEL
    rows: int = GROUP_KEYS * _row_values(width)
    return rows + GROUP_KEYS * BLOCK_COLUMNS + keys + values


def scratch_values(width: int, num_blocks: int) -> int:
    """Room that each thread needs for pieces of up to `num_blocks` blocks of queries."""
    return int(_shared_values(width) + num_blocks * _block_values(width))


@register_jitable
def num_blocks_of(group: int, num_rows: int) -> int:
    """Blocks of a piece: rows of one head side by side, or heads of one row if those are more."""
    if num_rows < group:
        return num_rows * ((group + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS)
    return group * ((num_rows + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS)


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
    a: Any, q: Any, first_row: int, num_rows: int, kv_head: int, block: int, place: Any
) -> None:
    """Arrange a block's queries and note which keys each of them sees."""
    width, group = a[HEAD_DIM], a[HEADS] // a[KV_HEADS]
    row, head, size, step = _block_at(group, num_rows, block)
    row, head = first_row + row, kv_head * group + head
    stride = a[Q_STRIDE] if step else width
    start = offset(q, row * a[Q_STRIDE] + head * width)
    for half in range(0, BLOCK_COLUMNS, LANES):
        first = min(half, size - 1)
        for k in range(0, width, LANES):
            source = offset(start, first * stride + k)
            target = offset(place, k * BLOCK_COLUMNS + half)
            transpose(source, stride, size - 1 - first, target, BLOCK_COLUMNS)
    state = offset(place, _block_values(width) - STATE_VALUES)
    for at in range(width * BLOCK_COLUMNS, _block_values(width)):
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
    """Keys or values `first .. first + GROUP_KEYS` as float32 rows; zeros from `stop` on."""
    width, block_size = a[HEAD_DIM], a[BLOCK_SIZE]
    for i in range(GROUP_KEYS):
        token, row = first + i, offset(rows, i * _row_values(width))
        if token >= stop:
            for d in range(_row_values(width)):
                store_value(row, d, np.float32(0.0))
            continue
        slot = table[token // block_size] * block_size + token % block_size
        source = offset(cache, (slot * a[KV_HEADS] + kv_head) * width)
        for d in range(0, width, LANES):
            copy_lanes(offset(source, d), offset(row, d))


@njit
def _arrange_keys(width: int, rows: Any, panels: Any) -> None:
    for panel in range(GROUP_KEYS // BLOCK_ROWS):
        source = offset(rows, panel * BLOCK_ROWS * _row_values(width))
        target = offset(panels, panel * _key_panel(width))
        for k in range(0, width, LANES):
            place = offset(target, k * BLOCK_ROWS)
            transpose(offset(source, k), _row_values(width), BLOCK_ROWS - 1, place, BLOCK_ROWS)


@njit
def _arrange_values(width: int, rows: Any, panels: Any) -> None:
    for key in range(GROUP_KEYS):
        for panel in range(_num_value_panels(width)):
            source = offset(rows, key * _row_values(width) + panel * BLOCK_ROWS)
            copy_lanes(source, offset(panels, panel * VALUE_PANEL + key * BLOCK_ROWS))


@njit
def _meet(a: Any, keys: Any, values: Any, scores: Any, first: int, place: Any) -> None:
    """A block of queries with a group of keys."""
    width = a[HEAD_DIM]
    block_values = BLOCK_ROWS * BLOCK_COLUMNS
    for panel in range(GROUP_KEYS // BLOCK_ROWS):
        row = offset(keys, panel * _key_panel(width))
        multiply_block(row, place, width, offset(scores, panel * block_values), 0)
    sums = offset(place, width * BLOCK_COLUMNS)
    state = offset(place, _block_values(width) - STATE_VALUES)
    scale = np.float32(1.0 / np.sqrt(width))
    for half in range(0, BLOCK_COLUMNS, LANES):
        soften(offset(scores, half), GROUP_KEYS, first, scale, offset(state, half))
        for d in range(width):
            at = offset(sums, d * BLOCK_COLUMNS + half)
            multiply_lanes(at, offset(state, FACTOR + half))
    for panel in range(_num_value_panels(width)):
        row = offset(values, panel * VALUE_PANEL)
        multiply_block(row, scores, GROUP_KEYS, offset(sums, panel * block_values), 1)


@njit
def _finish(
    a: Any, first_row: int, num_rows: int, kv_head: int, block: int, place: Any, rows: Any, out: Any
) -> None:
    """A block's sums over their weights into the result; `rows` is free memory."""
    width, group = a[HEAD_DIM], a[HEADS] // a[KV_HEADS]
    sums = offset(place, width * BLOCK_COLUMNS)
    state = offset(place, _block_values(width) - STATE_VALUES)
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
def _attend(a: Any, counter: Any, q: Any, keys: Any, values: Any, out: Any) -> None:
    width, group = a[HEAD_DIM], a[HEADS] // a[KV_HEADS]
    member = take_next(offset(counter, MEMBERS))
    rows = offset(pointer_to(a[SCRATCH], float32), member * a[SCRATCH_STRIDE])
    scores = offset(rows, GROUP_KEYS * _row_values(width))
    key_panels = offset(scores, GROUP_KEYS * BLOCK_COLUMNS)
    value_panels = offset(key_panels, GROUP_KEYS // BLOCK_ROWS * _key_panel(width))
    blocks, block_values = offset(rows, _shared_values(width)), _block_values(width)
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
            place = offset(blocks, block * block_values)
            _begin(a, q, first_row, num_rows, kv_head, block, place)
            first, last = _range(offset(place, block_values - STATE_VALUES))
            low, stop = min(low, first), max(stop, last)
        for start in range(low // GROUP_KEYS * GROUP_KEYS, stop, GROUP_KEYS):
            _read(a, keys, table, kv_head, start, stop, rows)
            _arrange_keys(width, rows, key_panels)
            _read(a, values, table, kv_head, start, stop, rows)
            _arrange_values(width, rows, value_panels)
            for block in range(num_blocks_of(group, num_rows)):
                place = offset(blocks, block * block_values)
                first, last = _range(offset(place, block_values - STATE_VALUES))
                if first < start + GROUP_KEYS and start < last:
                    _meet(a, key_panels, value_panels, scores, start, place)
        for block in range(num_blocks_of(group, num_rows)):
            place = offset(blocks, block * block_values)
            _finish(a, first_row, num_rows, kv_head, block, place, rows, out)


@compiled
def attend_prompts_bf16(arguments: Any) -> None:
    """bfloat16 queries, cache and result."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], uint16), pointer_to(a[OUT], uint16)
    _attend(a, arguments, q, pointer_to(a[KEYS], uint16), pointer_to(a[VALUES], uint16), out)


@compiled
def attend_prompts_float32(arguments: Any) -> None:
    """float32 queries, cache and result."""
    a = carray(arguments, NUM_ARGUMENTS)
    q, out = pointer_to(a[Q], float32), pointer_to(a[OUT], float32)
    _attend(a, arguments, q, pointer_to(a[KEYS], float32), pointer_to(a[VALUES], float32), out)
