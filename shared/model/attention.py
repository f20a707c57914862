"""Attention over the paged cache.

In: queries, keys and values of a packed step, and the cache. Out: attention outputs. What depends
only on the step (slots to read, masks) is planned once and used by every layer. A backend knows
nothing about projections, positions or requests.
"""

from __future__ import annotations

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
        """Causal attention of the step's tokens over their contexts, scaled by head_dim ** -0.5.

        `q` `[num_tokens, heads, head_dim]`, `k` and `v` `[num_tokens, kv_heads, head_dim]`; the
        new keys and values are already in the cache. Returns `[num_tokens, heads * head_dim]`.
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute attention on one kind of device."""

    def plan(self, batch: ForwardBatch, kv: KvCache) -> AttentionPlan:
        """Work out once what all layers of this step share."""
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

    No sequence is padded, so a sequence's result does not depend on who shares its batch.
    """

    def plan(self, batch: ForwardBatch, kv: KvCache) -> SdpaPlan:
        bounds = batch.cu_seqlens_q.tolist()
        contexts = batch.context_lens.tolist()
        sequences = [
            _plan_sequence(start, stop, context, table, kv.block_size)
            for start, stop, context, table in zip(
                bounds, bounds[1:], contexts, batch.block_tables, strict=False
            )
        ]
        return SdpaPlan(tuple(sequences))


@dataclass(frozen=True, slots=True, eq=False)
class SdpaPlan:
    """Reading plan of `SdpaAttention`."""

    sequences: tuple[_SequencePlan, ...]

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KvCache
    ) -> torch.Tensor:
        cached = kv.layer_slots(layer)
        out = torch.empty_like(q)
        for sequence in self.sequences:
            rows = slice(sequence.q_start, sequence.q_stop)
            keys, values = _context(sequence.slots, cached, k[rows], v[rows])
            _attend_one(sequence, q[rows], keys, values, out[rows])
        return out.flatten(1)


def _plan_sequence(
    q_start: int, q_stop: int, context_len: int, block_table: torch.Tensor, block_size: int
) -> _SequencePlan:
    q_len = q_stop - q_start
    if context_len == q_len:
        return _SequencePlan(q_start, q_stop, slots=None, mask=None, is_causal=q_len > 1)
    slots = _contiguous_or_index(slots_in_blocks(block_table, block_size, 0, context_len))
    mask = None if q_len == 1 else _causal_mask(q_len, context_len, block_table.device)
    return _SequencePlan(q_start, q_stop, slots=slots, mask=mask, is_causal=False)


def _contiguous_or_index(slots: torch.Tensor) -> torch.Tensor | slice:
    first, last = int(slots[0]), int(slots[-1])
    if last - first + 1 == slots.numel() and bool((slots.diff() == 1).all()):
        return slice(first, last + 1)
    return slots


def _causal_mask(q_len: int, context_len: int, device: torch.device) -> torch.Tensor:
    """True where a query may look: new token i sees the cached tokens and the new ones up to i."""
    key = torch.arange(context_len, device=device)
    query = torch.arange(context_len - q_len, context_len, device=device)
    return key <= query[:, None]


def _context(
    slots: torch.Tensor | slice | None, cached: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence, each `[context_len, kv_heads, head_dim]`."""
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
