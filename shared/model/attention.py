"""Attention over the paged cache.

In: queries, keys and values of a packed step, and the cache. Out: attention outputs. What depends
only on the step (slots to read, masks) is planned once and used by every layer. A backend knows
nothing about projections, positions or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared.cache.kv_cache import KvCache, slots_in_blocks
from shared.model.batch import ForwardBatch


class AttentionPlan(Protocol):
    """One step's reading plan, made by a backend and given back to it layer by layer."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KvCache
    ) -> torch.Tensor:
        """Attention of the step's tokens over their contexts, scaled by head_dim ** -0.5.

        `q` `[num_tokens, heads, head_dim]`, `k` and `v` `[num_tokens, kv_heads, head_dim]`; the
        new keys and values are already in the cache. Returns `[num_tokens, heads * head_dim]`.
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute attention on one kind of device."""

    def plan(
        self, batch: ForwardBatch, kv: KvCache, sliding_windows: Sequence[int | None] = ()
    ) -> AttentionPlan:
        """Work out once what the layers of this step share.

        Token i of a sequence sees tokens `0 .. i`, or up to `batch.attend_stops` where that is
        given. `sliding_windows` says per layer how many tokens back it sees at most, itself
        included; None, or no entry at all, for all of them. A backend that cannot do one of the
        two raises `UnsupportedModel`.
        """
        ...


# Queries that share one mask: bounds it for long prompts, and a sliding layer reads little more
# than its window for each group.
MAX_MASKED_QUERIES = 512


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Consecutive queries of one sequence, and the keys they read.

    `rows` are the queries' rows in the packed step. `keys` are slots of the cache (a `slice` where
    they are consecutive, read without a copy), or rows of the step where all keys are new.
    """

    rows: slice
    keys: torch.Tensor | slice
    from_cache: bool
    mask: torch.Tensor | None = None
    is_causal: bool = False


class SdpaAttention:
    """PyTorch's scaled-dot-product attention, sequence by sequence.

    No sequence is padded, so a sequence's result does not depend on who shares its batch. A sliding
    layer reads what its window reaches; the cache keeps the whole context all the same.
    """

    def plan(
        self, batch: ForwardBatch, kv: KvCache, sliding_windows: Sequence[int | None] = ()
    ) -> SdpaPlan:
        longest = int(batch.context_lens.max())
        # A window that reaches past every context is none.
        reach = [None if w is None or w >= longest else w for w in sliding_windows]
        by_window = {window: _plan_batch(batch, kv, window) for window in {None, *reach}}
        return SdpaPlan(by_window[None], tuple(by_window[window] for window in reach))


@dataclass(frozen=True, slots=True, eq=False)
class SdpaPlan:
    """Reading plan of `SdpaAttention`: one for all layers, or one for each."""

    pieces: tuple[_Piece, ...]
    pieces_of_layer: tuple[tuple[_Piece, ...], ...] = ()

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KvCache
    ) -> torch.Tensor:
        cached = kv.layer_slots(layer)
        out = torch.empty_like(q)
        for piece in self.pieces_of_layer[layer] if self.pieces_of_layer else self.pieces:
            keys, values = _read(piece, cached, k, v)
            _attend_one(piece, q[piece.rows], keys, values, out[piece.rows])
        return out.flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """What the new tokens of one sequence may see: `window` tokens back, up to `stops`."""

    q_len: int
    context_len: int
    window: int | None
    stops: torch.Tensor | None

    @property
    def num_cached(self) -> int:
        return self.context_len - self.q_len

    @property
    def is_causal(self) -> bool:
        """Each new token sees all tokens before it and none after."""
        hides_keys = self.window is not None and self.window < self.context_len
        return self.stops is None and not hides_keys

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """The tokens that new tokens `start .. stop` see together."""
        first = 0 if self.window is None else max(self.num_cached + start - self.window + 1, 0)
        if self.stops is None:
            return first, self.num_cached + stop
        return first, int(self.stops[start:stop].max())

    def mask(self, start: int, stop: int, device: torch.device) -> torch.Tensor | None:
        """True where new tokens `start .. stop` may look within their key range."""
        if stop - start == 1:
            return None  # a single query sees all of its range
        key = torch.arange(*self.key_range(start, stop), device=device)
        query = torch.arange(self.num_cached + start, self.num_cached + stop, device=device)
        last = query + 1 if self.stops is None else self.stops[start:stop]
        seen = key < last[:, None]
        if self.window is not None:
            seen &= key > query[:, None] - self.window
        return seen


def _plan_batch(batch: ForwardBatch, kv: KvCache, window: int | None) -> tuple[_Piece, ...]:
    bounds = batch.cu_seqlens_q.tolist()
    contexts = batch.context_lens.tolist()
    pieces: list[_Piece] = []
    for i, (start, stop, context) in enumerate(zip(bounds, bounds[1:], contexts, strict=False)):
        stops = None if batch.attend_stops is None else batch.attend_stops[start:stop]
        view = _View(stop - start, context, window, stops)
        pieces += _plan_sequence(start, view, batch.block_tables[i], kv.block_size)
    return tuple(pieces)


def _plan_sequence(
    q_start: int, view: _View, block_table: torch.Tensor, block_size: int
) -> Iterator[_Piece]:
    """Pieces of one sequence whose first query is row `q_start`."""
    if view.num_cached == 0 and view.is_causal:
        rows = slice(q_start, q_start + view.q_len)
        yield _Piece(rows, rows, from_cache=False, is_causal=view.q_len > 1)
        return
    for start in range(0, view.q_len, MAX_MASKED_QUERIES):
        stop = min(start + MAX_MASKED_QUERIES, view.q_len)
        rows = slice(q_start + start, q_start + stop)
        mask = view.mask(start, stop, block_table.device)
        first, last = view.key_range(start, stop)
        if view.num_cached == 0:
            keys = slice(q_start + first, q_start + last)
            yield _Piece(rows, keys, from_cache=False, mask=mask)
        else:
            slots = slots_in_blocks(block_table, block_size, first, last)
            yield _Piece(rows, _contiguous_or_index(slots), from_cache=True, mask=mask)


def _contiguous_or_index(slots: torch.Tensor) -> torch.Tensor | slice:
    first, last = int(slots[0]), int(slots[-1])
    if last - first + 1 == slots.numel() and bool((slots.diff() == 1).all()):
        return slice(first, last + 1)
    return slots


def _read(
    piece: _Piece, cached: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one piece, each `[num_keys, kv_heads, head_dim]`."""
    if not piece.from_cache:
        return k[piece.keys], v[piece.keys]
    if isinstance(piece.keys, slice):
        both = cached[:, piece.keys]
    else:
        both = cached.index_select(1, piece.keys)
    return both[0], both[1]


def _attend_one(
    piece: _Piece,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attention of one piece into `out` `[q_len, heads, head_dim]`.

    Query heads that share a KV head become the head dimension of a batch over KV heads, so grouped
    queries read keys and values through a stride of zero instead of a copy per head.
    """
    q_len, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    grouped = q.view(q_len, num_kv_heads, group, head_dim)
    keys, values = keys.transpose(0, 1)[:, None], values.transpose(0, 1)[:, None]
    if q_len == 1:
        # One query: nothing to mask, and its heads can be the rows of a single product.
        result = scaled_dot_product_attention(grouped.transpose(0, 1), keys, values)
        out.copy_(result.view(1, num_heads, head_dim))
        return
    shape = (num_kv_heads, group, keys.shape[2], head_dim)
    result = scaled_dot_product_attention(
        grouped.permute(1, 2, 0, 3),
        keys.expand(shape),
        values.expand(shape),
        attn_mask=piece.mask,
        is_causal=piece.is_causal,
    )
    out.view(grouped.shape).copy_(result.permute(2, 0, 1, 3))
