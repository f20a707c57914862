"""A patch tower made quick on a GPU: packed attention, joined products, and kernels of our own for
what lies between them.

In: a tower of transformers with its weights. Out: the same tower, computing the same by other
kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shared.model.gpu import fused, varlen
from shared.model.towers.angles import CosSin, SharedAngles
from shared.model.towers.attention_maps import AttentionMaps
from shared.model.towers.joined_mlp import JoinedMlp
from shared.model.towers.norms import take_norms


def quicken(module: nn.Module) -> None:
    """Change the tower `module` in place; its parameters' names are others afterwards."""
    blocks: Any = module.blocks
    dtype = next(module.parameters()).dtype
    is_packed = varlen.has_varlen() and dtype in varlen.DTYPES and fused.has_triton()
    angles = SharedAngles()
    for layer in blocks:
        if is_packed:
            layer.attn = PackedAttention(layer.attn, angles)
        if hasattr(layer.mlp, "gate_proj"):
            layer.mlp = JoinedMlp(layer.mlp)
    if dtype in fused.KERNEL_DTYPES:
        take_norms(module)


class PackedAttention(AttentionMaps):
    """Windows by our kernel, longer sequences by torch's."""

    def __init__(self, attention: Any, angles: SharedAngles) -> None:
        super().__init__(attention)
        self._angles = angles

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: CosSin,
        max_seqlen: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """`[num_patches, hidden]` in and out; `cu_seqlens` `[num_sequences + 1]` int32 bounds what
        sees each other, and none of that is longer than `max_seqlen`."""
        from shared.model.gpu.window_attention import MAX_PATCHES, window_attention

        heads = self.qkv(hidden_states).view(hidden_states.shape[0], 3, self._num_heads, -1)
        longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
        if longest <= MAX_PATCHES:
            out = window_attention(heads, *position_embeddings, cu_seqlens, self._scale)
        else:
            # Query and key heads lie side by side.
            qk = fused.rotate(heads[:, :2].flatten(1, 2), *self._angles.of(position_embeddings))
            q, k = qk[:, : self._num_heads], qk[:, self._num_heads :]
            out = varlen.attend(q, k, heads[:, 2], cu_seqlens, longest, self._scale)
        projected: torch.Tensor = self.proj(out.flatten(1))
        return projected
