"""The language model over a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.cache.kv_cache import KvCache
from shared.messages.descriptor import RequestDescriptor
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.positions import MediaGrid, prompt_positions
from shared.model.sampler import SamplingRow, sample
from shared.modelspec import ModelSpec


@dataclass(frozen=True, eq=False)
class PromptInput:
    """One prompt of a step: its request, the embeddings of its media and the blocks it owns.

    `embeddings` is `[num_media_tokens, hidden]` in prompt order, or None for text.
    """

    request: RequestDescriptor
    embeddings: torch.Tensor | None
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What a prompt's prefill gives besides its KV; `next_pos` is the token's rotary position."""

    token_id: int
    next_pos: int


class PrefillExecutor:
    """Runs whole prompts packed end to end and chooses the first token of each."""

    def __init__(self, model: LanguageModel, kv: KvCache, spec: ModelSpec) -> None:
        self._model = model
        self._kv = kv
        self._spec = spec

    def run(self, prompts: Sequence[PromptInput]) -> list[FirstToken]:
        """Fill each prompt's blocks and sample the token after it."""
        inputs, next_positions = [], []
        for prompt in prompts:
            sequence, next_pos = self._sequence(prompt)
            inputs.append(sequence)
            next_positions.append(next_pos)
        batch = ForwardBatch.pack(inputs, self._kv.block_size, device=self._kv.device)
        with torch.inference_mode():
            logits = self._model(batch, self._kv)
        tokens = sample(logits, [_sampling_row(prompt.request) for prompt in prompts])
        return [FirstToken(*pair) for pair in zip(tokens, next_positions, strict=True)]

    def gather(self, block_ids: tuple[int, ...], num_tokens: int, layers: slice) -> torch.Tensor:
        """KV of a sequence, contiguous: `[layers, 2, num_tokens, kv_heads, head_dim]`."""
        return self._kv.gather(block_ids, num_tokens, layers)

    def _sequence(self, prompt: PromptInput) -> tuple[SequenceInput, int]:
        request = prompt.request
        token_ids = np.array(
            [*request.prompt_token_ids, *request.emitted_token_ids], dtype=np.int64
        )
        grids = [MediaGrid(*item.grid_thw) for item in request.media]
        positions, next_pos = prompt_positions(token_ids, grids, self._spec)
        sequence = SequenceInput(
            token_ids=token_ids,
            positions=positions,
            block_ids=prompt.block_ids,
            media_index=_media_rows(request),
            media_embeddings=prompt.embeddings,
        )
        return sequence, next_pos


def _media_rows(request: RequestDescriptor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows of the prompt that are placeholders, in the order of the embeddings' rows."""
    runs = [
        np.arange(item.offset, item.offset + item.num_tokens, dtype=np.int64)
        for item in request.media
    ]
    return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)


def _sampling_row(request: RequestDescriptor) -> SamplingRow:
    sampling = request.sampling
    return SamplingRow(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        index=request.next_index,
    )
