"""The tensor behind the blocks.

In: keys and values with the slots they go to, or block ids to read. Out: contiguous tensors fit for
a transfer. Knows neither who owns a block nor what a request is; a slot is
`block_id * block_size + offset`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.cache.geometry import KvGeometry
from shared.model.gpu import fused
from shared.model.kernels import row_kernels

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class KvCache:
    """Paged keys and values, `[layers, 2, num_blocks, block_size, kv_heads, head_dim]`.

    Layers are outermost, so that a group of layers of one block list can be moved while the next
    layers are still being computed.
    """

    def __init__(
        self, geometry: KvGeometry, num_blocks: int, *, device: torch.device | str = "cpu"
    ) -> None:
        self.geometry = geometry
        self.num_blocks = num_blocks
        self.data = torch.empty(
            geometry.num_layers,
            2,
            num_blocks,
            geometry.block_size,
            geometry.num_kv_heads,
            geometry.head_dim,
            dtype=TORCH_DTYPES[geometry.dtype],
            device=device,
        )
        # The same memory by slot: [layers, 2, num_slots, kv_heads, head_dim].
        self._slots = self.data.flatten(2, 3)

    @property
    def block_size(self) -> int:
        return self.geometry.block_size

    @property
    def device(self) -> torch.device:
        return self.data.device

    def layer_slots(self, layer: int) -> torch.Tensor:
        """One layer by slot, `[2, num_slots, kv_heads, head_dim]`, a view."""
        return self._slots[layer]

    def write(
        self, layer: int, slot_mapping: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Store `k` and `v` `[num_tokens, kv_heads, head_dim]` at `slot_mapping` `[num_tokens]`."""
        slots = self._slots[layer]
        if fused.takes(k):
            fused.write_cache(slots, slot_mapping, k, v)
            return
        if row_kernels.write_cache(slots, slot_mapping, k, v):
            return
        slots[0].index_copy_(0, slot_mapping, k)
        slots[1].index_copy_(0, slot_mapping, v)

    def slots_of(
        self, block_ids: Sequence[int], num_tokens: int, *, start: int = 0
    ) -> torch.Tensor:
        """Slots of tokens `start .. start + num_tokens` of a block list, `[num_tokens]` int64."""
        blocks = torch.as_tensor(block_ids, dtype=torch.int64, device=self.device)
        return slots_in_blocks(blocks, self.block_size, start, start + num_tokens)

    def gather(
        self,
        block_ids: Sequence[int],
        num_tokens: int,
        layers: slice = slice(None),
        *,
        start: int = 0,
    ) -> torch.Tensor:
        """Copy out tokens of a block list: `[layers, 2, num_tokens, kv_heads, head_dim]`.

        `start` is the index of the first of them within the list. The result is contiguous and
        holds no unwritten slot, whatever a receiver's block size.
        """
        return self._slots[layers].index_select(
            2, self.slots_of(block_ids, num_tokens, start=start)
        )

    def scatter(
        self,
        block_ids: Sequence[int],
        values: torch.Tensor,
        layers: slice = slice(None),
        *,
        start: int = 0,
    ) -> None:
        """Write `values` `[layers, 2, num_tokens, kv_heads, head_dim]`, the inverse of `gather`.

        `start` is the index of the first token within the block list.
        """
        view = self._slots[layers]
        expected = (view.shape[0], 2, values.shape[2], *view.shape[3:])
        if values.shape != expected or values.dtype != view.dtype:
            raise ValueError(
                f"scatter: got {tuple(values.shape)} {values.dtype}, "
                f"expected {expected} {view.dtype}"
            )
        view.index_copy_(2, self.slots_of(block_ids, values.shape[2], start=start), values)


def slots_in_blocks(
    block_table: torch.Tensor, block_size: int, start: int, stop: int
) -> torch.Tensor:
    """Slots of tokens `start .. stop` in a block table `[num_blocks]`: `[stop - start]` int64."""
    if stop > block_table.numel() * block_size:
        raise ValueError(
            f"{stop} tokens do not fit into {block_table.numel()} blocks of {block_size}"
        )
    token = torch.arange(start, stop, dtype=torch.int64, device=block_table.device)
    return block_table[token // block_size] * block_size + token % block_size
