"""Short prompts layer by layer as CUDA graphs, one set per number of tokens.

In: a packed step of few tokens. Out: what the model itself gives. On a large GPU such a step is
over sooner than a host can launch its kernels, so each layer is recorded once and launched as a
whole; between layers the caller may still stop, or send keys and values on. A step is filled up to
the next recorded number of tokens with one more sequence on a block that nobody owns. Knows neither
requests nor sampling.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial

import torch

from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch
from shared.model.forward_step import LayeredModel
from shared.model.gpu.graph_limits import PrefillGraphLimits
from shared.model.gpu.graph_recorder import GraphRecorder, Step
from shared.model.gpu.recordings import Recordings, check_scratch_block
from shared.model.step import StepContext
from shared.modelspec import TextSpec


class PrefillGraphs:
    """Called like the model it stands in front of, for one cache and from one thread.

    A recorded step works on memory of its own: while one is under way, and for whatever does not
    fit, the model computes as before.
    """

    def __init__(
        self,
        model: LayeredModel,
        kv: KvCache,
        limits: PrefillGraphLimits,
        scratch_block_id: int,
        recorder: GraphRecorder,
    ) -> None:
        check_scratch_block(kv, scratch_block_id)
        self._model = model
        self._kv = kv
        self._inputs = PromptInputs(model, limits, kv, scratch_block_id)
        self._layers = Recordings(
            limits.sizes(),
            lambda size: RecordedLayers.record(model, kv, self._inputs, size, recorder),
            "tokens of prompts",
            limits.max_bytes,
        )
        # The step that the static memory belongs to: it is free again when that one is finished,
        # or dropped by whoever began it.
        self._owner: weakref.ref[StepContext] | None = None
        self._running: RecordedLayers | None = None
        self._num_seqs = 0
        self.num_replayed = 0
        self.num_eager = 0

    @property
    def spec(self) -> TextSpec:
        """The model's."""
        return self._model.spec

    @property
    def sizes(self) -> tuple[int, ...]:
        """Recorded numbers of tokens, ascending."""
        return self._layers.sizes

    def begin(self, batch: ForwardBatch, kv: KvCache) -> StepContext:
        """See `LayeredModel`."""
        layers = self._layers_for(batch, kv)
        if layers is None:
            self.num_eager += 1
            return self._model.begin(batch, kv)
        self.num_replayed += 1
        self._inputs.fill(batch, layers.size)
        step = layers.begin()
        self._owner, self._running, self._num_seqs = weakref.ref(step), layers, batch.num_seqs
        return step

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """See `LayeredModel`."""
        return self._model.embed(batch)

    def forward_layers(
        self, hidden: torch.Tensor, step: StepContext, kv: KvCache, start: int, stop: int
    ) -> torch.Tensor:
        """See `LayeredModel`."""
        if self._running is None or not self._is_owner(step):
            return self._model.forward_layers(hidden, step, kv, start, stop)
        return self._running.forward(hidden, start, stop)

    def finish(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        """See `LayeredModel`."""
        logits = self._model.finish(hidden, step)
        if self._is_owner(step):
            self._owner = None
            logits = logits[: self._num_seqs]
        return logits

    def _is_owner(self, step: StepContext) -> bool:
        return self._owner is not None and self._owner() is step

    def _layers_for(self, batch: ForwardBatch, kv: KvCache) -> RecordedLayers | None:
        is_busy = self._owner is not None and self._owner() is not None
        if is_busy or kv is not self._kv or not self._inputs.can_hold(batch):
            return None
        fitting = self._layers.holding(batch.num_tokens)
        return None if fitting is None else fitting[1]


class RecordedLayers:
    """A step of `size` tokens: its beginning and each of its layers, recorded."""

    def __init__(self, size: int, hidden: torch.Tensor) -> None:
        self.size = size
        self._hidden = hidden  # [size, hidden], in and out of every layer but the last
        self._context: StepContext | None = None
        self._begin: Step | None = None
        self._layers: list[Step] = []

    @classmethod
    def record(
        cls,
        model: LayeredModel,
        kv: KvCache,
        inputs: PromptInputs,
        size: int,
        recorder: GraphRecorder,
    ) -> RecordedLayers | None:
        """None where the recorder refuses."""
        layers = cls(size, inputs.hidden[:size])
        layers._begin = recorder.record(
            partial(layers._run_begin, model, kv, inputs.batch_of(size))
        )
        if layers._begin is None:
            return None
        # Recording computes nothing, and layers read what the beginning has worked out.
        layers._begin()
        for index in range(model.spec.num_layers):
            layer = recorder.record(partial(layers._run_layer, model, kv, index))
            if layer is None:
                return None
            layers._layers.append(layer)
        return layers

    def begin(self) -> StepContext:
        """Plan the step that has been filled in; the result is an object of its own."""
        assert self._begin is not None
        self._begin()
        assert self._context is not None
        return replace(self._context)

    def forward(self, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """See `LayeredModel.forward_layers`; the result is valid until the next call."""
        if start == 0:
            self._hidden[: hidden.shape[0]].copy_(hidden)
            # Nobody looks at what becomes of the rows behind, but left alone they would grow on.
            self._hidden[hidden.shape[0] :] = 0
        result = hidden
        for layer in self._layers[start:stop]:
            result = layer()
        return result

    def _run_begin(self, model: LayeredModel, kv: KvCache, batch: ForwardBatch) -> torch.Tensor:
        self._context = model.begin(batch, kv)
        return batch.context_lens

    def _run_layer(self, model: LayeredModel, kv: KvCache, index: int) -> torch.Tensor:
        assert self._context is not None
        result = model.forward_layers(self._hidden, self._context, kv, index, index + 1)
        if result.shape != self._hidden.shape:
            return result  # of the last layer: the last row of each sequence
        return self._hidden.copy_(result)


class PromptInputs:
    """The memory that recorded steps read.

    Behind a step's sequences comes one with all tokens that are missing, in the scratch block, and
    behind it sequences without any.
    """

    def __init__(
        self, model: LayeredModel, limits: PrefillGraphLimits, kv: KvCache, scratch_block_id: int
    ) -> None:
        self._scratch_block_id = scratch_block_id
        self._max_seqs = limits.max_seqs
        self._has_deepstack = model.spec.num_deepstack_layers > 0
        device, size, rows = kv.device, limits.max_tokens, limits.max_seqs + 1
        width = kv.geometry.blocks_for(max(limits.max_context_tokens, size))
        self.hidden = torch.zeros(size, model.spec.hidden_size, dtype=kv.data.dtype, device=device)
        self._token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._positions = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._slots = torch.zeros(size, dtype=torch.int64, device=device)
        self._starts = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._context_lens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._tables = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self._scratch_slots = (
            scratch_block_id * kv.block_size
            + torch.arange(size, dtype=torch.int64, device=device) % kv.block_size
        )

    def can_hold(self, batch: ForwardBatch) -> bool:
        """Whether this is a step of prompts within the limits."""
        return (
            batch.num_tokens > batch.num_seqs <= self._max_seqs
            and batch.attend_stops is None
            and not (self._has_deepstack and batch.media_index is not None)
            and batch.block_tables.shape[1] <= self._tables.shape[1]
        )

    def batch_of(self, size: int) -> ForwardBatch:
        """The first `size` tokens and all sequences, a view; what it holds is a valid step."""
        self._empty(0, 0, size)
        return ForwardBatch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:, :size],
            slot_mapping=self._slots[:size],
            cu_seqlens_q=self._starts,
            context_lens=self._context_lens,
            block_tables=self._tables,
        )

    def fill(self, batch: ForwardBatch, size: int) -> None:
        """Copy a step in, and fill it up to `size` tokens."""
        num_seqs, width = batch.block_tables.shape
        num_tokens = batch.num_tokens
        self._positions[:, :num_tokens].copy_(batch.positions)
        self._slots[:num_tokens].copy_(batch.slot_mapping)
        self._starts[: num_seqs + 1].copy_(batch.cu_seqlens_q)
        self._context_lens[:num_seqs].copy_(batch.context_lens)
        self._tables[:num_seqs, :width].copy_(batch.block_tables)
        self._empty(num_seqs, num_tokens, size)

    def _empty(self, num_seqs: int, num_tokens: int, size: int) -> None:
        self._positions[:, num_tokens:size] = 0
        self._slots[num_tokens:size] = self._scratch_slots[: size - num_tokens]
        self._starts[num_seqs + 1 :] = size
        # The last layer computes a row for each sequence: those without a token get one key, too.
        self._context_lens[num_seqs:] = 1
        self._context_lens[num_seqs] = max(1, size - num_tokens)
        self._tables[num_seqs:] = self._scratch_block_id
