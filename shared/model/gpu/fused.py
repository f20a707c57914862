"""Small operations of the decoder as one kernel each, where that is possible.

In: what the plain operation takes. Out: what it gives. `takes` says whether a tensor is on a GPU
that triton can program; everywhere else the caller computes as before. Importing this module needs
no triton.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from shared.model.gpu.parts import Parts

KERNEL_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})


@cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def takes(x: torch.Tensor) -> bool:
    """Whether the functions below are for this tensor."""
    return x.is_cuda and x.numel() > 0 and x.dtype in KERNEL_DTYPES and has_triton()


MAX_ROWS = 64
"""Rows up to which a linear map takes about as long as reading its weight."""

HOPPER = (9, 0)


def takes_few_rows(x: torch.Tensor) -> bool:
    """Whether `few_rows` is for these rows: Hopper's GPUs were measured, others keep theirs."""
    return (
        x.ndim == 2
        and x.shape[0] <= MAX_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and takes(x)
        and torch.cuda.get_device_capability(x.device) >= HOPPER
    )


def few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | Parts:
    """`x` `[num_rows, in_features]` times `weight`, transposed; perhaps in parts."""
    from shared.model.gpu import few_rows as kernel

    return kernel.few_rows(x, weight, bias)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False
) -> torch.Tensor:
    """Normalise the last of two or three dimensions; see `shared.model.norm`."""
    from shared.model.gpu import rms_norm as kernel

    return kernel.rms_norm(x, weight, eps, unit_offset=unit_offset)


def add_rms_norm(
    x: torch.Tensor | Parts,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x + residual` and its normalisation, both `[num_tokens, width]`."""
    from shared.model.gpu import rms_norm as kernel

    return kernel.add_rms_norm(x, residual, weight, eps, unit_offset=unit_offset)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin_signed: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[num_tokens, heads, head_dim]`; see `shared.model.rope`."""
    from shared.model.gpu import rotary

    return rotary.rotate(x, cos, sin_signed)


def rotate_into_cache(
    qk: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin_signed: torch.Tensor,
    cached: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """`rotate` of query and key heads together, and `write_cache` of these keys with `v`."""
    from shared.model.gpu import rotary

    return rotary.rotate(qk, cos, sin_signed, rotary.CacheRows(cached, slot_mapping, v))


def rotate_parts_into_cache(
    heads: Parts,
    cos: torch.Tensor,
    sin_signed: torch.Tensor,
    cached: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """The same of query, key and value heads that are still in parts."""
    from shared.model.gpu import rotary

    return rotary.rotate_parts(heads, cos, sin_signed, cached, slot_mapping)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, `[num_tokens, 2 * width]` to `[num_tokens, width]`."""
    from shared.model.gpu import swiglu as kernel

    return kernel.swiglu(gate_up)


def write_cache(
    cached: torch.Tensor, slot_mapping: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Store new keys and values in one layer of a cache; see `shared.cache.kv_cache`."""
    from shared.model.gpu import cache_write

    cache_write.write_cache(cached, slot_mapping, k, v)
