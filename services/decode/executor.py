"""The language model over one new token of each running sequence."""

from __future__ import annotations

from collections.abc import Sequence as Sequences

import torch

from services.decode.sequence import Sequence
from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.sampler import Sampled, sample


class DecodeExecutor:
    """Takes the next step of every sequence of a batch at once."""

    def __init__(self, model: LanguageModel, kv: KvCache) -> None:
        self._model = model
        self._kv = kv

    def run(self, sequences: Sequences[Sequence]) -> list[Sampled | None]:
        """Write the newest token's KV of each sequence and sample the token after it.

        None where the model's output was not finite.
        """
        inputs = [
            SequenceInput(
                token_ids=[sequence.last_token_id],
                positions=[sequence.next_pos],
                block_ids=sequence.blocks.block_ids,
                num_cached_tokens=sequence.kv_len,
            )
            for sequence in sequences
        ]
        batch = ForwardBatch.pack(inputs, self._kv.block_size, device=self._kv.device)
        with torch.inference_mode():
            logits = self._model(batch, self._kv)
        return sample(logits, [sequence.state.row() for sequence in sequences])

    def empty_landing(self, num_layers: int, num_tokens: int) -> torch.Tensor:
        """Memory for arriving KV, `[layers, 2, num_tokens, kv_heads, head_dim]`."""
        geometry = self._kv.geometry
        shape = (num_layers, 2, num_tokens, geometry.num_kv_heads, geometry.head_dim)
        return torch.empty(shape, dtype=self._kv.data.dtype, device=self._kv.device)

    def scatter(self, block_ids: Sequences[int], values: torch.Tensor, layers: slice) -> None:
        """Move arrived KV into a sequence's blocks."""
        self._kv.scatter(block_ids, values, layers)
