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

from shared.model.gpu import fused


class RmsNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)`; the mean runs over the last dimension.

    With `unit_offset` the factor is `1 + weight`, and it is applied before rounding to x's dtype.
    """

    def __init__(
        self, width: int, eps: float, dtype: torch.dtype, *, unit_offset: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if fused.takes(x):
            return fused.rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)
        wide = x.to(accumulation_dtype(x.dtype))
        variance = wide.square().mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(variance + self.eps)
        if self.unit_offset:
            return (normed * (1.0 + self.weight.to(normed.dtype))).to(x.dtype)
        return self.weight * normed.to(x.dtype)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of two `[num_tokens, width]`, and its normalisation."""
        if fused.takes(x):
            return fused.add_rms_norm(
                x, residual, self.weight, self.eps, unit_offset=self.unit_offset
            )
        total = x + residual
        return total, self.forward(total)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)
