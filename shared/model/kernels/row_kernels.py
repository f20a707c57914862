"""Row by row in one call: when a norm, a sum, a gate, a rotation or a write to the cache is a
compiled kernel's, and its call.

In: bfloat16 rows. Out: rows, or None where torch has to do it. A row's result does not depend on
the rows beside it.
"""

from __future__ import annotations

import numpy as np
import torch

from shared.model.kernels.choice import has_compiled_kernels
from shared.model.kernels.narrow import VECTOR_LANES
from shared.model.kernels.team import run_on_team

MAX_SINGLE_VALUES = 16 * 1024
"""So few values are computed on the calling thread: waking the others would take longer."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """`weight * x / sqrt(mean(x^2) + eps)` of bfloat16 rows `[num_rows, width]` on a CPU."""
    if not _is_fit(x, x.shape[-1]) or weight.dtype != x.dtype:
        return None
    from shared.model.kernels import norms

    out = torch.empty(x.shape, dtype=x.dtype)
    arguments = np.array(
        (
            0,
            *x.shape,
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            out.data_ptr(),
            _bits(eps),
        ),
        np.int64,
    )
    run_on_team(norms.norm_bf16.address, arguments, single=x.numel() <= MAX_SINGLE_VALUES)
    return out


def norm_heads(
    heads: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, num_q: int
) -> torch.Tensor | None:
    """`rms_norm` of each of the bfloat16 heads `[num_tokens, heads, head_dim]` on a CPU: the first
    `num_q` with the weight of queries, the others with that of keys."""
    num_tokens, num_heads, head_dim = heads.shape
    is_fit = heads.dtype == torch.bfloat16 and heads.device.type == "cpu" and has_compiled_kernels()
    if not is_fit or head_dim % VECTOR_LANES or heads.stride()[1:] != (head_dim, 1):
        return None
    if {q_weight.dtype, k_weight.dtype} != {heads.dtype}:
        return None
    from shared.model.kernels import norms

    out = torch.empty(heads.shape, dtype=heads.dtype)
    arguments = np.array(
        (
            0,
            num_tokens,
            head_dim,
            heads.data_ptr(),
            heads.stride(0),
            q_weight.data_ptr(),
            out.data_ptr(),
            _bits(eps),
            num_heads,
            num_q,
            k_weight.data_ptr(),
        ),
        np.int64,
    )
    single = heads.numel() <= MAX_SINGLE_VALUES
    run_on_team(norms.norm_heads_bf16.address, arguments, single=single)
    return out


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    """`x + y` of bfloat16 rows `[num_rows, width]` on a CPU."""
    if not (_is_fit(x, x.shape[-1]) and _is_fit(y, x.shape[-1])) or x.shape != y.shape:
        return None
    from shared.model.kernels import additions

    out = torch.empty(x.shape, dtype=x.dtype)
    arguments = np.array(
        (
            0,
            *x.shape,
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            y.stride(0),
            out.data_ptr(),
        ),
        np.int64,
    )
    run_on_team(additions.add_bf16.address, arguments, single=x.numel() <= MAX_SINGLE_VALUES)
    return out


def write_cache(
    slots: torch.Tensor, slot_mapping: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> bool:
    """Rows `k` and `v` `[num_tokens, kv_heads, head_dim]` into one layer's `slots`
    `[2, num_slots, kv_heads, head_dim]`; False where torch has to do it."""
    heads_are_packed = all(each.stride()[1:] == (k.shape[2], 1) for each in (k, v))
    is_fit = k.dtype == torch.bfloat16 and k.device.type == "cpu" and has_compiled_kernels()
    if not (is_fit and heads_are_packed and slots[0].is_contiguous()):
        return False
    if slots.dtype != k.dtype or v.dtype != k.dtype or not slot_mapping.is_contiguous():
        return False
    from shared.model.kernels import cache_rows

    num_tokens, heads, head_dim = k.shape
    arguments = np.array(
        (
            0,
            num_tokens,
            heads * head_dim,
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            slot_mapping.data_ptr(),
            slots[0].data_ptr(),
            slots[1].data_ptr(),
        ),
        np.int64,
    )
    run_on_team(cache_rows.write_bf16.address, arguments, single=k.numel() <= MAX_SINGLE_VALUES)
    return True


def swiglu(gate_up: torch.Tensor) -> torch.Tensor | None:
    """`silu(gate) * up` of bfloat16 rows `[num_rows, 2 * width]` on a CPU, `gate` first."""
    width = gate_up.shape[-1] // 2
    if not _is_fit(gate_up, width):
        return None
    from shared.model.kernels import gates

    out = torch.empty(gate_up.shape[0], width, dtype=gate_up.dtype)
    arguments = np.array(
        (
            0,
            gate_up.shape[0],
            width,
            gate_up.data_ptr(),
            gate_up.stride(0),
            out.data_ptr(),
        ),
        np.int64,
    )
    single = gate_up.numel() <= MAX_SINGLE_VALUES
    run_on_team(gates.swiglu_bf16.address, arguments, single=single)
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin_signed: torch.Tensor) -> torch.Tensor | None:
    """`x cos + swapped(x) sin_signed` of bfloat16 heads `[num_tokens, heads, head_dim]` on a CPU.

    `cos` and `sin_signed` are `[num_tokens, 1, head_dim]`, bfloat16 or float32; heads are swapped
    half by half.
    """
    num_tokens, heads, head_dim = x.shape
    is_fit = x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_compiled_kernels()
    if not is_fit or head_dim % (2 * VECTOR_LANES) or x.stride()[1:] != (head_dim, 1):
        return None
    if cos.dtype != sin_signed.dtype or cos.dtype not in (torch.bfloat16, torch.float32):
        return None
    if not (cos.is_contiguous() and sin_signed.is_contiguous()):
        return None
    from shared.model.kernels import rotations

    is_wide = cos.dtype == torch.float32
    kernel = rotations.rotate_bf16_by_f32 if is_wide else rotations.rotate_bf16
    out = torch.empty(x.shape, dtype=x.dtype)
    arguments = np.array(
        (
            0,
            num_tokens,
            heads,
            head_dim,
            x.data_ptr(),
            x.stride(0),
            cos.data_ptr(),
            sin_signed.data_ptr(),
            out.data_ptr(),
        ),
        np.int64,
    )
    run_on_team(kernel.address, arguments, single=x.numel() <= MAX_SINGLE_VALUES)
    return out


def _bits(number: float) -> int:
    """A float32 as an argument block holds it."""
    return int(np.float32(number).view(np.int32))


def _is_fit(x: torch.Tensor, width: int) -> bool:
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.ndim == 2
        and x.stride(1) == 1
        and width % VECTOR_LANES == 0
        and has_compiled_kernels()
    )
