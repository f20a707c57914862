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
    """The product kernels, compiled when this is made: a first request must not wait for it."""

    def __init__(self) -> None:
        from shared.model.kernels import products

        self._products: Any = products

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`x` `[..., width]` to `[..., columns]`: bfloat16, or float32 with an int8 weight."""
        columns, width = weight.shape
        rows = x.reshape(-1, width)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype)
        step = self._rows_at_a_time(width)
        parts = zip(rows.split(step), out.view(-1, columns).split(step), strict=True)
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
                x.shape[0],
                columns,
                width,
                x.data_ptr(),
                x.stride(0),
                weight.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                out.data_ptr(),
                scratch("panels", num_panels, products.panel_values(width)).data_ptr(),
                scratch("team", torch.get_num_threads(), room).data_ptr(),
                room,
                num_blocks,
            ),
            np.int64,
        )
        arrange, multiply = self._kernels(x.dtype, weight.dtype)
        run_on_team(arrange, arguments)
        arguments[products.NEXT] = 0
        run_on_team(multiply, arguments)

    def _kernels(self, dtype: torch.dtype, stored: torch.dtype) -> tuple[int, int]:
        """Addresses of what arranges rows of `dtype`, and of what multiplies by weights."""
        products = self._products
        if stored == torch.bfloat16:
            return products.arrange_bf16.address, products.multiply_bf16.address
        if dtype == torch.bfloat16:
            return products.arrange_bf16.address, products.multiply_int8_to_bf16.address
        return products.arrange_float32.address, products.multiply_int8_to_float32.address

    def _rows_at_a_time(self, width: int) -> int:
        num_panels = MAX_PANEL_BYTES // (4 * self._products.panel_values(width))
        return int(max(1, num_panels) * self._products.BLOCK_ROWS)


def blocks_at_a_time(num_blocks: int) -> int:
    """So many that the busiest thread has least to do; among equals the most."""
    threads = torch.get_num_threads()

    def blocks_of_busiest(size: int) -> int:
        return ceil(ceil(num_blocks / size) / threads) * size

    smallest = max(1, min(MIN_BLOCKS, num_blocks // threads))
    return min(range(MAX_BLOCKS, smallest - 1, -1), key=blocks_of_busiest)
