"""Attention within the windows of a vision tower, rotation included.

In: query, key and value heads of all patches as one product gives them, cosines and sines as
transformers gives them, and where each window ends. Out: attention of each patch over its own
window. A program holds a whole window of one head at a time, so no score is looked at twice, and
heads are read and written once: at 64 patches there is little else to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shared.model.gpu.tile import HIDDEN_SCORE, IS_INTERPRETED, LOG2_E, dot, padded_head_dim

MAX_PATCHES = 64
"""Of a window; a program keeps scores of all pairs."""

NUM_PROGRAMS = 1024
"""As many as keep a large GPU busy. Where there are more windows than that, a program takes several
heads: they share their angles, which are as many bytes as a head."""


def window_attention(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bounds: torch.Tensor, scale: float
) -> torch.Tensor:
    """`heads` `[num_patches, 3, num_heads, head_dim]`, contiguous, to `[num_patches, num_heads,
    head_dim]`.

    `cos` and `sin` `[num_patches, head_dim]` float32; `bounds` `[num_windows + 1]` int32, no window
    larger than `MAX_PATCHES`. Heads are rotated in float32 and rounded once.
    """
    num_patches, _, num_heads, head_dim = heads.shape
    out = torch.empty(num_patches, num_heads, head_dim, dtype=heads.dtype, device=heads.device)
    num_windows = bounds.shape[0] - 1
    group = 1
    while num_heads % (2 * group) == 0 and num_windows * num_heads // (2 * group) >= NUM_PROGRAMS:
        group *= 2
    block_a = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - block_a)
    _window_attention[(num_windows, num_heads // group)](
        out,
        heads,
        cos,
        sin,
        bounds,
        scale * LOG2_E,
        group,
        num_heads=num_heads,
        head_dim=head_dim,
        block_l=MAX_PATCHES,
        block_a=block_a,
        block_b=max(16, triton.next_power_of_2(rest)) if rest else 0,
        block_d=padded_head_dim(head_dim),
        wide=heads.dtype == torch.float32 or IS_INTERPRETED,
        num_warps=4,
        num_stages=1,
    )
    return out


@triton.jit(do_not_specialize=["group"])
def _window_attention(
    out: tl.tensor,
    heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    bounds: tl.tensor,
    scale: tl.tensor,
    group: tl.tensor,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_l: tl.constexpr,
    block_a: tl.constexpr,
    block_b: tl.constexpr,
    block_d: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """One program: some heads of one window. Tiles have power-of-two sides: queries and keys of 80
    channels are tiles of 64 and of 16, which takes less to rotate than one of 128."""
    start = tl.load(bounds + tl.program_id(0))
    length = tl.load(bounds + tl.program_id(0) + 1) - start
    place = tl.arange(0, block_l)
    is_there = place < length
    row = (start + place).to(tl.int64)[:, None]
    width: tl.constexpr = num_heads * head_dim
    angle = row * head_dim
    a, mask_a = _channels(is_there, 0, block_a, head_dim)
    cos_a, sin_a = _angles(cos + angle, sin + angle, a, mask_a, head_dim)
    if block_b > 0:
        b, mask_b = _channels(is_there, block_a, block_b, head_dim)
        cos_b, sin_b = _angles(cos + angle, sin + angle, b, mask_b, head_dim)
    every, mask = _channels(is_there, 0, block_d, head_dim)
    for i in range(group):
        head = (tl.program_id(1) * group + i) * head_dim
        q = heads + row * (3 * width) + head
        scores = dot(
            _rotated(q, a, mask_a, cos_a, sin_a, head_dim),
            tl.trans(_rotated(q + width, a, mask_a, cos_a, sin_a, head_dim)),
            wide,
        )
        if block_b > 0:
            scores += dot(
                _rotated(q, b, mask_b, cos_b, sin_b, head_dim),
                tl.trans(_rotated(q + width, b, mask_b, cos_b, sin_b, head_dim)),
                wide,
            )
        scores = tl.where(is_there[None, :], scores * scale, HIDDEN_SCORE)
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        share = (1.0 / tl.sum(weights, 1))[:, None]
        weights = weights.to(heads.dtype.element_ty)
        v = tl.load(q + 2 * width + every, mask=mask, other=0.0)
        result = dot(weights, v, wide) * share
        tl.store(out + row * width + head + every, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _channels(
    is_there: tl.tensor, first: tl.constexpr, block: tl.constexpr, head_dim: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Channels `[1, block]` of a head, and where there is something `[block_l, block]`."""
    channel = (first + tl.arange(0, block))[None, :]
    if first + block <= head_dim:
        return channel, is_there[:, None]
    else:
        return channel, is_there[:, None] & (channel < head_dim)


@triton.jit
def _angles(
    cos: tl.tensor,
    sin: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    head_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and signed sines `[block_l, block]`: the first half of a head takes off."""
    sign = tl.where(channel < head_dim // 2, -1.0, 1.0)
    return (
        tl.load(cos + channel, mask=mask, other=0.0),
        tl.load(sin + channel, mask=mask, other=0.0) * sign,
    )


@triton.jit
def _rotated(
    base: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    head_dim: tl.constexpr,
) -> tl.tensor:
    """One head of each patch, `[block_l, block]`; a channel turns with the one half a head away."""
    half: tl.constexpr = head_dim // 2
    partner = tl.where(channel < half, channel + half, channel - half)
    values = tl.load(base + channel, mask=mask, other=0.0)
    partners = tl.load(base + partner, mask=mask, other=0.0)
    return (values.to(tl.float32) * cos + partners.to(tl.float32) * sin).to(values.dtype)
