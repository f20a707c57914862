"""A bfloat16 linear map on a CPU with bfloat16 instructions: two forms of the weight.

In: bfloat16 rows. Out: bfloat16 rows. Few rows read the weight as it was loaded, by our own kernel,
which may be recorded with the rest of a decode step; many go to oneDNN, which multiplies faster but
on a layout of its own. A process that computes only one kind keeps only one form.
"""

from __future__ import annotations

from math import prod

import torch

from shared.model.kernels.narrow import run_rows
from shared.model.kernels.packed import PackedKernel
from shared.model.linear import Rows

MAX_FEW_ROWS = 16
"""With more, oneDNN's layout is worth its memory."""


class PairedKernel:
    """Keeps the weight in the forms that `expect` asks for."""

    name = "paired bfloat16"

    def __init__(self, weight: torch.Tensor, rows: Rows) -> None:
        from shared.model.kernels import pair_rows

        self._kernel = pair_rows.pair_rows.address
        self._weight: torch.Tensor | None = weight.contiguous()
        self._packed: PackedKernel | None = None
        self.expect(rows)

    def expect(self, rows: Rows) -> None:
        """Make the forms that such rows need from those there are, and give up the others."""
        if rows is not Rows.FEW and self._packed is None:
            assert self._weight is not None
            self._packed = PackedKernel(self._weight)
        if rows is not Rows.MANY and self._weight is None:
            assert self._packed is not None
            self._weight = self._packed.unpacked()
        if rows is Rows.FEW:
            self._packed = None
        if rows is Rows.MANY:
            self._weight = None

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        is_few = prod(x.shape[:-1]) <= MAX_FEW_ROWS
        if self._packed is not None and not (is_few and self._weight is not None):
            return self._packed.run(x, bias)
        assert self._weight is not None
        return run_rows(self._kernel, x, self._weight, None, bias)
