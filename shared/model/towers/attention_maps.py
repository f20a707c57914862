"""The maps of transformers' attention, which is the same in all patch towers.

In: such an attention with its weights. Out: its projections and what they are cut into, for an
attention of ours.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class AttentionMaps(nn.Module):
    """Takes over the parameters, under their names."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv: nn.Module = attention.qkv
        self.proj: nn.Module = attention.proj
        self._num_heads: int = attention.num_heads
        self._scale: float = attention.scaling
