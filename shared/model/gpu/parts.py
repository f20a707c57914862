"""The result of a linear map in parts that whoever reads it next adds up.

In: what the kernel for few rows leaves behind. Out: a tensor, where nothing can read parts.
Importing this module needs no triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """`pieces` `[num_parts, num_rows, width]` float32: their sum and `bias` `[width]` are the
    result, which has number format `dtype` where it is a tensor."""

    pieces: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype

    def sum(self, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`[num_rows, width]`, with `residual` added if there is one."""
        from shared.model.gpu import few_rows

        return few_rows.sum_parts(self, residual)


def whole(result: torch.Tensor | Parts) -> torch.Tensor:
    """A result as a tensor."""
    return result.sum() if isinstance(result, Parts) else result
