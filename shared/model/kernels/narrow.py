"""Linear maps whose weights stay narrow in memory: bfloat16, or int8 with a scale per output.

In: rows in bfloat16 or float32. Out: the same dtype. Two ways, by the number of rows:

- up to `MAX_COMPILED_ROWS` the time goes into reading weights: a compiled kernel reads each once,
  in its narrow form, and every row's result is bit-equal whatever rows are beside it;
- with more rows the time goes into products: a compiled kernel widens weights a few at a time, in
  memory that stays in the cache, and multiplies in float32. A CPU without bfloat16 instructions has
  nothing faster.

Without compiled kernels, weights are widened panel by panel for torch's float32 product. Sums are
float32 and rounded once at the end, as torch does for bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch.nn import functional

from shared.model.kernels.many_rows import ManyRows, operands
from shared.model.kernels.scratch import scratch
from shared.model.kernels.team import run_on_team

MAX_COMPILED_ROWS = 16
PANEL_BYTES = 4 * 1024 * 1024
PANEL_COLUMNS = 64
"""Panels have a multiple of so many columns: products of other widths are up to a third slower."""
VECTOR_LANES = 8
PAIRED_LANES = 32
"""Values that a bfloat16 instruction reads; a weight's rows have a multiple of so many."""
PAIRED_WIDTH = 2 * VECTOR_LANES
"""Heads whose pairs fill vectors are a multiple of so wide."""
INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class _Compiled:
    """Compiled when a model is loaded: a first request must not wait for it."""

    few: int
    many: ManyRows

    @classmethod
    def of(cls, dtype: torch.dtype, weight: torch.Tensor) -> _Compiled | None:
        """For rows of `dtype`; None where vectors do not fit the weight."""
        if weight.shape[1] % VECTOR_LANES:
            return None
        from shared.model.kernels import rows

        if weight.dtype == torch.bfloat16:
            few = rows.bf16_rows
        else:
            is_wide = dtype == torch.float32
            few = rows.float32_rows_int8 if is_wide else rows.bf16_rows_int8
        return cls(few.address, ManyRows(dtype, weight.dtype))


class Bf16Kernel:
    """bfloat16 rows and weight. Without compiled kernels few rows go to torch's operator."""

    def __init__(self, weight: torch.Tensor, *, compiled: bool) -> None:
        self.name = "compiled bfloat16" if compiled else "panels bfloat16"
        self._weight = weight.contiguous()
        self._compiled = _Compiled.of(weight.dtype, self._weight) if compiled else None

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        is_few = prod(x.shape[:-1]) <= MAX_COMPILED_ROWS
        if self._compiled is None:
            if is_few:
                return functional.linear(x, self._weight, bias)
            return _by_panels(x, self._weight, None, bias)
        if not is_few:
            return self._compiled.many.run(x, self._weight, None, bias)
        return run_rows(self._compiled.few, x, self._weight, None, bias)


class Int8Kernel:
    """int8 weight with one float32 scale per output, the largest weight at 127."""

    def __init__(self, weight: torch.Tensor, *, compiled: bool, paired: bool = False) -> None:
        """`paired`: this CPU has bfloat16 instructions that our kernels can use."""
        is_paired = (
            paired and weight.dtype == torch.bfloat16 and weight.shape[1] % PAIRED_LANES == 0
        )
        how = "paired" if is_paired else "compiled" if compiled else "panels"
        self.name = f"{how} int8"
        largest = weight.abs().amax(dim=1, keepdim=True).float()
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
        self._weight = torch.round(weight.float() / scale).to(torch.int8)
        self._scale = scale.flatten()
        self._pairs = _pair_kernel() if is_paired else None
        self._compiled = (
            _Compiled.of(weight.dtype, self._weight) if compiled and not is_paired else None
        )

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._pairs is not None:
            return run_rows(self._pairs, x, self._weight, self._scale, bias)
        if self._compiled is None:
            return _by_panels(x, self._weight, self._scale, bias)
        if prod(x.shape[:-1]) > MAX_COMPILED_ROWS:
            return self._compiled.many.run(x, self._weight, self._scale, bias)
        return run_rows(self._compiled.few, x, self._weight, self._scale, bias)


def _pair_kernel() -> int:
    from shared.model.kernels import pair_rows

    return pair_rows.pair_rows_int8.address


def run_rows(
    kernel: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Run a kernel of `shared/model/kernels/rows.py`; its argument block in its order."""
    columns, width = weight.shape
    rows = x if x.ndim == 2 else x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty((rows.shape[0], columns), dtype=x.dtype)
    arguments = np.array((0, *operands(rows, weight, scale, bias, out)), np.int64)
    run_on_team(kernel, arguments)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], columns)


def _by_panels(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    columns, width = weight.shape
    wide = x.reshape(-1, width).float()
    out = torch.empty((wide.shape[0], columns), dtype=x.dtype)
    step = max(PANEL_COLUMNS, PANEL_BYTES // (4 * width) // PANEL_COLUMNS * PANEL_COLUMNS)
    for start in range(0, columns, step):
        part = slice(start, min(start + step, columns))
        panel = scratch("panel", part.stop - start, width).copy_(weight[part])
        product = torch.mm(wide, panel.T, out=scratch("product", wide.shape[0], part.stop - start))
        if scale is not None:
            product *= scale[part]
        if bias is not None:
            product += bias[part]
        out[:, part] = product
    return out.view(*x.shape[:-1], columns)
