"""Attention over the paged cache with Triton kernels.

In: a packed step and the cache. Out: attention outputs, as `shared.model.attention` asks for them.
Planning never asks the device for a value, so a step can be queued behind the one before it and
captured in a CUDA graph. A sequence with one new token goes to the decode kernel whoever shares its
batch, so its result is the same in a batch of its own and beside a prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.cache.kv_cache import KvCache
from shared.model.attention import AttentionPlan, SdpaAttention
from shared.model.batch import ForwardBatch
from shared.model.gpu.decode_attention import SPLIT_TOKENS, DecodeSplits, decode_attention
from shared.model.gpu.fused import KERNEL_DTYPES
from shared.model.gpu.paging import Paging
from shared.model.gpu.prefill_attention import PrefillTile, PrefillTiles, prefill_attention
from shared.model.gpu.tile import IS_INTERPRETED

PROGRAMS_PER_MULTIPROCESSOR = 4
"""How many decode programs share a multiprocessor: enough to hide each other's waits for memory."""

INTERPRETED_PROGRAMS = 3


class TritonAttention:
    """Kernels for bfloat16, float16 and float32; other dtypes are left to PyTorch's attention.

    `num_heads` counts query heads. `prefill_tile` and `split_tokens` are for measurements and
    tests: results change with them by rounding only.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        prefill_tile: PrefillTile | None = None,
        split_tokens: int = SPLIT_TOKENS,
    ) -> None:
        self._num_heads = num_heads
        self._prefill_tile = prefill_tile
        self._split_tokens = split_tokens

    def plan(
        self, batch: ForwardBatch, kv: KvCache, sliding_windows: Sequence[int | None] = ()
    ) -> AttentionPlan:
        """Lay out tiles and pieces on the device; windows are per layer, see `AttentionBackend`."""
        dtype = kv.data.dtype
        if dtype not in KERNEL_DTYPES:
            return SdpaAttention().plan(batch, kv, sliding_windows)
        geometry = kv.geometry
        paging = Paging.of(batch, kv.block_size)
        tiles, splits = None, None
        # Every sequence brings a token: as many tokens as sequences means one each.
        if batch.num_tokens > batch.num_seqs:
            tile = self._prefill_tile or PrefillTile.of(geometry.head_dim, dtype)
            group = self._num_heads // geometry.num_kv_heads
            tiles = PrefillTiles.plan(paging, batch.num_tokens, group, tile)
        if batch.num_seqs > 1 or batch.num_tokens == 1:
            splits = DecodeSplits.plan(
                paging, self._num_heads, geometry.head_dim, self._split_tokens
            )
        return TritonPlan(
            paging,
            tiles,
            splits,
            windows=tuple(window or 0 for window in sliding_windows),
            attend_stops=batch.attend_stops,
            num_programs=_num_programs(kv),
        )


@dataclass(frozen=True, slots=True, eq=False)
class TritonPlan:
    """Reading plan of `TritonAttention`; `tiles` or `splits` is None where no sequence needs it."""

    paging: Paging
    tiles: PrefillTiles | None
    splits: DecodeSplits | None
    windows: tuple[int, ...]
    attend_stops: torch.Tensor | None
    num_programs: int

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KvCache
    ) -> torch.Tensor:
        """See `AttentionPlan`; `k` and `v` are read from the cache, where they already are."""
        cached = kv.layer_slots(layer)
        window = self.windows[layer] if self.windows else 0
        wide = q.dtype == torch.float32 or IS_INTERPRETED
        if q.stride()[1:] != (q.shape[2], 1):
            q = q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self.tiles is not None:
            prefill_attention(
                out,
                q,
                cached,
                self.paging,
                self.tiles,
                window=window,
                attend_stops=self.attend_stops,
                wide=wide,
            )
        if self.splits is not None:
            decode_attention(
                out,
                q,
                cached,
                self.paging,
                self.splits,
                window=window,
                wide=wide,
                num_programs=self.num_programs,
            )
        return out.flatten(1)


def _num_programs(kv: KvCache) -> int:
    """Decode programs per KV head, so that all heads together fill the GPU once."""
    if kv.device.type != "cuda":
        return INTERPRETED_PROGRAMS
    multiprocessors = torch.cuda.get_device_properties(kv.device).multi_processor_count
    return max(1, multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // kv.geometry.num_kv_heads)
