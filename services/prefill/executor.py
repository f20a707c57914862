"""The language model over a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.cache.kv_cache import KvCache
from shared.messages.descriptor import RequestDescriptor
from shared.messages.events import TokenLogprobs
from shared.model.batch import ForwardBatch, IntArray, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.grammar import GrammarState
from shared.model.positions import MediaGrid, prompt_positions
from shared.model.sampler import SamplingRow, sample
from shared.model.sampling_row import SamplingState
from shared.modelspec import ModelSpec


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A request's prompt as the model takes it.

    `token_ids` `[n]` and `positions` `[n]` or `[3, n]` cover prompt and emitted tokens;
    `media_rows` are the rows whose embedding is replaced; `next_pos` is the next token's rotary
    position.
    """

    token_ids: IntArray
    positions: IntArray
    next_pos: int
    media_rows: IntArray
    sampling: SamplingRow


@dataclass(frozen=True, eq=False)
class PromptInput:
    """One prompt of a step, the embeddings of its media and the blocks it owns.

    `embeddings` is `[num_media_tokens, hidden]` in prompt order, or None for text.
    """

    prompt: PreparedPrompt
    embeddings: torch.Tensor | None
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What a prompt's prefill gives besides its KV; `next_pos` is the token's rotary position."""

    token_id: int
    next_pos: int
    logprobs: TokenLogprobs | None = None


class PrefillExecutor:
    """Runs whole prompts packed end to end and chooses the first token of each."""

    def __init__(self, model: LanguageModel, kv: KvCache, spec: ModelSpec) -> None:
        self._model = model
        self._kv = kv
        self._spec = spec

    def prepare(
        self, request: RequestDescriptor, grammar: GrammarState | None = None
    ) -> PreparedPrompt:
        """Lay a prompt out. Raises `RequestFailed` if placeholders and media disagree."""
        grids = [MediaGrid(*item.grid_thw) for item in request.media]
        positions, next_pos = prompt_positions(request.prompt_token_ids, grids, self._spec)
        # Emitted tokens count on like text whatever they are: a placeholder among them is no media.
        emitted = np.arange(next_pos, next_pos + request.next_index, dtype=np.int64)
        tail = np.broadcast_to(emitted, (*positions.shape[:-1], len(emitted)))
        return PreparedPrompt(
            token_ids=np.array(
                [*request.prompt_token_ids, *request.emitted_token_ids], dtype=np.int64
            ),
            positions=np.concatenate((positions, tail), axis=-1),
            next_pos=next_pos + request.next_index,
            media_rows=_media_rows(request),
            sampling=SamplingState.of(request, grammar).row(),
        )

    def run(self, inputs: Sequence[PromptInput]) -> list[FirstToken | None]:
        """Fill each prompt's blocks and sample the token after it.

        None where the model's output was not finite.
        """
        sequences = [_sequence(each) for each in inputs]
        batch = ForwardBatch.pack(sequences, self._kv.block_size, device=self._kv.device)
        with torch.inference_mode():
            logits = self._model(batch, self._kv)
        tokens = sample(logits, [each.prompt.sampling for each in inputs])
        return [
            None
            if token is None
            else FirstToken(token.token_id, each.prompt.next_pos, token.logprobs)
            for token, each in zip(tokens, inputs, strict=True)
        ]

    def gather(self, block_ids: tuple[int, ...], num_tokens: int, layers: slice) -> torch.Tensor:
        """KV of a sequence, contiguous: `[layers, 2, num_tokens, kv_heads, head_dim]`."""
        return self._kv.gather(block_ids, num_tokens, layers)


def _sequence(each: PromptInput) -> SequenceInput:
    prompt = each.prompt
    return SequenceInput(
        token_ids=prompt.token_ids,
        positions=prompt.positions,
        block_ids=each.block_ids,
        media_index=prompt.media_rows,
        media_embeddings=each.embeddings,
    )


def _media_rows(request: RequestDescriptor) -> IntArray:
    """Rows of the prompt that are placeholders, in the order of the embeddings' rows."""
    runs = [
        np.arange(item.offset, item.offset + item.num_tokens, dtype=np.int64)
        for item in request.media
    ]
    return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)
