"""Attention of a patch tower on a CPU: within pictures, frames or windows packed end to end.

In: hidden states, where sequences end, and angles as transformers gives them. Out: hidden states.
Neighbours of one length attend in one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch
from shared.model.kernels import row_kernels
from shared.model.kernels.choice import attends_in_pairs
from shared.model.prompt_attention import PromptPlan
from shared.model.towers.angles import CosSin, SharedAngles
from shared.model.towers.attention_maps import AttentionMaps

MAX_PLANS = 4
"""Kept with their pages: pictures of one size come in every layer, whole and in windows."""


class LayersShare:
    """What the attention of all layers of one tower shares; for one call at a time."""

    def __init__(self) -> None:
        self.angles = SharedAngles()
        self.paged = lru_cache(MAX_PLANS)(_paged)


class PatchAttention(AttentionMaps):
    """Neighbours of one length in one call."""

    def __init__(self, attention: Any, share: LayersShare) -> None:
        super().__init__(attention)
        self._share = share

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: CosSin,
        **_: Any,
    ) -> torch.Tensor:
        """`[num_patches, hidden]` in and out; `cu_seqlens` `[num_sequences + 1]` bounds what sees
        each other."""
        num_patches, both = hidden_states.shape[0], 2 * self._num_heads
        heads = self.qkv(hidden_states).view(num_patches, both + self._num_heads, -1)
        qk = self._rotated(heads[:, :both], *self._share.angles.of(position_embeddings))
        q, k = qk[:, : self._num_heads], qk[:, self._num_heads :]
        out = attend_within(q, k, heads[:, both:], cu_seqlens, self._scale, self._share)
        projected: torch.Tensor = self.proj(out.flatten(1))
        return projected

    def _rotated(
        self, qk: torch.Tensor, cos: torch.Tensor, sin_signed: torch.Tensor
    ) -> torch.Tensor:
        compiled = row_kernels.rotate(qk, cos, sin_signed)
        if compiled is not None:
            return compiled
        # Angles and rotation are float32 whatever the tower's dtype is, as in transformers.
        wide, half = qk.float(), qk.shape[-1] // 2
        swapped = torch.cat((wide[..., half:], wide[..., :half]), dim=-1)
        return (wide * cos + swapped * sin_signed).to(qk.dtype)


def attend_within(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    share: LayersShare,
) -> torch.Tensor:
    """Attention within sequences packed end to end; neighbours of one length in one call.

    `[num_patches, heads, head_dim]` each, and the result; `bounds` `[num_sequences + 1]`.
    """
    are_pairs = scale == q.shape[2] ** -0.5 and attends_in_pairs(q.dtype, q.shape[2])
    pieces = []
    for start, count, length in _runs(bounds):
        rows = slice(start, start + count * length)
        piece = q[rows], k[rows], v[rows]
        pieces.append(
            _by_pairs(*piece, share, count, length)
            if are_pairs
            else _by_torch(*piece, scale, count, length)
        )
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _by_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, count: int, length: int
) -> torch.Tensor:
    _, num_heads, head_dim = q.shape
    shape = (num_heads, count, length, head_dim)
    # Head by head: torch's kernel reads that much faster than heads that lie side by side.
    query, key, value = (
        x.transpose(0, 1).contiguous().view(shape).transpose(0, 1) for x in (q, k, v)
    )
    attended = scaled_dot_product_attention(query, key, value, scale=scale)
    return attended.transpose(1, 2).reshape(q.shape)


def _by_pairs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, share: LayersShare, count: int, length: int
) -> torch.Tensor:
    """The decoder's kernel for prompts: each sequence is a page, and all its tokens see it all."""
    plan, pages = share.paged(q.shape[1], q.shape[2], count, length)
    keys, values = pages.layer_slots(0)
    keys.copy_(k)
    values.copy_(v)
    return plan.attend(0, q, keys, values, pages).view(q.shape)


def _paged(num_heads: int, head_dim: int, count: int, length: int) -> tuple[PromptPlan, KvCache]:
    """A reading plan of so many sequences of one length, and memory for their keys and values."""
    geometry = KvGeometry(1, num_heads, head_dim, block_size=length, dtype="bfloat16")
    pages = KvCache(geometry, count)
    rows = torch.arange(count * length)
    batch = ForwardBatch(
        token_ids=rows,
        positions=rows,
        slot_mapping=rows,
        cu_seqlens_q=torch.arange(count + 1) * length,
        context_lens=torch.full((count,), length),
        block_tables=torch.arange(count)[:, None],
        attend_stops=torch.full((count * length,), length),
    )
    return PromptPlan(batch, pages, (None,)), pages


def _runs(bounds: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """First patch, number of sequences and their length, for each run of equal lengths."""
    start = 0
    for length, run in groupby(bounds.diff().tolist()):
        count = len(list(run))
        if length:
            yield start, count, length
        start += count * length
