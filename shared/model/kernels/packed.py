"""A linear map by oneDNN on a weight in oneDNN's own layout.

In: a float32 weight, or a bfloat16 one on a CPU with bfloat16 instructions. Out: rows. The layout
is made once; torch's plain operator would look for it at every call.
"""

from __future__ import annotations

from typing import Any

import torch

TYPICAL_ROWS = 32
"""The number of rows that the layout is made for; others work as well."""


class PackedKernel:
    """oneDNN's layout replaces the weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.name = f"packed {str(weight.dtype).removeprefix('torch.')}"
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)

    def unpacked(self) -> torch.Tensor:
        """The weight as it was loaded."""
        weight: torch.Tensor = self._weight.to_dense()
        return weight

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")  # type: ignore[no-any-return]
