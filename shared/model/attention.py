"""Attention over the paged cache.

In: queries, keys and values of a packed step, and the cache. Out: attention outputs. What depends
only on the step (slots to read, masks) is planned once and used by every layer. A backend knows
nothing about projections, positions or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True, eq=False)
class _SequencePlan:
    """How one sequence reads its context.

    `slots=None`: the context is exactly the new tokens, so the cache need not be read back.
    A `slice` is a context in consecutive slots, read without a copy.
    """

    q_start: int
    q_stop: int
    slots: torch.Tensor | slice | None
    mask: torch.Tensor | None
    is_causal: bool


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
        by_window = {window: _plan_sequences(batch, kv, window) for window in {None, *reach}}
        return SdpaPlan(by_window[None], tuple(by_window[window] for window in reach))


@dataclass(frozen=True, slots=True, eq=False)
class SdpaPlan:
    """Reading plan of `SdpaAttention`: one for all layers, or one for each."""

    sequences: tuple[_SequencePlan, ...]
    sequences_of_layer: tuple[tuple[_SequencePlan, ...], ...] = ()

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KvCache
    ) -> torch.Tensor:
        cached = kv.layer_slots(layer)
        out = torch.empty_like(q)
        sequences = self.sequences_of_layer[layer] if self.sequences_of_layer else self.sequences
        for sequence in sequences:
            rows = slice(sequence.q_start, sequence.q_stop)
            keys, values = _context(sequence.slots, cached, k[rows], v[rows])
            _attend_one(sequence, q[rows], keys, values, out[rows])
        return out.flatten(1)


def _plan_sequences(
    batch: ForwardBatch, kv: KvCache, window: int | None
) -> tuple[_SequencePlan, ...]:
    bounds = batch.cu_seqlens_q.tolist()
    contexts = batch.context_lens.tolist()
    plans = []
    for i, (start, stop, context) in enumerate(zip(bounds, bounds[1:], contexts, strict=False)):
        stops = None if batch.attend_stops is None else batch.attend_stops[start:stop]
        view = _View(stop - start, context, window, stops)
        plans.append(_plan_sequence(start, view, batch.block_tables[i], kv.block_size))
    return tuple(plans)


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """What the new tokens of one sequence may see."""

    q_len: int
    context_len: int
    window: int | None
    stops: torch.Tensor | None

    @property
    def first_key(self) -> int:
        """The first token that any of the new ones sees."""
        if self.window is None:
            return 0
        return max(self.context_len - self.q_len - self.window + 1, 0)

    @property
    def is_causal(self) -> bool:
        """Each new token sees all tokens before it and none after."""
        hides_keys = self.window is not None and self.window < self.context_len
        return self.stops is None and not hides_keys

    def mask(self, device: torch.device) -> torch.Tensor:
        """True where a query may look, `[q_len, context_len - first_key]`."""
        key = torch.arange(self.first_key, self.context_len, device=device)
        query = torch.arange(self.context_len - self.q_len, self.context_len, device=device)
        stop = query + 1 if self.stops is None else self.stops
        seen = key < stop[:, None]
        if self.window is not None:
            seen &= key > query[:, None] - self.window
        return seen


def _plan_sequence(
    q_start: int, view: _View, block_table: torch.Tensor, block_size: int
) -> _SequencePlan:
    q_stop = q_start + view.q_len
    is_whole = view.context_len == view.q_len
    if is_whole and view.is_causal:
        return _SequencePlan(q_start, q_stop, slots=None, mask=None, is_causal=view.q_len > 1)
    # A single query sees every key from the first one that is read.
    mask = None if view.q_len == 1 else view.mask(block_table.device)
    if is_whole:
        return _SequencePlan(q_start, q_stop, slots=None, mask=mask, is_causal=False)
    slots = slots_in_blocks(block_table, block_size, view.first_key, view.context_len)
    return _SequencePlan(
        q_start, q_stop, slots=_contiguous_or_index(slots), mask=mask, is_causal=False
    )


def _contiguous_or_index(slots: torch.Tensor) -> torch.Tensor | slice:
    first, last = int(slots[0]), int(slots[-1])
    if last - first + 1 == slots.numel() and bool((slots.diff() == 1).all()):
        return slice(first, last + 1)
    return slots


def _context(
    slots: torch.Tensor | slice | None, cached: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence, each `[num_keys, kv_heads, head_dim]`."""
    if slots is None:
        return k, v
    both = cached[:, slots] if isinstance(slots, slice) else cached.index_select(1, slots)
    return both[0], both[1]


def _attend_one(
    sequence: _SequencePlan,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attention of one sequence into `out` `[q_len, heads, head_dim]`.

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
        attn_mask=sequence.mask,
        is_causal=sequence.is_causal,
    )
    out.view(grouped.shape).copy_(result.permute(2, 0, 1, 3))
