"""Attention of a tile of queries over paged keys of one sequence: the loop both kernels share.

In: queries of a tile in registers and a range of keys. Out: running maximum, sum and weighted
values (online softmax, Milakov and Gimelshein 2018; tiled as in Dao 2023, FlashAttention-2). Knows
no batch: which rows a tile holds and which keys it reads is its caller's. Scores and their maximum
are kept as the product gives them; `scale` turns them into exponents of 2, whose power is one
instruction.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton import knobs

IS_INTERPRETED = bool(knobs.runtime.interpret)
"""Whether kernels run on the CPU. Triton decides when it is imported."""

LOG2_E = math.log2(math.e)

# Finite, so that the difference of two of them is no NaN.
HIDDEN_SCORE = tl.constexpr(-1.0e30)


def padded_head_dim(head_dim: int) -> int:
    """Tiles have power-of-two sides, and a matrix product needs 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, wide: tl.constexpr) -> tl.tensor:
    """`a @ b` with float32 sums.

    `wide` keeps nearly all bits of float32 factors, by three TF32 products. The interpreter cannot
    multiply bfloat16 matrices, so there everything is wide.
    """
    if wide:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def weigh(
    scores: tl.tensor, maximum: tl.tensor, scale: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Rows' new maximum, the weights of `scores` under it, and what older weights shrink by."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A score's product and difference are one instruction that rounds once. Where a row has seen
    # nothing yet that would leave the rounding error of a huge product, so there nothing is taken
    # off, and its hidden keys weigh nothing.
    offset = tl.where(new_maximum == HIDDEN_SCORE, 0.0, new_maximum * scale)
    weights = tl.exp2(scores * scale - offset[:, None])
    return new_maximum, weights, tl.exp2((maximum - new_maximum) * scale)


@triton.jit
def load_rows(
    base: tl.tensor,
    offsets: tl.tensor,
    is_there: tl.tensor,
    is_whole: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> tl.tensor:
    """`[rows, block_d]`: one head per row, zero behind `head_dim` and where nothing is there.

    `is_whole` promises that every row is there, which spares comparing.
    """
    channel = tl.arange(0, block_d)
    address = base + offsets[:, None] + channel[None, :]
    if is_whole and head_dim == block_d:
        return tl.load(address)
    elif is_whole:
        return tl.load(address, mask=(channel < head_dim)[None, :], other=0.0)
    else:
        mask = is_there[:, None] & (channel < head_dim)[None, :]
        return tl.load(address, mask=mask, other=0.0)


@triton.jit
def attend_keys(
    maximum: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    seen_from: tl.tensor,
    seen_to: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    scale: tl.tensor,
    is_whole: tl.constexpr,
    is_banded: tl.constexpr,
    block_size: tl.constexpr,
    slot_width: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_n: tl.constexpr,
    wide: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Go over keys `start .. stop`; returns the new maximum, sum and weighted values of each row.

    With `is_banded` a row sees keys `seen_from .. seen_to` only, otherwise all. `is_whole` promises
    a multiple of `block_n` keys.
    """
    for first in range(start, stop, block_n):
        token = first + tl.arange(0, block_n)
        is_there = token < stop
        if is_whole:
            page = tl.load(table + token // block_size)
        else:
            page = tl.load(table + token // block_size, mask=is_there, other=0)
        # int64: a large cache has more than 2^31 elements.
        offsets = (page.to(tl.int64) * block_size + token % block_size) * slot_width
        k = load_rows(keys, offsets, is_there, is_whole, head_dim, block_d)
        v = load_rows(values, offsets, is_there, is_whole, head_dim, block_d)
        scores = dot(q, tl.trans(k), wide)
        if not is_whole:
            scores = tl.where(is_there[None, :], scores, HIDDEN_SCORE)
        if is_banded:
            is_seen = token[None, :] >= seen_from[:, None]
            is_seen = is_seen & (token[None, :] < seen_to[:, None])
            scores = tl.where(is_seen, scores, HIDDEN_SCORE)
        maximum, weights, shrink = weigh(scores, maximum, scale)
        total = total * shrink + tl.sum(weights, 1)
        weighted = weighted * shrink[:, None] + dot(weights.to(v.dtype), v, wide)
    return maximum, total, weighted
