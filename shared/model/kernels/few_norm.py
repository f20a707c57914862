"""When a norm goes to the compiled kernel, and how it is called.

In: rows and a weight. Out: normalised rows, or None where torch has to do it.
"""

from __future__ import annotations

import numpy as np
import torch

from shared.model.kernels.choice import has_compiled_kernels
from shared.model.kernels.narrow import MAX_COMPILED_ROWS, VECTOR_LANES
from shared.model.kernels.team import run_on_team


def norm_of_few(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """`weight * x / sqrt(mean(x^2) + eps)` of bfloat16 rows `[num_rows, width]` on a CPU."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.ndim != 2:
        return None
    num_rows, width = x.shape
    is_fit = width % VECTOR_LANES == 0 and x.stride(1) == 1 and weight.dtype == x.dtype
    if num_rows > MAX_COMPILED_ROWS or not is_fit or not has_compiled_kernels():
        return None
    from shared.model.kernels import norms

    out = torch.empty(num_rows, width, dtype=x.dtype)
    eps_bits = int(np.float32(eps).view(np.int32))
    arguments = np.array(
        (
            0,
            num_rows,
            width,
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            out.data_ptr(),
            eps_bits,
        ),
        np.int64,
    )
    run_on_team(norms.norm_bf16.address, arguments, single=True)
    return out
