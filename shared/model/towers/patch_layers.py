"""A patch tower made quick on a CPU: windows of one length attend together, and where there are
kernels for bfloat16, they normalise, rotate, gate and multiply.

In: a tower of transformers with its weights. Out: the same tower, computing the same by other
means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shared.model.kernels.choice import (
    has_bf16_instructions,
    has_compiled_kernels,
    has_paired_kernels,
)
from shared.model.kernels.packed import PackedKernel
from shared.model.linear import LinearKernel
from shared.model.towers.joined_mlp import JoinedMlp
from shared.model.towers.norms import take_norms
from shared.model.towers.patch_attention import LayersShare, PatchAttention


def quicken(module: nn.Module) -> None:
    """Change the tower `module` in place; its parameters' names are others afterwards."""
    blocks: Any = module.blocks
    share = LayersShare()
    is_narrow = next(module.parameters()).dtype == torch.bfloat16 and has_bf16_instructions()
    for layer in blocks:
        layer.attn = PatchAttention(layer.attn, share)
        if is_narrow and hasattr(layer.mlp, "gate_proj"):
            layer.mlp = JoinedMlp(layer.mlp)
    if is_narrow:
        _take_kernels(module)


def _take_kernels(module: nn.Module) -> None:
    """Replace norms and linear maps, wherever they are."""
    if has_compiled_kernels():
        _compile()
    take_norms(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, KernelLinear(child))


def _compile() -> None:
    """Now, so that a first picture does not wait for it."""
    from shared.model.kernels import gates, norms, prompts, rotations

    kernels = [norms.norm_bf16, gates.swiglu_bf16, rotations.rotate_bf16_by_f32]
    if has_paired_kernels():
        kernels.append(prompts.attend_prompts_pairs)
    for kernel in kernels:
        kernel.compile()


class KernelLinear(nn.Module):
    """A linear map whose weight lies as oneDNN reads it best."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.kernel: LinearKernel = PackedKernel(linear.weight.data)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return self.kernel.run(x, self.bias)
