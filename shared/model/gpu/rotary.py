"""Rotation of query and key heads by their positions, halves against each other.

In: heads and the cosines and signed sines of `shared.model.rope.Rotary`, which already hold
whatever position axes there are. Out: rotated heads, contiguous. Computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rotate(x: torch.Tensor, cos: torch.Tensor, sin_signed: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[num_tokens, heads, head_dim]`; `cos` and `sin_signed` `[num_tokens, 1, dim]`.

    Heads of a token must be contiguous; tokens may be apart.
    """
    num_tokens, num_heads, head_dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != head_dim:
        raise ValueError(f"heads of strides {x.stride()} are not contiguous")
    if cos.shape != (num_tokens, 1, head_dim) or cos.shape != sin_signed.shape:
        raise ValueError(f"cosines {tuple(cos.shape)} do not fit heads {tuple(x.shape)}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate[(num_tokens,)](
        out,
        x,
        cos.contiguous(),
        sin_signed.contiguous(),
        x.stride(0),
        num_heads=num_heads,
        half=head_dim // 2,
        block_h=triton.next_power_of_2(num_heads),
        block_d=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )
    return out


@triton.jit
def _rotate(
    out: tl.tensor,
    x: tl.tensor,
    cos: tl.tensor,
    sin_signed: tl.tensor,
    token_stride: tl.tensor,
    num_heads: tl.constexpr,
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
    tl.store(target, (low * low_cos + high * low_sin).to(dtype), mask=mask)
    tl.store(target + half, (high * high_cos + low * high_sin).to(dtype), mask=mask)
