"""Attention within packed sequences in one call.

In: queries, keys and values of all patches, and where each sequence ends. Out: their attention. It
is torch's own (FlashAttention-2, Dao 2023). Without it transformers attends sequence by sequence,
which for windows of 64 patches is a launch for each of them.
"""

from __future__ import annotations

import importlib.util

import torch

DTYPES = frozenset({torch.bfloat16, torch.float16})


def has_varlen() -> bool:
    """Whether this torch has such a call (2.10 and later)."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """`[num_patches, heads, head_dim]` each, and the result.

    `bounds` `[num_sequences + 1]` int32 bounds the sequences, none longer than `longest`.
    """
    from torch.nn.attention import varlen

    out = varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale)
    assert isinstance(out, torch.Tensor)
    return out
