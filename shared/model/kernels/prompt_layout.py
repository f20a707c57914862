"""Memory of the attention of prompts: its argument block, and what each thread arranges where.

In: sizes of heads and blocks. Out: positions and numbers of values. Known to whoever calls the
kernels and to the kernels themselves (`shared/model/kernels/prompts.py`).
"""

from __future__ import annotations

from numba.extending import register_jitable

from shared.model.kernels.blocks import BLOCK_COLUMNS, BLOCK_ROWS
from shared.model.kernels.lanes import LANES
from shared.model.kernels.online import STATE_VALUES

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
def row_values(width: int) -> int:
    """Room for one key or value, with what the last vector of a panel reads beyond it."""
    return width + LANES


@register_jitable
def key_panel(width: int) -> int:
    return width * BLOCK_ROWS + LANES


@register_jitable
def num_value_panels(width: int) -> int:
    return (width + BLOCK_ROWS - 1) // BLOCK_ROWS


VALUE_PANEL = GROUP_KEYS * BLOCK_ROWS + LANES


@register_jitable
def block_values(width: int) -> int:
    """Room for a block of queries: themselves, their sums and their state."""
    sums: int = num_value_panels(width) * BLOCK_ROWS
    return (width + sums) * BLOCK_COLUMNS + STATE_VALUES


@register_jitable
def shared_values(width: int) -> int:
    """Room for a group of keys and values, and for the scores of one block."""
    keys: int = GROUP_KEYS // BLOCK_ROWS * key_panel(width)
    values: int = num_value_panels(width) * VALUE_PANEL
    rows: int = GROUP_KEYS * row_values(width)
    return rows + GROUP_KEYS * BLOCK_COLUMNS + keys + values


def scratch_values(width: int, num_blocks: int) -> int:
    """Room that each thread needs for pieces of up to `num_blocks` blocks of queries."""
    return int(shared_values(width) + num_blocks * block_values(width))


@register_jitable
def num_blocks_of(group: int, num_rows: int) -> int:
    """Blocks of a piece: rows of one head side by side, or heads of one row if those are more."""
    if num_rows < group:
        return num_rows * ((group + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS)
    return group * ((num_rows + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS)
