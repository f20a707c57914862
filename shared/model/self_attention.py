"""Self-attention of one decoder layer.

In: hidden states of a packed step. Out: what is added to them; this layer's keys and values of the
new tokens are in the cache afterwards. How attention is computed is the backend's affair.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from shared.cache.kv_cache import KvCache
from shared.model.gpu import fused
from shared.model.gpu.parts import Parts, whole
from shared.model.kernels import row_kernels
from shared.model.linear import FusedLinear
from shared.model.norm import norm_of
from shared.model.step import LastTokens, StepContext
from shared.modelspec import TextSpec


class SelfAttention(nn.Module):
    """Projections, optional QK norm and rotation, cache write and attention."""

    def __init__(self, spec: TextSpec, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = spec.num_heads
        self.num_kv_heads = spec.num_kv_heads
        self.head_dim = spec.head_dim
        self.query_scale = spec.query_scale
        rope = spec.layers[layer].rope
        self.rope_index = None if rope is None else spec.ropes.index(rope)
        q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
        self.qkv = FusedLinear(spec.hidden_size, parts, bias=spec.qkv_bias, dtype=dtype)
        self.o = FusedLinear(q_width, {"o_proj": spec.hidden_size}, bias=spec.o_bias, dtype=dtype)
        self.q_norm = norm_of(spec, spec.head_dim, dtype) if spec.qk_norm else None
        self.k_norm = norm_of(spec, spec.head_dim, dtype) if spec.qk_norm else None

    def forward(
        self, hidden: torch.Tensor, step: StepContext, kv: KvCache, last: LastTokens | None = None
    ) -> torch.Tensor | Parts:
        """`hidden` `[num_tokens, hidden]` in and out, or only the rows of `last` out; writes this
        layer's KV of the new tokens."""
        q, k, v = self._placed(self.qkv.in_parts(hidden), step, kv)
        plan = step.plan
        if last is not None:
            q, k, v, plan = q[last.rows], k[last.rows], v[last.rows], last.plan
        if self.query_scale != 1.0:
            q = q * self.query_scale
        return self.o.in_parts(plan.attend(self.layer, q, k, v, kv))

    def _placed(
        self, projected: torch.Tensor | Parts, step: StepContext, kv: KvCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, rotated; keys and values are in the cache."""
        slots, num_rotated = step.batch.slot_mapping, self.num_heads + self.num_kv_heads
        rotary = None if self.rope_index is None else step.rotaries[self.rope_index]
        if isinstance(projected, Parts) and rotary is not None and self.q_norm is None:
            heads = fused.rotate_parts_into_cache(
                projected, rotary.cos, rotary.sin_signed, kv.layer_slots(self.layer), slots
            )
            qk, v = heads[:, :num_rotated], heads[:, num_rotated:]
        else:
            heads = whole(projected)
            heads = heads.view(heads.shape[0], -1, self.head_dim)
            qk, v = self._normed(heads[:, :num_rotated]), heads[:, num_rotated:]
            if rotary is not None and fused.takes(qk):
                cached = kv.layer_slots(self.layer)
                qk = fused.rotate_into_cache(qk, v, rotary.cos, rotary.sin_signed, cached, slots)
            else:
                qk = qk if rotary is None else rotary.rotate(qk)
                kv.write(self.layer, slots, qk[:, self.num_heads :], v)
        return qk[:, : self.num_heads], qk[:, self.num_heads :], v

    def _normed(self, qk: torch.Tensor) -> torch.Tensor:
        if self.q_norm is None or self.k_norm is None:
            return qk
        if not self.q_norm.unit_offset:
            weights = self.q_norm.weight, self.k_norm.weight
            normed = row_kernels.norm_heads(qk, *weights, self.q_norm.eps, self.num_heads)
            if normed is not None:
                return normed
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        return torch.cat((self.q_norm.forward(q), self.k_norm.forward(k)), dim=1)

    def checkpoint_views(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.qkv.checkpoint_views(prefix)
        yield from self.o.checkpoint_views(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield f"{prefix}q_norm.weight", self.q_norm.weight
            yield f"{prefix}k_norm.weight", self.k_norm.weight
