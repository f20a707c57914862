"""Kernels that start while the one before them is still at work (programmatic dependent launch,
CUDA programming guide; Hopper and later).

In: a kernel launched with `launch_options`. It lets the next one start and then waits until all
before it have ended: what remains hidden is the time that a launch takes. Every program of such a
kernel has to wait, whether it has work or not: else the next one could pass by those in front of
it. On other devices, and under the interpreter, nothing overlaps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.model.gpu.fused import HOPPER, MAX_ROWS
from shared.model.gpu.tile import IS_INTERPRETED

LINE_BYTES = tl.constexpr(128)


def launch_options(rows: torch.Tensor) -> dict[str, Any]:
    """Arguments of a launch whose kernel begins with `wait_for_others(overlaps)`.

    Only for few rows (the first dimension) of 16-bit values, whose products overlap as well:
    between others it costs more than it saves.
    """
    is_few = rows.shape[0] <= MAX_ROWS and rows.element_size() == 2
    if is_few and can_overlap(rows.device):
        return {"overlaps": True, "launch_pdl": True}
    return {"overlaps": False}


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether this device starts kernels early."""
    if IS_INTERPRETED or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= HOPPER


@triton.jit
def wait_for_others(overlaps: tl.constexpr) -> None:
    """Let the next kernel start, and wait for all before this one."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch_rows(
    base: tl.tensor, first: tl.tensor, width: tl.constexpr, num_values: tl.constexpr
) -> None:
    """Bring `num_values` values of each row at `base`, from the `first` on, into the L2 cache
    without waiting for them; rows have `width` values."""
    per_line: tl.constexpr = LINE_BYTES * 8 // base.dtype.element_ty.primitive_bitwidth
    line = tl.arange(0, num_values // per_line) * per_line
    place = tl.minimum(first + line, width - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [base[:, None] + place[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
