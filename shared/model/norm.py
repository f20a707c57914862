"""Root-mean-square normalisation.

In: activations `[..., width]`. Out: the same shape and dtype. 16-bit and float32 inputs are
normalised in float32, exactly as transformers does. float64 inputs stay in float64, where
transformers rounds to float32: rounding inside the layers would turn differences of 1e-16, which
any other packing of a batch brings, into 1e-8 every now and then, and float64 exists here only to
tell such differences from mistakes.
"""

from __future__ import annotations

import torch
from torch import nn

from shared.model.kernels.few_norm import norm_of_few


class RmsNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)`; the mean runs over the last dimension."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = norm_of_few(x, self.weight, self.eps)
        if few is not None:
            return few
        wide = x.to(accumulation_dtype(x.dtype))
        variance = wide.square().mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(variance + self.eps)).to(x.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)
