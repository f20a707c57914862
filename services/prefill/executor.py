"""The language model over a batch of prompts, or of slices of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.cache.kv_cache import KvCache
from shared.messages.descriptor import RequestDescriptor
from shared.messages.events import TokenLogprobs
from shared.model.batch import ForwardBatch, IntArray, SequenceInput
from shared.model.forward_step import LayeredModel
from shared.model.grammar import GrammarState
from shared.model.positions import MediaGrid, media_spans, prompt_positions
from shared.model.sampler import SamplingRow, sample
from shared.model.sampling_row import SamplingState
from shared.model.step import StepContext
from shared.modelspec import ModelSpec
from shared.transport.tensors import settled


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A request's prompt as the model takes it.

    `token_ids` `[n]` and `positions` `[n]` or `[3, n]` cover prompt and emitted tokens;
    `media_rows` are the rows whose embedding is replaced; `next_pos` is the next token's rotary
    position. The tokens of each of `bidirectional_spans` must be computed in one step.
    """

    token_ids: IntArray
    positions: IntArray
    next_pos: int
    media_rows: IntArray
    sampling: SamplingRow
    bidirectional_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class PromptInput:
    """Tokens `start .. stop` of one prompt (None: to its end), and the blocks it owns.

    Keys and values of the tokens before `start` are in the blocks. `embeddings` are those of its
    last media rows in prompt order, `[num_rows, hidden]`: all rows from `start` on must be among
    them. None for text.
    """

    prompt: PreparedPrompt
    embeddings: torch.Tensor | None
    block_ids: tuple[int, ...]
    start: int = 0
    stop: int | None = None

    @property
    def is_last(self) -> bool:
        """Whether the prompt's last token is computed, and with it the token after it."""
        return self.stop is None or self.stop == len(self.prompt.token_ids)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What a prompt's prefill gives besides its KV; `next_pos` is the token's rotary position."""

    token_id: int
    next_pos: int
    logprobs: TokenLogprobs | None = None


class PrefillStep:
    """One forward pass over packed slices that can stop between layers and go on later.

    However often it stops, results are bit-equal: the hidden state waits in this object, keys and
    values of the finished layers in their blocks, which must stay the prompts' own meanwhile.
    """

    def __init__(self, model: LayeredModel, kv: KvCache, inputs: Sequence[PromptInput]) -> None:
        self._model = model
        self._kv = kv
        self._inputs = inputs
        self._hidden: torch.Tensor | None = None  # [num_tokens, hidden]
        self._context: StepContext | None = None
        self._num_layers_done = 0

    def advance(
        self,
        should_pause: Callable[[], bool],
        on_layer: Callable[[int], object] | None = None,
    ) -> list[FirstToken | None] | None:
        """Go on to the end, or to the next layer boundary at which `should_pause()`.

        `on_layer` hears how many layers are done after each: their keys and values are written, or,
        on a GPU, will be before anything that is asked of it from then on. None if it paused. At
        the end, the first token of each slice that completes its prompt; None in the place of the
        others, and where the model's output was not finite.
        """
        if self._hidden is None or self._context is None:
            sequences = [_sequence(each) for each in self._inputs]
            batch = ForwardBatch.pack(sequences, self._kv.block_size, device=self._kv.device)
            self._context = self._model.begin(batch, self._kv)
            self._hidden = self._model.embed(batch)
        num_layers = self._model.spec.num_layers
        while self._num_layers_done < num_layers:
            layer = self._num_layers_done
            self._hidden = self._model.forward_layers(
                self._hidden, self._context, self._kv, layer, layer + 1
            )
            self._num_layers_done += 1
            if on_layer is not None:
                on_layer(self._num_layers_done)
            if self._num_layers_done < num_layers and should_pause():
                return None
        return self._first_tokens(self._hidden, self._context)

    def _first_tokens(self, hidden: torch.Tensor, context: StepContext) -> list[FirstToken | None]:
        if not any(each.is_last for each in self._inputs):
            return [None] * len(self._inputs)  # reading the output head would be for nothing
        logits = self._model.finish(hidden, context)
        tokens = sample(logits, [each.prompt.sampling for each in self._inputs])
        return [
            FirstToken(token.token_id, each.prompt.next_pos, token.logprobs)
            if each.is_last and token is not None
            else None
            for token, each in zip(tokens, self._inputs, strict=True)
        ]


class PrefillExecutor:
    """Packs prompts end to end, runs them and chooses the first token of each."""

    def __init__(self, model: LayeredModel, kv: KvCache, spec: ModelSpec) -> None:
        self._model = model
        self._kv = kv
        self._spec = spec

    def prepare(
        self, request: RequestDescriptor, grammar: GrammarState | None = None
    ) -> PreparedPrompt:
        """Lay a prompt out. Raises `RequestFailed` if placeholders and media disagree."""
        grids = [MediaGrid(*item.grid_thw, item.seconds_per_frame) for item in request.media]
        positions, next_pos = prompt_positions(request.prompt_token_ids, grids, self._spec)
        # Emitted tokens count on like text whatever they are: a placeholder among them is no media.
        emitted = np.arange(next_pos, next_pos + request.next_index, dtype=np.int64)
        tail = np.broadcast_to(emitted, (*positions.shape[:-1], len(emitted)))
        rows = _media_rows(request)
        return PreparedPrompt(
            token_ids=np.array(
                [*request.prompt_token_ids, *request.emitted_token_ids], dtype=np.int64
            ),
            positions=np.concatenate((positions, tail), axis=-1),
            next_pos=next_pos + request.next_index,
            media_rows=rows,
            sampling=SamplingState.of(request, grammar).row(),
            bidirectional_spans=media_spans(rows) if self._spec.text.bidirectional_media else (),
        )

    def begin(self, inputs: Sequence[PromptInput]) -> PrefillStep:
        """A step over these slices; nothing is computed before its `advance`."""
        return PrefillStep(self._model, self._kv, inputs)

    def run(self, inputs: Sequence[PromptInput]) -> list[FirstToken | None]:
        """Fill each prompt's blocks and sample the token after it.

        None where the model's output was not finite, or the slice does not end its prompt.
        """
        tokens = self.begin(inputs).advance(lambda: False)
        assert tokens is not None, "a step that may not pause has paused"
        return tokens

    def gather(
        self, block_ids: tuple[int, ...], num_tokens: int, layers: slice, *, start: int = 0
    ) -> torch.Tensor:
        """KV of a sequence's tokens from `start` on, complete and contiguous: `[layers, 2,
        num_tokens, kv_heads, head_dim]`."""
        return settled(self._kv.gather(block_ids, num_tokens, layers, start=start))

    @property
    def gathers_at_once(self) -> bool:
        """Whether `gather` waits for nothing that is being computed."""
        return self._kv.device.type == "cpu"


def _sequence(each: PromptInput) -> SequenceInput:
    prompt, start = each.prompt, each.start
    stop = len(prompt.token_ids) if each.stop is None else each.stop
    rows = prompt.media_rows
    first, last = np.searchsorted(rows, (start, stop)).tolist()
    return SequenceInput(
        token_ids=prompt.token_ids[start:stop],
        positions=prompt.positions[..., start:stop],
        block_ids=each.block_ids,
        num_cached_tokens=start,
        media_index=rows[first:last] - start,
        media_embeddings=_embeddings(each, first, last),
        bidirectional_spans=prompt.bidirectional_spans,
    )


def _embeddings(each: PromptInput, first: int, last: int) -> torch.Tensor | None:
    """The embeddings of media rows `first .. last` of a prompt, counted over all its media rows."""
    if first == last:
        return None
    num_rows = len(each.prompt.media_rows)
    num_there = 0 if each.embeddings is None else each.embeddings.shape[0]
    num_bare = num_rows - num_there  # rows whose keys and values came from the cache
    if each.embeddings is None or not 0 <= num_bare <= first:
        raise ValueError(
            f"media rows {first} to {last} of {num_rows} are computed, "
            f"but only the last {num_there} have embeddings"
        )
    return each.embeddings[first - num_bare : last - num_bare]


def _media_rows(request: RequestDescriptor) -> IntArray:
    """Rows of the prompt that are placeholders, in the order of the embeddings' rows."""
    runs = [
        np.arange(start, stop, dtype=np.int64)
        for item in request.media
        for start, stop in item.spans
    ]
    return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)
