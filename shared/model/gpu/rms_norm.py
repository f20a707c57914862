"""Root-mean-square normalisation in one pass, with or without a residual added first.

In: activations, which may still be in parts, and a weight. Out: the same shape and dtype; squares
are summed in float32 and the result is rounded where `shared.model.norm` rounds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shared.model.gpu.few_rows import load_sum
from shared.model.gpu.overlap import launch_options, wait_for_others
from shared.model.gpu.parts import Parts

ELEMENTS_PER_PROGRAM = 2048


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False
) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last of two or three dimensions of `x`.

    With `unit_offset` the factor is `1 + weight`, applied before rounding.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, None, weight, out, eps, unit_offset)
    return out


def add_rms_norm(
    x: torch.Tensor | Parts,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum `x + residual` and its normalisation, both `[num_tokens, width]`."""
    shape = x.pieces.shape[1:] if isinstance(x, Parts) else x.shape
    if residual.shape != shape:
        raise ValueError(f"residual of shape {tuple(residual.shape)} for {tuple(shape)}")
    residual = residual.contiguous()
    total = torch.empty(shape, dtype=x.dtype, device=residual.device)
    out = torch.empty_like(total)
    _launch(x, residual, total, weight, out, eps, unit_offset)
    return total, out


def _launch(
    x: torch.Tensor | Parts,
    residual: torch.Tensor | None,
    total: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    unit_offset: bool,
) -> None:
    # Rows of a token stand side by side; tokens, and parts, may be apart.
    first, bias, part_stride, num_parts = (
        (x.pieces[0], x.bias, x.pieces.stride(0), x.pieces.shape[0])
        if isinstance(x, Parts)
        else (x, None, 0, 1)
    )
    rows = first if first.ndim == 3 else first[:, None]
    if rows.stride(-1) != 1:
        raise ValueError(f"values of a row are {rows.stride(-1)} apart, expected 1")
    num_rows, width = rows.shape[0] * rows.shape[1], rows.shape[2]
    block_w = triton.next_power_of_2(width)
    block_r = max(1, ELEMENTS_PER_PROGRAM // block_w)
    _rms_norm[(triton.cdiv(num_rows, block_r),)](
        out,
        out if total is None else total,
        first,
        weight if bias is None else bias,
        out if residual is None else residual,
        weight,
        num_rows,
        rows.shape[1],
        rows.stride(0),
        rows.stride(1),
        part_stride,
        eps,
        num_parts=num_parts,
        has_bias=bias is not None,
        width=width,
        block_r=block_r,
        block_w=block_w,
        has_residual=residual is not None,
        unit_offset=unit_offset,
        num_warps=8 if block_w >= 4096 else 4,
        **launch_options(out),
    )


@triton.jit
def _rms_norm(
    out: tl.tensor,
    total: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    num_rows: tl.tensor,
    rows_per_token: tl.tensor,
    token_stride: tl.tensor,
    row_stride: tl.tensor,
    part_stride: tl.tensor,
    eps: tl.tensor,
    num_parts: tl.constexpr,
    has_bias: tl.constexpr,
    width: tl.constexpr,
    block_r: tl.constexpr,
    block_w: tl.constexpr,
    has_residual: tl.constexpr,
    unit_offset: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: `block_r` rows."""
    wait_for_others(overlaps)
    row = (tl.program_id(0) * block_r + tl.arange(0, block_r)).to(tl.int64)
    column = tl.arange(0, block_w)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    source = row // rows_per_token * token_stride + row % rows_per_token * row_stride
    packed = row[:, None] * width + column[None, :]
    address = x + source[:, None] + column[None, :]
    values = load_sum(address, mask, bias + column[None, :], part_stride, num_parts, has_bias)
    if has_residual:
        values += tl.load(residual + packed, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + packed, rounded, mask=mask)
        values = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / width + eps)
    normed = values * inverse[:, None]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if unit_offset:
        factor += 1.0
    else:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + packed, (normed * factor[None, :]).to(out.dtype.element_ty), mask=mask)
