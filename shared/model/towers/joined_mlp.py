"""The gated MLP of a tower's layer, with gate and up in one product.

In: the MLP of transformers with its weights. Out: one that computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shared.model.mlp import gated_by_silu

ALIGNMENT = 8
"""Elements of 16 bits that matrix units want a row to be a multiple of; other widths are computed
by kernels several times as slow."""


class JoinedMlp(nn.Module):
    """`down(activation(gate(x)) * up(x))` with gate and up in one product.

    The width between them is filled up with zeros: they stay zero through the activation (which
    maps zero to zero) and add nothing.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.activation: nn.Module = mlp.act_fn
        self.gate_up = _rows_filled_up(gate, up)
        self.down = _columns_filled_up(down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_patches, hidden]` in and out."""
        gate_up = self.gate_up(x)
        is_silu = "silu" in type(self.activation).__name__.lower()
        gated = gated_by_silu(gate_up) if is_silu else None
        if gated is None:
            gate, up = gate_up.chunk(2, dim=-1)
            gated = self.activation(gate) * up
        down: torch.Tensor = self.down(gated)
        return down


def _rows_filled_up(*linears: nn.Linear) -> nn.Linear:
    """Several maps of one input as one, each with outputs of zero up to an aligned width."""
    missing = -linears[0].out_features % ALIGNMENT
    weight = torch.cat([functional.pad(each.weight, (0, 0, 0, missing)) for each in linears])
    biases = [functional.pad(each.bias, (0, missing)) for each in linears if each.bias is not None]
    return _linear(weight, torch.cat(biases) if biases else None)


def _columns_filled_up(linear: nn.Linear) -> nn.Linear:
    """A map that ignores inputs behind its own, up to an aligned width."""
    missing = -linear.in_features % ALIGNMENT
    return _linear(functional.pad(linear.weight, (0, missing)), linear.bias)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
