"""The gated activation `silu(gate) * up` in one pass.

In: gate and up side by side, as the fused projection gives them. Out: their product, computed in
float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shared.model.gpu.overlap import launch_options, wait_for_others

COLUMNS_PER_PROGRAM = 1024


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`[num_tokens, 2 * width]` contiguous to `[num_tokens, width]`."""
    num_tokens, both = gate_up.shape
    if both % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate and up of shape {tuple(gate_up.shape)}, strides {gate_up.stride()}")
    out = torch.empty(num_tokens, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_tokens, triton.cdiv(both // 2, COLUMNS_PER_PROGRAM))
    _swiglu[grid](
        out,
        gate_up,
        both // 2,
        block_w=COLUMNS_PER_PROGRAM,
        num_warps=4,
        **launch_options(out),
    )
    return out


@triton.jit
def _swiglu(
    out: tl.tensor,
    gate_up: tl.tensor,
    width: tl.tensor,
    block_w: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: some columns of one token."""
    wait_for_others(overlaps)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block_w + tl.arange(0, block_w)
    mask = column < width
    source = gate_up + token * 2 * width + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + token * width + column, result.to(out.dtype.element_ty), mask=mask)
