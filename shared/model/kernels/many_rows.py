"""How the compiled product of many rows is called.

In: rows and a narrow weight. Out: rows. Divides the work between threads and bounds its memory;
`shared/model/kernels/products.py` computes.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
import torch

from shared.model.kernels.scratch import scratch
from shared.model.kernels.team import run_on_team

MAX_PANEL_BYTES = 32 * 1024 * 1024
"""Memory for arranged activations; more rows than fit are computed one part after the other."""

MAX_BLOCKS = 8
"""Blocks of weight rows that a thread takes at a time: activations are read once for all."""

MIN_BLOCKS = 4


class ManyRows:
    """The product kernels for rows of one format and weights of another.

    Compiled when this is made: a first request must not wait for it.
    """

    def __init__(self, dtype: torch.dtype, stored: torch.dtype) -> None:
        from shared.model.kernels import products

        self._products: Any = products
        self._dtype = dtype
        is_wide = dtype == torch.float32
        if stored == torch.bfloat16:
            multiply = products.multiply_bf16
        elif is_wide:
            multiply = products.multiply_int8_to_float32
        else:
            multiply = products.multiply_int8_to_bf16
        self._arrange = (products.arrange_float32 if is_wide else products.arrange_bf16).address
        self._multiply = multiply.address

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`x` `[..., width]` to `[..., columns]`, in x's dtype."""
        columns, width = weight.shape
        if x.dtype != self._dtype:
            raise ValueError(f"{x.dtype} rows for a kernel of {self._dtype} rows")
        rows = x.reshape(-1, width)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype)
        step = self._rows_at_a_time(width)
        parts = zip(torch.split(rows, step), torch.split(out.view(-1, columns), step), strict=True)
        for part, part_of_out in parts:
            self._run_part(part, weight, scale, bias, part_of_out)
        return out

    def _run_part(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        products, (columns, width) = self._products, weight.shape
        num_panels = -(-x.shape[0] // products.BLOCK_ROWS)
        num_blocks = blocks_at_a_time(-(-columns // products.BLOCK_COLUMNS))
        room = products.scratch_values(num_blocks, num_panels)
        arguments = np.array(
            (
                0,
                0,
                *operands(x, weight, scale, bias, out),
                scratch("panels", num_panels, products.panel_values(width)).data_ptr(),
                scratch("team", torch.get_num_threads(), room).data_ptr(),
                room,
                num_blocks,
            ),
            np.int64,
        )
        run_on_team(self._arrange, arguments)
        arguments[products.NEXT] = 0
        run_on_team(self._multiply, arguments)

    def _rows_at_a_time(self, width: int) -> int:
        num_panels = MAX_PANEL_BYTES // (4 * self._products.panel_values(width))
        return int(max(1, num_panels) * self._products.BLOCK_ROWS)


def operands(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[int, ...]:
    """Sizes and addresses of a product, in the order in which argument blocks of kernels for few
    and for many rows have them. The caller keeps the tensors alive."""
    return (
        x.shape[0],
        *weight.shape,
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )


def blocks_at_a_time(num_blocks: int) -> int:
    """So many that the busiest thread has least to do; among equals the most."""
    threads = torch.get_num_threads()

    def blocks_of_busiest(size: int) -> int:
        return ceil(ceil(num_blocks / size) / threads) * size

    smallest = max(1, min(MIN_BLOCKS, num_blocks // threads))
    return min(range(MAX_BLOCKS, smallest - 1, -1), key=blocks_of_busiest)
