"""Row by row in one call: when a norm, a gate or a rotation is a compiled kernel's, and its call.

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
    eps_bits = int(np.float32(eps).view(np.int32))
    arguments = np.array(
        (
            0,
            *x.shape,
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            out.data_ptr(),
            eps_bits,
        ),
        np.int64,
    )
    run_on_team(norms.norm_bf16.address, arguments, single=x.numel() <= MAX_SINGLE_VALUES)
    return out


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

    `cos` and `sin_signed` are `[num_tokens, 1, head_dim]`; heads are swapped half by half.
    """
    num_tokens, heads, head_dim = x.shape
    is_fit = x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_compiled_kernels()
    if not is_fit or head_dim % (2 * VECTOR_LANES) or x.stride()[1:] != (head_dim, 1):
        return None
    if cos.dtype != x.dtype or not (cos.is_contiguous() and sin_signed.is_contiguous()):
        return None
    from shared.model.kernels import rotations

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
    run_on_team(rotations.rotate_bf16.address, arguments, single=x.numel() <= MAX_SINGLE_VALUES)
    return out


def _is_fit(x: torch.Tensor, width: int) -> bool:
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.ndim == 2
        and x.stride(1) == 1
        and width % VECTOR_LANES == 0
        and has_compiled_kernels()
    )
