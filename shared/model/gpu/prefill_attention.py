"""Causal attention of several new tokens per sequence over their cached prefix and themselves.

In: packed queries, one layer of the paged cache that already holds the new keys and values, and a
tile plan. Out: the outputs of all sequences with more than one new token; those with one are left
to `decode_attention`. Query heads that share a KV head are rows of one tile, so keys and values are
read once per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shared.model.gpu.paging import Paging
from shared.model.gpu.tile import HIDDEN_SCORE, LOG2_E, attend_keys, load_rows, padded_head_dim

FAR = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Rows and keys that one program works on at a time, and how a GPU runs it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype) -> PrefillTile:
        """What fits into the shared memory of a Hopper multiprocessor."""
        if dtype == torch.float32:
            return cls(rows=64, keys=32, num_warps=4, num_stages=1)
        if head_dim > 128:
            return cls(rows=128, keys=32, num_warps=8, num_stages=2)
        return cls(rows=128, keys=128 if head_dim > 64 else 64, num_warps=8, num_stages=2)


@dataclass(frozen=True, slots=True, eq=False)
class PrefillTiles:
    """The sequence of each tile and which of its new tokens the tile begins with.

    Both `[num_tiles]` int32. How many tiles are needed only the device knows, and asking would
    stall the host: those beyond name the sequence `num_seqs`, which does not exist.
    """

    tile: PrefillTile
    sequence: torch.Tensor
    first_token: torch.Tensor

    @classmethod
    def plan(cls, paging: Paging, num_tokens: int, group: int, tile: PrefillTile) -> PrefillTiles:
        """Lay tiles over all sequences with more than one new token."""
        if group > tile.rows:
            raise ValueError(f"{group} query heads share a KV head, the limit is {tile.rows}")
        tokens = tile.rows // group
        q_lens = paging.query_starts.diff()
        counts = torch.where(q_lens > 1, (q_lens + tokens - 1) // tokens, 0)
        ends = counts.cumsum(0)
        num_tiles = (num_tokens + paging.num_seqs * (tokens - 1)) // tokens
        index = torch.arange(num_tiles, device=q_lens.device)
        sequence = torch.searchsorted(ends, index, right=True)
        known = sequence.clamp(max=paging.num_seqs - 1)
        first_token = (index - (ends - counts)[known]) * tokens
        return cls(tile, sequence.int(), first_token.int())


def prefill_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    cached: torch.Tensor,
    paging: Paging,
    tiles: PrefillTiles,
    *,
    window: int,
    attend_stops: torch.Tensor | None = None,
    wide: bool,
) -> None:
    """Fill the rows of `out` `[num_tokens, heads, head_dim]` of sequences with several new tokens.

    `cached` is one layer by slot, `[2, num_slots, kv_heads, head_dim]`; with `window` 0 a token
    sees its whole past, otherwise that many tokens, itself included. `attend_stops` `[num_tokens]`
    lets a token see further than itself, up to that token of its sequence. `q` needs contiguous
    heads, its rows may be apart.
    """
    _, _, num_kv_heads, head_dim = cached.shape
    _prefill[(tiles.sequence.shape[0], num_kv_heads)](
        out,
        q,
        cached[0],
        cached[1],
        tiles.sequence,
        tiles.first_token,
        paging.query_starts,
        paging.context_lens,
        paging.block_tables,
        paging.query_starts if attend_stops is None else attend_stops,
        paging.num_seqs,
        q.stride(0),
        paging.block_tables.stride(0),
        head_dim**-0.5 * LOG2_E,
        window,
        has_stops=attend_stops is not None,
        block_size=paging.block_size,
        num_kv_heads=num_kv_heads,
        group=q.shape[1] // num_kv_heads,
        head_dim=head_dim,
        block_d=padded_head_dim(head_dim),
        block_m=tiles.tile.rows,
        block_n=tiles.tile.keys,
        wide=wide,
        num_warps=tiles.tile.num_warps,
        num_stages=tiles.tile.num_stages,
    )


@triton.jit
def _key_ranges(
    seen_from: tl.tensor, seen_to: tl.tensor, is_row: tl.tensor, block_n: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Keys that some row sees, `low .. high`, and whole tiles of keys that all rows see between."""
    low = tl.min(tl.where(is_row, seen_from, FAR), 0) // block_n * block_n
    high = tl.max(tl.where(is_row, seen_to, 0), 0)
    high_all = tl.min(tl.where(is_row, seen_to, FAR), 0) // block_n * block_n
    high_all = tl.maximum(high_all, low)
    low_all = tl.max(tl.where(is_row, seen_from, 0), 0)
    low_all = tl.minimum((low_all + block_n - 1) // block_n * block_n, high_all)
    return low, low_all, high_all, high


@triton.jit
def _prefill(
    out: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tile_sequence: tl.tensor,
    tile_first_token: tl.tensor,
    query_starts: tl.tensor,
    context_lens: tl.tensor,
    block_tables: tl.tensor,
    attend_stops: tl.tensor,
    num_seqs: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    has_stops: tl.constexpr,
    block_size: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """One program: one tile of one sequence and one KV head."""
    # A sequence's last tiles see the most keys: they start first, so that none of them is alone
    # at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tile_sequence + tile)
    if sequence < num_seqs:
        tile_tokens: tl.constexpr = block_m // group
        first = tl.load(tile_first_token + tile)
        q_start = tl.load(query_starts + sequence)
        q_len = tl.load(query_starts + sequence + 1) - q_start
        past = tl.load(context_lens + sequence) - q_len
        row = tl.arange(0, block_m)
        token = first + row // group
        is_row = (row < tile_tokens * group) & (token < q_len)
        head = kv_head * group + row % group
        q_rows = (q_start + token).to(tl.int64)
        queries = load_rows(
            q, q_rows * q_stride + head * head_dim, is_row, False, head_dim, block_d
        )

        # Row by row, the first key that is seen and the first behind the last.
        seen_to = past + token + 1
        seen_from = tl.zeros([block_m], tl.int32)
        if window > 0:
            seen_from = tl.maximum(seen_to - window, 0)
        if has_stops:
            seen_to = tl.load(attend_stops + q_rows, mask=is_row, other=0).to(tl.int32)
            seen_to = tl.minimum(seen_to, past + q_len)
        low, low_all, high_all, high = _key_ranges(seen_from, seen_to, is_row, block_n)
        table = block_tables + sequence.to(tl.int64) * table_stride
        k_head = keys + kv_head * head_dim
        v_head = values + kv_head * head_dim
        slot_width: tl.constexpr = num_kv_heads * head_dim
        m = tl.full([block_m], HIDDEN_SCORE, tl.float32)
        total = tl.zeros([block_m], tl.float32)
        weighted = tl.zeros([block_m, block_d], tl.float32)
        if window > 0:
            m, total, weighted = attend_keys(
                m, total, weighted, queries, k_head, v_head, table, seen_from, seen_to,
                low, low_all, scale, False, True, block_size, slot_width,
                head_dim, block_d, block_n, wide,
            )  # fmt: skip
        m, total, weighted = attend_keys(
            m, total, weighted, queries, k_head, v_head, table, seen_from, seen_to,
            low_all, high_all, scale, True, False, block_size, slot_width,
            head_dim, block_d, block_n, wide,
        )  # fmt: skip
        m, total, weighted = attend_keys(
            m, total, weighted, queries, k_head, v_head, table, seen_from, seen_to,
            high_all, high, scale, False, True, block_size, slot_width,
            head_dim, block_d, block_n, wide,
        )  # fmt: skip

        channel = tl.arange(0, block_d)
        out_rows = q_rows * (num_kv_heads * group * head_dim) + head * head_dim
        mask = is_row[:, None] & (channel < head_dim)[None, :]
        # A row that is not there has seen nothing.
        total = tl.where(is_row, total, 1.0)
        result = (weighted / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + out_rows[:, None] + channel[None, :], result, mask=mask)
