"""What the reading plans of compiled attention have in common.

In: a step and the cache that it reads. Out: the parts of a kernel's argument block that are the
same for every layer. Which kernel that is and how it divides its work is for each plan to say.
"""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import TORCH_DTYPES, KvCache
from shared.model.batch import ForwardBatch
from shared.model.kernels.choice import attends_in_pairs

if TYPE_CHECKING:
    from shared.model.kernels.machine_code import Kernel


class KernelPlan:
    """The C function at `kernel` reads the pages of `kv` that the step's block tables name."""

    def __init__(
        self,
        kernel: int,
        batch: ForwardBatch,
        kv: KvCache,
        sliding_windows: tuple[int | None, ...],
    ) -> None:
        self._kernel = kernel
        self._windows = sliding_windows or tuple(repeat(None, kv.geometry.num_layers))
        self._tables = batch.block_tables.contiguous()


def for_format(geometry: KvGeometry, *, float32: Kernel, bf16: Kernel, pairs: Kernel) -> Kernel:
    """Which of these reads such a cache; `pairs` multiplies bfloat16 as it is."""
    if geometry.dtype == "float32":
        return float32
    return pairs if attends_in_pairs(TORCH_DTYPES[geometry.dtype], geometry.head_dim) else bf16


def with_packed_heads(q: torch.Tensor) -> torch.Tensor:
    """`[num_tokens, heads, head_dim]` as kernels walk it: a token's heads one behind the other;
    tokens may lie apart."""
    return q if q.stride()[1:] == (q.shape[2], 1) else q.contiguous()
