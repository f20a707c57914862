"""Where the sequences of a step lie: in the packed batch and in the blocks of the cache.

In: a `ForwardBatch`. Out: the same facts as the kernels read them. Knows no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.model.batch import ForwardBatch


@dataclass(frozen=True, slots=True, eq=False)
class Paging:
    """Index tensors of one step, int32 on its device."""

    query_starts: torch.Tensor  # [num_seqs + 1]
    context_lens: torch.Tensor  # [num_seqs]
    block_tables: torch.Tensor  # [num_seqs, max_blocks]
    block_size: int

    @classmethod
    def of(cls, batch: ForwardBatch, block_size: int) -> Paging:
        """No value leaves the device."""
        return cls(
            query_starts=batch.cu_seqlens_q.int(),
            context_lens=batch.context_lens.int(),
            block_tables=batch.block_tables.int().contiguous(),
            block_size=block_size,
        )

    @property
    def num_seqs(self) -> int:
        return int(self.context_lens.shape[0])

    @property
    def max_context_len(self) -> int:
        """What the block tables have room for: the true maximum is known to the device only."""
        return int(self.block_tables.shape[1]) * self.block_size
