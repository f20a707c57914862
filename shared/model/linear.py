"""A linear map whose rows come from one or several checkpoint tensors.

In: activations. Out: activations. Projections that read the same input are one matrix here, which
saves calls and lets one kernel stream the weights; the checkpoint keeps them apart, so a layer
names the row ranges for the loader. This is the seam for prepacked and quantized weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional


class FusedLinear(nn.Module):
    """`y = x W^T + b`; `parts` maps checkpoint names to their output widths, in row order."""

    def __init__(
        self, in_features: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts = dict(parts)
        out_features = sum(self.parts.values())
        self.weight = _frozen(out_features, in_features, dtype=dtype)
        self.bias = _frozen(out_features, dtype=dtype) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def checkpoint_views(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint name and the view it fills, for every tensor of this map."""
        start = 0
        for name, width in self.parts.items():
            rows = slice(start, start + width)
            yield f"{prefix}{name}.weight", self.weight[rows]
            if self.bias is not None:
                yield f"{prefix}{name}.bias", self.bias[rows]
            start += width


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
