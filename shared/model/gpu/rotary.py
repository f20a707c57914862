"""Rotation of query and key heads by their positions, halves against each other.

In: heads, which may still be in parts, and the cosines and signed sines of
`shared.model.rope.Rotary`, which already hold whatever position axes there are. Out: rotated heads,
and on request keys and values in the cache by the same launch. Computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shared.model.gpu.few_rows import load_sum
from shared.model.gpu.overlap import launch_options, wait_for_others
from shared.model.gpu.parts import Parts

HEADS_PER_PROGRAM = 16


@dataclass(frozen=True, slots=True, eq=False)
class CacheRows:
    """Where a step's keys and values go: one layer by slot, `[2, num_slots, kv_heads, head_dim]`,
    and the slot of each token. `v` `[num_tokens, kv_heads, head_dim]`; tokens may be apart."""

    cached: torch.Tensor
    slot_mapping: torch.Tensor
    v: torch.Tensor


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin_signed: torch.Tensor, into: CacheRows | None = None
) -> torch.Tensor:
    """Rotate `x` `[num_tokens, heads, head_dim]`; `cos` and `sin_signed` `[num_tokens, 1, dim]`.

    Heads of a token must be contiguous; tokens may be apart. With `into`, the last heads of `x` are
    the keys of `into.v`: rotated, they are written to the cache too, and the values with them.
    """
    num_tokens, _, head_dim = x.shape
    check_heads("x", x)
    if cos.shape != (num_tokens, 1, head_dim) or cos.shape != sin_signed.shape:
        raise ValueError(f"cosines {tuple(cos.shape)} do not fit heads {tuple(x.shape)}")
    num_kv_heads = 0
    if into is not None:
        check_heads("v", into.v)
        num_kv_heads = into.v.shape[1]
        if into.cached.shape[2:] != into.v.shape[1:]:
            raise ValueError(
                f"values {tuple(into.v.shape)} do not fit a cache of {tuple(into.cached.shape)}"
            )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(out, x, cos, sin_signed, into, num_kv_heads, None)
    return out


def rotate_parts(
    heads: Parts,
    cos: torch.Tensor,
    sin_signed: torch.Tensor,
    cached: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """The same of query, key and value heads in parts, in this order and side by side.

    Returns all of them, `[num_tokens, heads, head_dim]`; keys and values are in the cache, too.
    """
    num_tokens = heads.pieces.shape[1]
    num_kv_heads, head_dim = cached.shape[2:]
    every = heads.pieces[0].view(num_tokens, -1, head_dim)
    num_rotated = every.shape[1] - num_kv_heads
    out = torch.empty(every.shape, dtype=heads.dtype, device=every.device)
    into = CacheRows(cached, slot_mapping, every[:, num_rotated:])
    _launch(out, every[:, :num_rotated], cos, sin_signed, into, num_kv_heads, heads)
    return out


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin_signed: torch.Tensor,
    into: CacheRows | None,
    num_kv_heads: int,
    parts: Parts | None,
) -> None:
    """`x` and `into.v` lie in the first of `parts`, if there are any."""
    num_tokens, num_heads, head_dim = x.shape
    bias = None if parts is None else parts.bias
    block_h = min(HEADS_PER_PROGRAM, triton.next_power_of_2(num_heads))
    _rotate[(num_tokens, triton.cdiv(num_heads, block_h))](
        out,
        x,
        cos.contiguous(),
        sin_signed.contiguous(),
        x if bias is None else bias,
        out.stride(0),
        x.stride(0),
        0 if parts is None else parts.pieces.stride(0),
        out if into is None else into.cached[0],
        out if into is None else into.cached[1],
        cos if into is None else into.slot_mapping,
        x if into is None else into.v,
        0 if into is None else into.v.stride(0),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        half=head_dim // 2,
        block_h=block_h,
        block_d=triton.next_power_of_2(head_dim // 2),
        num_parts=1 if parts is None else parts.pieces.shape[0],
        has_bias=bias is not None,
        keeps_values=parts is not None,
        num_warps=4,
        **launch_options(out),
    )


def check_heads(name: str, x: torch.Tensor) -> None:
    """Raises `ValueError` unless the heads of a token lie side by side."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(f"heads of {name}, strides {x.stride()}, are not contiguous")


@triton.jit
def _rotate(
    out: tl.tensor,
    x: tl.tensor,
    cos: tl.tensor,
    sin_signed: tl.tensor,
    bias: tl.tensor,
    out_stride: tl.tensor,
    token_stride: tl.tensor,
    part_stride: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slot_mapping: tl.tensor,
    v: tl.tensor,
    v_stride: tl.tensor,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,
    block_h: tl.constexpr,
    block_d: tl.constexpr,
    num_parts: tl.constexpr,
    has_bias: tl.constexpr,
    keeps_values: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: some heads of one token."""
    wait_for_others(overlaps)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block_h + tl.arange(0, block_h)
    channel = tl.arange(0, block_d)
    is_channel = channel < half
    angle = token * (2 * half) + channel
    low_cos = tl.load(cos + angle, mask=is_channel, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + angle + half, mask=is_channel, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_signed + angle, mask=is_channel, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_signed + angle + half, mask=is_channel, other=0.0).to(tl.float32)

    mask = (head < num_heads)[:, None] & is_channel[None, :]
    place = head[:, None] * (2 * half) + channel[None, :]
    source = x + token * token_stride + place
    low = load_sum(source, mask, bias + place, part_stride, num_parts, has_bias)
    high = load_sum(source + half, mask, bias + place + half, part_stride, num_parts, has_bias)
    target = out + token * out_stride + place
    dtype = out.dtype.element_ty
    new_low = (low * low_cos + high * low_sin).to(dtype)
    new_high = (high * high_cos + low * high_sin).to(dtype)
    tl.store(target, new_low, mask=mask)
    tl.store(target + half, new_high, mask=mask)
    if num_kv_heads > 0:
        num_q_heads: tl.constexpr = num_heads - num_kv_heads
        is_key = mask & (head >= num_q_heads)[:, None]
        row = place - num_q_heads * (2 * half)
        slot = tl.load(slot_mapping + token).to(tl.int64) * (num_kv_heads * 2 * half)
        tl.store(keys + slot + row, new_low, mask=is_key)
        tl.store(keys + slot + row + half, new_high, mask=is_key)
        value = v + token * v_stride + row
        # Values stand behind all heads of `x`, and so do their biases and their results.
        behind: tl.constexpr = num_kv_heads * 2 * half
        v_bias = bias + behind + place
        low = load_sum(value, is_key, v_bias, part_stride, num_parts, has_bias).to(dtype)
        high = load_sum(value + half, is_key, v_bias + half, part_stride, num_parts, has_bias)
        high = high.to(dtype)
        tl.store(values + slot + row, low, mask=is_key)
        tl.store(values + slot + row + half, high, mask=is_key)
        if keeps_values:
            tl.store(target + behind, low, mask=is_key)
            tl.store(target + behind + half, high, mask=is_key)
