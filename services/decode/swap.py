"""KV of sequences that gave way, in host memory.

In: block ids to copy out, or a sequence whose blocks are its own again. How much may be kept is the
scheduler's to bound; who gives way, too.
"""

from __future__ import annotations

import torch

from services.decode.plan import Save
from services.decode.sequence import Sequence
from shared.cache.kv_cache import KvCache


class SwapSpace:
    """Bit-exact copies, dropped when the sequence is back or no longer wanted."""

    def __init__(self, kv: KvCache) -> None:
        self._kv = kv
        self._saved: dict[Sequence, torch.Tensor] = {}

    def save(self, save: Save) -> None:
        """Copy a sequence's KV out of blocks that are about to be overwritten."""
        # Before more memory is taken, that of requests which ended meanwhile goes.
        self._saved = {s: kv for s, kv in self._saved.items() if not s.retired}
        self._saved[save.sequence] = self._kv.gather(save.block_ids, save.num_tokens).cpu()

    def restore(self, sequence: Sequence) -> None:
        """Copy a sequence's KV into the blocks that it now owns."""
        values = self._saved.pop(sequence)
        self._kv.scatter(sequence.blocks.block_ids, values.to(self._kv.device))
