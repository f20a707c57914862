"""Linear maps of few rows, which take as long as their weights take to be read.

In: the rows of a decode step and a weight. Out: their product, in parts where a weight has too few
rows to keep the device busy: then its columns are divided among programs, and the kernel that reads
the result adds them up (split-K). How a product is cut up depends on the weight and on the tile
that its rows fill, and sums have a fixed order: a row's result is the same, bit for bit, in every
company of up to 16, and in every larger one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shared.model.gpu.overlap import launch_options, prefetch_rows, wait_for_others
from shared.model.gpu.parts import Parts
from shared.model.gpu.tile import IS_INTERPRETED, dot

WEIGHT_ROWS = 64
COLUMNS_AT_A_TIME = 128
PREFETCHED_COLUMNS = 256
"""Of each row that a program reads first; 512 and more only got into the way of others."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How many rows one program multiplies, how many steps ahead it loads, and how many of such
    programs fit a multiprocessor of Hopper. Each keeps 80 KiB or more under way."""

    rows: int
    num_stages: int
    per_multiprocessor: int

    @classmethod
    def of(cls, num_rows: int) -> Tile:
        """The smallest that holds so many rows."""
        if num_rows <= SMALL_TILE.rows:
            return SMALL_TILE
        return cls(triton.next_power_of_2(num_rows), num_stages=5, per_multiprocessor=1)


SMALL_TILE = Tile(16, num_stages=4, per_multiprocessor=2)

INTERPRETED_MULTIPROCESSORS = 4
ELEMENTS_PER_PROGRAM = 1024


def few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | Parts:
    """`x` `[num_rows, in_features]` times `weight` `[out_features, in_features]`, transposed.

    Rows of `x` may be apart, their values not.
    """
    num_rows, width_in = x.shape
    width_out = weight.shape[0]
    if x.stride(1) != 1 or not weight.is_contiguous() or weight.shape[1] != width_in:
        raise ValueError(
            f"rows {tuple(x.shape)}, strides {x.stride()}, "
            f"for a weight {tuple(weight.shape)}, strides {weight.stride()}"
        )
    tile = Tile.of(num_rows)
    num_parts = parts_of(weight, tile)
    is_whole = num_parts == 1
    shape = (num_rows, width_out) if is_whole else (num_parts, num_rows, width_out)
    out = torch.empty(shape, dtype=x.dtype if is_whole else torch.float32, device=x.device)
    _few_rows[(triton.cdiv(width_out, WEIGHT_ROWS), num_parts)](
        out,
        x,
        weight,
        weight if bias is None else bias,
        num_rows,
        x.stride(0),
        width_in=width_in,
        width_out=width_out,
        num_parts=num_parts,
        has_bias=is_whole and bias is not None,
        block_m=tile.rows,
        block_n=WEIGHT_ROWS,
        block_k=COLUMNS_AT_A_TIME,
        num_prefetched=PREFETCHED_COLUMNS,
        wide=x.dtype == torch.float32 or IS_INTERPRETED,
        num_warps=4,
        num_stages=tile.num_stages if x.element_size() == 2 else 2,
        **launch_options(x),
    )
    return out if is_whole else Parts(out, bias, x.dtype)


def parts_of(weight: torch.Tensor, tile: Tile) -> int:
    """Among how many programs the columns of a weight are divided: as fit the device at once."""
    num_programs = _multiprocessors(weight.device) * tile.per_multiprocessor
    num_tiles = -(-weight.shape[0] // WEIGHT_ROWS)
    num_steps = -(-weight.shape[1] // COLUMNS_AT_A_TIME)
    return max(1, min(num_programs // num_tiles, num_steps))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def sum_parts(parts: Parts, residual: torch.Tensor | None = None) -> torch.Tensor:
    """See `Parts.sum`; `residual` `[num_rows, width]`, contiguous."""
    num_parts, num_rows, width = parts.pieces.shape
    if residual is not None and (
        residual.shape != (num_rows, width) or not residual.is_contiguous()
    ):
        raise ValueError(
            f"residual {tuple(residual.shape)}, strides {residual.stride()}, for {num_rows} rows "
            f"of {width}"
        )
    out = torch.empty(num_rows, width, dtype=parts.dtype, device=parts.pieces.device)
    _sum_parts[(num_rows, triton.cdiv(width, ELEMENTS_PER_PROGRAM))](
        out,
        parts.pieces,
        out if parts.bias is None else parts.bias,
        out if residual is None else residual,
        parts.pieces.stride(0),
        width=width,
        num_parts=num_parts,
        has_bias=parts.bias is not None,
        has_residual=residual is not None,
        block_w=ELEMENTS_PER_PROGRAM,
        num_warps=4,
        **launch_options(out),
    )
    return out


@triton.jit
def load_sum(
    address: tl.tensor,
    mask: tl.tensor,
    bias: tl.tensor,
    part_stride: tl.tensor,
    num_parts: tl.constexpr,
    has_bias: tl.constexpr,
) -> tl.tensor:
    """Values at `address`, over all parts, with the values at `bias` added; float32."""
    values = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, num_parts):
        values += tl.load(address + part * part_stride, mask=mask, other=0.0).to(tl.float32)
    if has_bias:
        values += tl.load(bias, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    width_in: tl.constexpr,
    width_out: tl.constexpr,
    num_parts: tl.constexpr,
    has_bias: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    num_prefetched: tl.constexpr,
    wide: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: some rows of the weight, some of their columns, all rows of `x`."""
    part = tl.program_id(1)
    num_steps: tl.constexpr = (width_in + block_k - 1) // block_k
    first = part * num_steps // num_parts * block_k
    stop = (part + 1) * num_steps // num_parts * block_k
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    row = tl.arange(0, block_m)
    is_column, is_row = column < width_out, row < num_rows
    channel = tl.arange(0, block_k)
    # Behind its last row the weight is read there once more, and the result not kept.
    source = tl.where(is_column, column, width_out - 1).to(tl.int64)
    w_address = weight + source[:, None] * width_in + channel[None, :]
    if overlaps and num_prefetched > 0:
        # Nobody writes weights: the first of them come while the kernel before is at work.
        prefetch_rows(weight + source * width_in, first, width_in, num_prefetched)
    wait_for_others(overlaps)
    x_address = x + row.to(tl.int64)[:, None] * x_stride + channel[None, :]
    total = tl.zeros([block_n, block_m], tl.float32)
    for start in range(first, stop, block_k):
        # A step reads each weight once, so they need not stay in a cache.
        if width_in % block_k == 0:
            rows = tl.load(x_address + start, mask=is_row[:, None], other=0.0)
            w = tl.load(w_address + start, eviction_policy="evict_first")
        else:
            is_there = (start + channel < width_in)[None, :]
            rows = tl.load(x_address + start, mask=is_row[:, None] & is_there, other=0.0)
            w = tl.load(w_address + start, mask=is_there, other=0.0, eviction_policy="evict_first")
        total += dot(w, tl.trans(rows), wide)
    if has_bias:
        total += tl.load(bias + source).to(tl.float32)[:, None]
    place = (part * num_rows + row).to(tl.int64)[None, :] * width_out + column[:, None]
    mask = is_row[None, :] & is_column[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_parts(
    out: tl.tensor,
    pieces: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    part_stride: tl.tensor,
    width: tl.constexpr,
    num_parts: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    block_w: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: some columns of one row."""
    wait_for_others(overlaps)
    column = tl.program_id(1) * block_w + tl.arange(0, block_w)
    mask = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    values = load_sum(pieces + place, mask, bias + column, part_stride, num_parts, has_bias)
    if has_residual:
        values += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=mask)
