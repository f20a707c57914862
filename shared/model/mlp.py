"""The gated MLP of a decoder layer, or of one expert.

In: activations. Out: activations of the same shape. Knows no tokens and no routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from shared.model.gpu import fused
from shared.model.gpu.parts import Parts, whole
from shared.model.kernels import row_kernels
from shared.model.linear import FusedLinear

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}


class GatedMlp(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, width: int, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        parts = {"gate_proj": width, "up_proj": width}
        self.gate_up = FusedLinear(hidden_size, parts, bias=False, dtype=dtype)
        self.down = FusedLinear(width, {"down_proj": hidden_size}, bias=False, dtype=dtype)
        self.activation = ACTIVATIONS[activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down.forward(self._gated(self.gate_up.forward(hidden)))

    def in_parts(self, hidden: torch.Tensor) -> torch.Tensor | Parts:
        """The same, where the caller can also read a result in parts."""
        return self.down.in_parts(self._gated(whole(self.gate_up.in_parts(hidden))))

    def _gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        gated = gated_by_silu(gate_up) if self.activation is functional.silu else None
        if gated is not None:
            return gated
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up

    def checkpoint_views(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.gate_up.checkpoint_views(prefix)
        yield from self.down.checkpoint_views(prefix)


def gated_by_silu(gate_up: torch.Tensor) -> torch.Tensor | None:
    """`silu(gate) * up` in one pass, `[num_rows, 2 * width]` to `[num_rows, width]`; None where
    there is no kernel for it."""
    return fused.swiglu(gate_up) if fused.takes(gate_up) else row_kernels.swiglu(gate_up)
