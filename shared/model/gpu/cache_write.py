"""Keys and values of new tokens into the slots of a paged cache, both in one launch.

In: one layer of the cache by slot, the slots, keys and values. Out: the cache, written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def write_cache(
    cached: torch.Tensor, slot_mapping: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Store `k` and `v` `[num_tokens, kv_heads, head_dim]` in `cached`.

    `cached` is `[2, num_slots, kv_heads, head_dim]`, contiguous; heads of a token must be
    contiguous too, tokens may be apart. Each slot of `slot_mapping` `[num_tokens]` occurs once.
    """
    num_kv_heads, head_dim = cached.shape[2:]
    for name, new in (("k", k), ("v", v)):
        if new.shape[1:] != cached.shape[2:] or new.stride()[1:] != (head_dim, 1):
            raise ValueError(
                f"{name} of shape {tuple(new.shape)}, strides {new.stride()} "
                f"for a cache of {num_kv_heads} heads of {head_dim}"
            )
    width = num_kv_heads * head_dim
    block_w = triton.next_power_of_2(width)
    _write[(k.shape[0],)](
        cached[0],
        cached[1],
        slot_mapping,
        k,
        v,
        k.stride(0),
        v.stride(0),
        width=width,
        block_w=block_w,
        num_warps=4,
    )


@triton.jit
def _write(
    keys: tl.tensor,
    values: tl.tensor,
    slot_mapping: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    width: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """One program: one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block_w)
    mask = column < width
    slot = tl.load(slot_mapping + token).to(tl.int64)
    new_k = tl.load(k + token * k_stride + column, mask=mask)
    new_v = tl.load(v + token * v_stride + column, mask=mask)
    tl.store(keys + slot * width + column, new_k, mask=mask)
    tl.store(values + slot * width + column, new_v, mask=mask)
