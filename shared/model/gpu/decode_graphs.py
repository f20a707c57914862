"""The decode step as CUDA graphs, one per batch size of a ladder.

In: a packed step and the cache. Out: logits, as from the model itself. A step of one token per
sequence is copied into fixed memory, filled up to the next captured batch size with rows that work
on a block nobody owns, and replayed; any other step runs without a graph. Knows neither requests
nor sampling.
"""

from __future__ import annotations

import torch

from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch
from shared.model.forward_step import ForwardStep
from shared.model.gpu.graph_limits import GraphLimits
from shared.model.gpu.graph_recorder import CudaGraphRecorder, GraphRecorder, Step
from shared.model.gpu.recordings import Recordings, check_scratch_block


def decode_step(
    model: ForwardStep, kv: KvCache, limits: GraphLimits, scratch_block_id: int
) -> ForwardStep:
    """Graphs of the model on CUDA, the model itself elsewhere. Captures at once, which takes time.

    `scratch_block_id` is a block of `kv` that no sequence ever gets.
    """
    if kv.device.type != "cuda":
        return model
    recorder = CudaGraphRecorder(kv.device, limits.max_bytes)
    return DecodeGraphs(model, kv, limits, scratch_block_id, recorder)


class DecodeGraphs:
    """A model's decode steps, captured for one cache. Calls must come from one thread."""

    def __init__(
        self,
        model: ForwardStep,
        kv: KvCache,
        limits: GraphLimits,
        scratch_block_id: int,
        recorder: GraphRecorder,
    ) -> None:
        check_scratch_block(kv, scratch_block_id)
        self._model = model
        self._kv = kv
        self._inputs = StaticInputs(limits, kv, scratch_block_id)
        self._replays = Recordings(
            limits.buckets(),
            lambda size: recorder.record(self._step_of(size)),
            "sequences",
            limits.max_bytes,
        )
        self.num_replayed = 0
        self.num_eager = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Captured batch sizes, ascending."""
        return self._replays.sizes

    def __call__(self, batch: ForwardBatch, kv: KvCache) -> torch.Tensor:
        """See `ForwardStep`."""
        fitting = self._replay_for(batch, kv)
        if fitting is None:
            self.num_eager += 1
            return self._model(batch, kv)
        size, replay = fitting
        self.num_replayed += 1
        self._inputs.fill(batch, size)
        # A copy, because the next replay writes to the same memory.
        return replay()[: batch.num_seqs].clone()

    def _replay_for(self, batch: ForwardBatch, kv: KvCache) -> tuple[int, Step] | None:
        if kv is not self._kv or not self._inputs.can_hold(batch):
            return None
        return self._replays.holding(batch.num_seqs)

    def _step_of(self, size: int) -> Step:
        batch = self._inputs.batch_of(size)
        return lambda: self._model(batch, self._kv)


class StaticInputs:
    """The memory that captured steps read, and rows for sequences that are not there.

    Such a row is one token at position 0 whose only key lies in the scratch block.
    """

    def __init__(self, limits: GraphLimits, kv: KvCache, scratch_block_id: int) -> None:
        size = limits.max_batch
        self._scratch_block_id = scratch_block_id
        self._scratch_slot = scratch_block_id * kv.block_size
        max_blocks = kv.geometry.blocks_for(limits.max_context_tokens)
        zeros = torch.zeros(4, size, dtype=torch.int64, device=kv.device)
        self._token_ids, self._positions, self._slots, self._context_lens = zeros
        self._starts = torch.arange(size + 1, dtype=torch.int64, device=kv.device)
        self._tables = torch.zeros(size, max_blocks, dtype=torch.int64, device=kv.device)
        self._empty(slice(0, size))

    def can_hold(self, batch: ForwardBatch) -> bool:
        """Whether this is a plain decode step within the limits."""
        return (
            batch.num_tokens == batch.num_seqs <= self._tables.shape[0]
            and batch.positions.ndim == 1
            and batch.media_index is None
            and batch.attend_stops is None
            and batch.block_tables.shape[1] <= self._tables.shape[1]
        )

    def batch_of(self, size: int) -> ForwardBatch:
        """The first `size` rows, a view."""
        return ForwardBatch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            slot_mapping=self._slots[:size],
            cu_seqlens_q=self._starts[: size + 1],
            context_lens=self._context_lens[:size],
            block_tables=self._tables[:size],
        )

    def fill(self, batch: ForwardBatch, size: int) -> None:
        """Copy a step in and empty the rows behind it, up to `size`."""
        num_seqs, width = batch.block_tables.shape
        self._token_ids[:num_seqs].copy_(batch.token_ids)
        self._positions[:num_seqs].copy_(batch.positions)
        self._slots[:num_seqs].copy_(batch.slot_mapping)
        self._context_lens[:num_seqs].copy_(batch.context_lens)
        self._tables[:num_seqs, :width].copy_(batch.block_tables)
        if num_seqs < size:
            # Their old contents would write to blocks that belong to others by now.
            self._empty(slice(num_seqs, size))

    def _empty(self, rows: slice) -> None:
        self._token_ids[rows] = 0
        self._positions[rows] = 0
        self._slots[rows] = self._scratch_slot
        self._context_lens[rows] = 1
        self._tables[rows, 0] = self._scratch_block_id
