"""The first layer of a patch tower: a convolution whose steps are as wide as its kernel.

Such a convolution is one product of the flattened patches, which arrive as rows anyway, and general
kernels for convolutions are much slower at it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class PatchProjection(nn.Module):
    """Takes over the parameters of a convolution, under their names."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        if convolution.stride != convolution.kernel_size or convolution.groups != 1:
            raise ValueError(
                f"a convolution of kernel {convolution.kernel_size} and stride "
                f"{convolution.stride} is no product of patches"
            )
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`[num_patches, channels, *kernel]` to `[num_patches, width]`."""
        return functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
