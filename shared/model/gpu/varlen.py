"""Attention within packed sequences in one call, as transformers calls attention.

In: queries, keys and values of all patches, and where each sequence ends. Out: their attention. It
is torch's own (FlashAttention-2, Dao 2023). Without it transformers attends sequence by sequence,
which for windows of 64 patches is a launch for each of them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

IMPLEMENTATION = "triptych_flash_varlen"
"""transformers hands bounds of sequences only to implementations with `flash` in their name."""

DTYPES = frozenset({torch.bfloat16, torch.float16})


def has_varlen() -> bool:
    """Whether this torch has such a call (2.10 and later)."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`[1, heads, num_patches, head_dim]` each; returns `[1, num_patches, heads, head_dim]`.

    `cu_seq_lens_q` `[num_sequences + 1]` int32 bounds the sequences, none longer than
    `max_length_q`.
    """
    from torch.nn.attention import varlen

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    bounds, longest = cu_seq_lens_q, max_length_q
    out = varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling)
    assert isinstance(out, torch.Tensor)
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, attend)
