"""Attention of one new token per sequence, its context split over the GPU.

In: packed queries, one layer of the paged cache that already holds the new keys and values, and a
split plan. Out: the outputs of all sequences with exactly one new token. Every context is cut into
pieces of the same fixed size, so that a single long one fills the GPU too; a second kernel joins
the pieces (split-KV, Dao et al. 2023, Flash-Decoding). Because the size is fixed, a sequence's
result does not depend on who shares its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shared.model.gpu.overlap import launch_options, wait_for_others
from shared.model.gpu.paging import Paging
from shared.model.gpu.tile import HIDDEN_SCORE, LOG2_E, attend_keys, load_rows, padded_head_dim

SPLIT_TOKENS = 256
KEYS_AT_A_TIME = 64
SPLITS_AT_A_TIME = 8


@dataclass(frozen=True, slots=True, eq=False)
class DecodeSplits:
    """All pieces of all contexts, worked out on the device, and memory for what they give.

    `sequence_ends` `[num_seqs + 1]` int32 bounds each sequence's pieces, `sequence` names the
    sequence of each piece. `partial` `[num_splits, heads, head_dim]` and `weight` (base-2 logarithm
    of the sum of exponentials) `[num_splits, heads]` are float32 and used anew by every layer.
    """

    split_tokens: int
    sequence_ends: torch.Tensor
    sequence: torch.Tensor
    partial: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def plan(
        cls, paging: Paging, num_heads: int, head_dim: int, split_tokens: int = SPLIT_TOKENS
    ) -> DecodeSplits:
        """Cut up the contexts of sequences with one new token; others get no piece."""
        is_decoding = paging.query_starts.diff() == 1
        counts = torch.where(is_decoding, -(-paging.context_lens // split_tokens), 0)
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        num_splits = paging.num_seqs * -(-paging.max_context_len // split_tokens)
        index = torch.arange(num_splits, device=ends.device)
        sequence = torch.searchsorted(ends[1:], index, right=True)
        memory = torch.empty(num_splits, num_heads, head_dim + 1, device=ends.device)
        flat = memory.view(-1)
        num_partial = num_splits * num_heads * head_dim
        return cls(
            split_tokens,
            ends.int(),
            sequence.int(),
            partial=flat[:num_partial].view(num_splits, num_heads, head_dim),
            weight=flat[num_partial:].view(num_splits, num_heads),
        )


def decode_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    cached: torch.Tensor,
    paging: Paging,
    splits: DecodeSplits,
    *,
    window: int,
    wide: bool,
    num_programs: int,
) -> None:
    """Fill the rows of `out` `[num_tokens, heads, head_dim]` of sequences with one new token.

    `cached` is one layer by slot, `[2, num_slots, kv_heads, head_dim]`; with `window` 0 a token
    sees its whole past. `num_programs` work through all pieces of a KV head: how many pieces there
    are only the device knows. `q` needs contiguous heads, its rows may be apart.
    """
    _, _, num_kv_heads, head_dim = cached.shape
    num_heads = q.shape[1]
    group = num_heads // num_kv_heads
    _split[(num_kv_heads, min(num_programs, splits.sequence.shape[0]))](
        splits.partial,
        splits.weight,
        q,
        cached[0],
        cached[1],
        splits.sequence,
        splits.sequence_ends,
        paging.query_starts,
        paging.context_lens,
        paging.block_tables,
        paging.num_seqs,
        q.stride(0),
        paging.block_tables.stride(0),
        head_dim**-0.5 * LOG2_E,
        window,
        split_tokens=splits.split_tokens,
        block_size=paging.block_size,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        block_d=padded_head_dim(head_dim),
        block_h=max(16, triton.next_power_of_2(group)),
        block_n=KEYS_AT_A_TIME,
        wide=wide,
        num_warps=4,
        num_stages=2,
        **launch_options(out),
    )
    _join[(paging.num_seqs, num_heads)](
        out,
        splits.partial,
        splits.weight,
        splits.sequence_ends,
        paging.query_starts,
        num_heads=num_heads,
        head_dim=head_dim,
        block_d=padded_head_dim(head_dim),
        block_s=SPLITS_AT_A_TIME,
        num_warps=1,
        **launch_options(out),
    )


@triton.jit
def _split(
    partial: tl.tensor,
    weight: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    split_sequence: tl.tensor,
    sequence_ends: tl.tensor,
    query_starts: tl.tensor,
    context_lens: tl.tensor,
    block_tables: tl.tensor,
    num_seqs: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    split_tokens: tl.constexpr,
    block_size: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_h: tl.constexpr,
    block_n: tl.constexpr,
    wide: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: every n-th piece of all contexts, for one KV head and its query heads."""
    wait_for_others(overlaps)
    # Heads of one piece start side by side: their keys lie side by side in memory.
    kv_head = tl.program_id(0)
    row = tl.arange(0, block_h)
    is_row = row < group
    head = kv_head * group + row
    channel = tl.arange(0, block_d)
    mask = is_row[:, None] & (channel < head_dim)[None, :]
    slot_width: tl.constexpr = num_kv_heads * head_dim
    num_splits = tl.load(sequence_ends + num_seqs)
    for split in range(tl.program_id(1), num_splits, tl.num_programs(1)):
        sequence = tl.load(split_sequence + split)
        context_len = tl.load(context_lens + sequence)
        q_row = tl.load(query_starts + sequence).to(tl.int64) * q_stride
        queries = load_rows(q, q_row + head * head_dim, is_row, False, head_dim, block_d)
        low = (split - tl.load(sequence_ends + sequence)) * split_tokens
        high = tl.minimum(low + split_tokens, context_len)
        if window > 0:
            low = tl.maximum(low, context_len - window)
        # All rows are the same token, which sees every key of low .. high.
        m, total, weighted = attend_keys(
            tl.full([block_h], HIDDEN_SCORE, tl.float32),
            tl.zeros([block_h], tl.float32),
            tl.zeros([block_h, block_d], tl.float32),
            queries, keys + kv_head * head_dim, values + kv_head * head_dim,
            block_tables + sequence.to(tl.int64) * table_stride, row, row, low, high,
            scale, False, False, block_size, slot_width, head_dim, block_d, block_n, wide,
        )  # fmt: skip
        # A piece that lies in front of the window gathered nothing: its weight is as good as zero.
        rows = head.to(tl.int64) + split * (num_kv_heads * group)
        total = tl.where(low < high, total, 1.0)
        tl.store(weight + rows, m * scale + tl.log2(total), mask=is_row)
        result = weighted / total[:, None]
        tl.store(partial + rows[:, None] * head_dim + channel[None, :], result, mask=mask)


@triton.jit
def _join(
    out: tl.tensor,
    partial: tl.tensor,
    weight: tl.tensor,
    sequence_ends: tl.tensor,
    query_starts: tl.tensor,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_s: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: the pieces of one sequence and query head, weighted by their softmax sums."""
    wait_for_others(overlaps)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(sequence_ends + sequence)
    stop = tl.load(sequence_ends + sequence + 1)
    if start < stop:
        channel = tl.arange(0, block_d)
        m = HIDDEN_SCORE
        total = 0.0
        joined = tl.zeros([block_d], tl.float32)
        for first in range(start, stop, block_s):
            split = first + tl.arange(0, block_s)
            is_there = split < stop
            rows = split.to(tl.int64) * num_heads + head
            exponent = tl.load(weight + rows, mask=is_there, other=HIDDEN_SCORE)
            new_m = tl.maximum(m, tl.max(exponent, 0))
            share = tl.where(is_there, tl.exp2(exponent - new_m), 0.0)
            shrink = tl.exp2(m - new_m)
            mask = is_there[:, None] & (channel < head_dim)[None, :]
            pieces = tl.load(
                partial + rows[:, None] * head_dim + channel[None, :], mask=mask, other=0.0
            )
            total = total * shrink + tl.sum(share, 0)
            joined = joined * shrink + tl.sum(share[:, None] * pieces, 0)
            m = new_m
        q_row = tl.load(query_starts + sequence).to(tl.int64)
        target = out + (q_row * num_heads + head) * head_dim + channel
        tl.store(target, (joined / total).to(out.dtype.element_ty), mask=channel < head_dim)
