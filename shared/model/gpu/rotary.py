"""Rotation of query and key heads by their positions, halves against each other.

In: heads and the cosines and signed sines of `shared.model.rope.Rotary`, which already hold
whatever position axes there are. Out: rotated heads, contiguous, and on request keys and values in
the cache by the same launch. Computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


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
    num_tokens, num_heads, head_dim = x.shape
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
    _rotate[(num_tokens,)](
        out,
        x,
        cos.contiguous(),
        sin_signed.contiguous(),
        x.stride(0),
        out if into is None else into.cached[0],
        out if into is None else into.cached[1],
        cos if into is None else into.slot_mapping,
        x if into is None else into.v,
        0 if into is None else into.v.stride(0),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        half=head_dim // 2,
        block_h=triton.next_power_of_2(num_heads),
        block_d=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )
    return out


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
    token_stride: tl.tensor,
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
) -> None:
    """One program: all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, block_h)
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
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    target = out + token * (num_heads * 2 * half) + place
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
        tl.store(values + slot + row, tl.load(value, mask=is_key), mask=is_key)
        tl.store(values + slot + row + half, tl.load(value + half, mask=is_key), mask=is_key)
