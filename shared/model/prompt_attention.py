"""Attention of steps with longer sequences on a CPU, by the compiled kernel over pages.

In and out: as `shared/model/attention.py` says. The whole step is one call per layer; nothing of
the cache is copied or gathered, and no mask is built. `shared/model/kernels/prompts.py` computes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch
from shared.model.kernel_plan import KernelPlan, for_format, with_packed_heads
from shared.model.kernels.scratch import scratch
from shared.model.kernels.team import run_on_team

if TYPE_CHECKING:
    from shared.model.kernels.machine_code import Kernel

BLOCKS = 16
"""Blocks of queries in a piece of work: keys are arranged once for all of them."""


def prompt_kernel(geometry: KvGeometry) -> Kernel:
    """What computes prompts over such a cache. numba is needed from here on."""
    from shared.model.kernels import prompts

    return for_format(
        geometry,
        float32=prompts.attend_prompts_float32,
        bf16=prompts.attend_prompts_bf16,
        pairs=prompts.attend_prompts_pairs,
    )


class PromptPlan(KernelPlan):
    """Reading plan of a step whose sequences bring any number of tokens.

    `kernel` is `prompt_kernel`'s choice unless it is given, as tests and benches do.
    """

    def __init__(
        self,
        batch: ForwardBatch,
        kv: KvCache,
        sliding_windows: tuple[int | None, ...],
        kernel: Kernel | None = None,
    ) -> None:
        from shared.model.kernels import prompt_layout

        self._layout: Any = prompt_layout
        kernel = kernel or prompt_kernel(kv.geometry)
        super().__init__(kernel.address, batch, kv, sliding_windows)
        self._bounds: list[int] = batch.cu_seqlens_q.tolist()
        self._places = _places(batch)
        stops = self._places + 1 if batch.attend_stops is None else batch.attend_stops
        self._stops = stops.contiguous()
        self._work: tuple[torch.Tensor, int] | None = None

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KvCache
    ) -> torch.Tensor:
        """As `AttentionPlan.attend`; `k` and `v` are in the cache already and are read there."""
        num_tokens, num_heads, head_dim = q.shape
        q = with_packed_heads(q)
        keys, values = kv.layer_slots(layer)
        pieces, num_blocks = self._work or self._divide(num_heads // keys.shape[1])
        room = self._layout.scratch_values(head_dim, num_blocks)
        out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype)
        arguments = np.array(
            (
                0,
                0,
                pieces.shape[0],
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
                pieces.data_ptr(),
                self._places.data_ptr(),
                self._stops.data_ptr(),
                out.data_ptr(),
                scratch("team", torch.get_num_threads(), room).data_ptr(),
                room,
            ),
            np.int64,
        )
        run_on_team(self._kernel, arguments)
        return out

    def _divide(self, group: int) -> tuple[torch.Tensor, int]:
        """Pieces `[num_pieces, 3]` and the most blocks in one, with `group` heads per KV head."""
        num_rows = max(1, BLOCKS // group) * self._layout.BLOCK_COLUMNS
        pieces = [
            (seq, first, min(num_rows, stop - first))
            for seq, (start, stop) in enumerate(pairwise(self._bounds))
            for first in range(start, stop, num_rows)
        ]
        num_blocks = max(self._layout.num_blocks_of(group, rows) for _, _, rows in pieces)
        # The last pieces of a prompt see most: begun first, they leave no thread alone at the end.
        self._work = torch.tensor(pieces[::-1]), num_blocks
        return self._work


def _places(batch: ForwardBatch) -> torch.Tensor:
    """For each new token, how many of its sequence stand before it."""
    q_lens = batch.cu_seqlens_q.diff()
    first_places = batch.context_lens - q_lens - batch.cu_seqlens_q[:-1]
    return torch.arange(batch.num_tokens) + torch.repeat_interleave(first_places, q_lens)
