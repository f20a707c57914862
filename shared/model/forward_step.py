"""What computes a step: the language model, or something quicker that gives the same."""

from __future__ import annotations

from typing import Protocol

import torch

from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch


class ForwardStep(Protocol):
    """Called like the model."""

    def __call__(self, batch: ForwardBatch, kv: KvCache) -> torch.Tensor:
        """Logits `[num_seqs, vocab]` of each sequence's last token; writes the new tokens' KV."""
        ...
