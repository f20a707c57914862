"""Root-mean-square normalisation.

In: activations `[..., width]`. Out: the same shape and dtype. 16-bit and float32 inputs are
normalised in float32, exactly as transformers does. float64 inputs stay in float64, where
transformers rounds to float32: rounding inside the layers would turn differences of 1e-16, which
any other packing of a batch brings, into 1e-8 every now and then, and float64 exists here only to
tell such differences from mistakes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from shared.model.gpu import fused
from shared.model.gpu.parts import Parts
from shared.model.kernels import row_kernels
from shared.modelspec import TextSpec


class RmsNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)`; the mean runs over the last dimension."""

    unit_offset: ClassVar[bool] = False

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if fused.takes(x):
            return fused.rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)
        compiled = row_kernels.rms_norm(x, self.weight, self.eps)
        if compiled is not None:
            return compiled
        wide = x.to(accumulation_dtype(x.dtype))
        variance = wide.square().mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(variance + self.eps)).to(x.dtype)

    def add(
        self, residual: torch.Tensor, x: torch.Tensor | Parts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of two `[num_tokens, width]`, and its normalisation."""
        if fused.takes(residual):
            return fused.add_rms_norm(
                x, residual, self.weight, self.eps, unit_offset=self.unit_offset
            )
        total = residual_sum(residual, x)
        return total, self.forward(total)


class UnitOffsetRmsNorm(RmsNorm):
    """Scales by `1 + weight`, before rounding to x's dtype."""

    unit_offset: ClassVar[bool] = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if fused.takes(x):
            return fused.rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)
        wide = x.to(accumulation_dtype(x.dtype))
        variance = wide.square().mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(variance + self.eps)
        return (normed * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)


def norm_of(spec: TextSpec, width: int, dtype: torch.dtype) -> RmsNorm:
    """A norm over `width` channels, as this model scales it."""
    kind = UnitOffsetRmsNorm if spec.norm_unit_offset else RmsNorm
    return kind(width, spec.rms_norm_eps, dtype)


def residual_sum(x: torch.Tensor, y: torch.Tensor | Parts) -> torch.Tensor:
    """`x + y`, both `[num_tokens, width]`."""
    if isinstance(y, Parts):
        return y.sum(x)
    compiled = row_kernels.add(x, y)
    return x + y if compiled is None else compiled


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)
