"""Attention on a CPU: compiled kernels over pages where they can, PyTorch where they cannot.

In and out: as `shared/model/attention.py` says. A step in which every sequence brings one token
is one call per layer, whatever the batch; nothing of the cache is copied or gathered. Steps with
longer sequences are `PromptPlan`'s; other number formats and head sizes go to `SdpaAttention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.attention import AttentionPlan, SdpaAttention
from shared.model.batch import ForwardBatch
from shared.model.kernel_plan import KernelPlan, for_format, with_packed_heads
from shared.model.kernels.choice import has_compiled_kernels
from shared.model.kernels.narrow import VECTOR_LANES
from shared.model.kernels.team import run_on_team
from shared.model.prompt_attention import PromptPlan, prompt_kernel

if TYPE_CHECKING:
    from shared.model.kernels.machine_code import Kernel

DTYPES = ("bfloat16", "float32")


class CpuAttention:
    """Chooses per step. Bidirectional spans do not concern a step of single tokens."""

    def __init__(self, geometry: KvGeometry | None = None) -> None:
        """Kernels for such caches are compiled now: a first request must not wait for them."""
        self._other = SdpaAttention()
        if geometry is not None and _has_kernels(geometry):
            _compile_for(geometry)

    def plan(
        self, batch: ForwardBatch, kv: KvCache, sliding_windows: Sequence[int | None] = ()
    ) -> AttentionPlan:
        if kv.device.type == "cpu" and _has_kernels(kv.geometry):
            kind = PagedPlan if _is_decode(batch) else PromptPlan
            return kind(batch, kv, tuple(sliding_windows))
        return self._other.plan(batch, kv, *([sliding_windows] if sliding_windows else []))


def _compile_for(geometry: KvGeometry) -> None:
    from shared.model.kernels import (
        additions,
        cache_rows,
        gates,
        norms,
        rotations,
        sequences,
    )

    kernels = [token_kernel(geometry), prompt_kernel(geometry)]
    if geometry.dtype == "bfloat16":
        kernels += [
            norms.norm_bf16,
            norms.norm_heads_bf16,
            gates.swiglu_bf16,
            rotations.rotate_bf16,
        ]
        kernels += [additions.add_bf16, cache_rows.write_bf16, sequences.run_all]
    for kernel in kernels:
        kernel.compile()


def _is_decode(batch: ForwardBatch) -> bool:
    return batch.num_tokens == batch.num_seqs


def _has_kernels(geometry: KvGeometry) -> bool:
    is_fit = geometry.dtype in DTYPES and geometry.head_dim % VECTOR_LANES == 0
    return is_fit and has_compiled_kernels()


def token_kernel(geometry: KvGeometry) -> Kernel:
    """What computes single tokens over such a cache. numba is needed from here on."""
    from shared.model.kernels import pages

    return for_format(
        geometry,
        float32=pages.attend_float32,
        bf16=pages.attend_bf16,
        pairs=pages.attend_pairs,
    )


class PagedPlan(KernelPlan):
    """Reading plan of a step of single tokens.

    `kernel` is `token_kernel`'s choice unless it is given, as tests and benches do.
    """

    def __init__(
        self,
        batch: ForwardBatch,
        kv: KvCache,
        sliding_windows: tuple[int | None, ...],
        kernel: Kernel | None = None,
    ) -> None:
        kernel = kernel or token_kernel(kv.geometry)
        super().__init__(kernel.address, batch, kv, sliding_windows)
        self._contexts = batch.context_lens.contiguous()

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KvCache
    ) -> torch.Tensor:
        """As `AttentionPlan.attend`; `k` and `v` are in the cache already and are read there."""
        num_seqs, num_heads, head_dim = q.shape
        q = with_packed_heads(q)
        keys, values = kv.layer_slots(layer)
        out = torch.empty(num_seqs, num_heads * head_dim, dtype=q.dtype)
        arguments = np.array(
            (
                0,
                num_seqs,
                num_heads,
                keys.shape[1],
                head_dim,
                kv.block_size,
                self._tables.shape[1],
                self._windows[layer] or 0,
                q.data_ptr(),
                q.stride(0),
                keys.data_ptr(),
                values.data_ptr(),
                self._tables.data_ptr(),
                self._contexts.data_ptr(),
                out.data_ptr(),
            ),
            np.int64,
        )
        run_on_team(self._kernel, arguments)
        return out
