"""What becomes of a decode step in front of the graphs: sizes, padding, limits. No kernel runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.gpu.decode_graphs import DecodeGraphs, decode_step
from shared.model.gpu.graph_limits import GraphLimits
from shared.model.gpu.graph_recorder import Step

BLOCK_SIZE = 4
SCRATCH_BLOCK = 9


class CountingRecorder:
    """Runs steps again instead of replaying them; refuses those beyond `limit` recordings."""

    def __init__(self, limit: int = 100) -> None:
        self._limit = limit
        self._num_recorded = 0

    def record(self, run: Step) -> Step | None:
        self._num_recorded += 1
        return run if self._num_recorded <= self._limit else None


class RecordingModel:
    """Logits that say what was asked, and everything that was asked."""

    def __init__(self) -> None:
        self.batches: list[ForwardBatch] = []
        self._out = torch.zeros(8, 2)

    def __call__(self, batch: ForwardBatch, kv: KvCache) -> torch.Tensor:
        self.batches.append(batch)
        self._out[: batch.num_seqs, 0] = batch.token_ids[batch.cu_seqlens_q[1:] - 1].float()
        self._out[: batch.num_seqs, 1] = batch.context_lens.float()
        return self._out[: batch.num_seqs]


@pytest.fixture
def kv() -> KvCache:
    return KvCache(KvGeometry(1, 1, 8, BLOCK_SIZE, "float32"), SCRATCH_BLOCK + 1)


def graphs_of(
    model: RecordingModel, kv: KvCache, limit: int = 100, max_context_tokens: int = 16
) -> DecodeGraphs:
    limits = GraphLimits(max_batch=5, max_context_tokens=max_context_tokens)
    return DecodeGraphs(model, kv, limits, SCRATCH_BLOCK, CountingRecorder(limit))


def decode(*cached: int) -> ForwardBatch:
    """Sequence i has blocks 2i and 2i + 1; its token is 20 above its number of cached tokens."""
    sequences = [SequenceInput([20 + n], [n], [2 * i, 2 * i + 1], n) for i, n in enumerate(cached)]
    return ForwardBatch.pack(sequences, BLOCK_SIZE)


def test_a_step_is_filled_up_with_rows_on_the_scratch_block(kv: KvCache) -> None:
    model = RecordingModel()
    graphs = graphs_of(model, kv)
    assert graphs.sizes == (1, 2, 4, 5)
    logits = graphs(decode(3, 6, 7), kv)
    assert logits.tolist() == [[23, 4], [26, 7], [27, 8]]
    asked = model.batches[-1]
    assert asked.token_ids.tolist() == [23, 26, 27, 0]
    assert asked.slot_mapping.tolist() == [3, 14, 23, SCRATCH_BLOCK * BLOCK_SIZE]
    assert asked.context_lens.tolist() == [4, 7, 8, 1]
    assert asked.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]
    assert asked.block_tables[:, :2].tolist() == [[0, 1], [2, 3], [4, 5], [SCRATCH_BLOCK, 0]]


def test_rows_of_an_earlier_step_are_emptied(kv: KvCache) -> None:
    model = RecordingModel()
    graphs = graphs_of(model, kv)
    graphs(decode(3, 3, 3, 3), kv)
    graphs(decode(2, 2, 2), kv)
    asked = model.batches[-1]
    assert asked.slot_mapping.tolist() == [2, 10, 18, SCRATCH_BLOCK * BLOCK_SIZE]
    assert asked.block_tables[3, 0] == SCRATCH_BLOCK


def test_logits_outlive_the_next_step(kv: KvCache) -> None:
    graphs = graphs_of(RecordingModel(), kv)
    first = graphs(decode(3), kv)
    graphs(decode(5), kv)
    assert first.tolist() == [[23, 4]]


def test_a_size_that_was_too_large_to_record_runs_without_a_graph(kv: KvCache) -> None:
    graphs = graphs_of(RecordingModel(), kv, limit=2)
    assert graphs.sizes == (4, 5)
    graphs(decode(3), kv)
    assert (graphs.num_replayed, graphs.num_eager) == (1, 0)
    none = graphs_of(RecordingModel(), kv, limit=0)
    assert none(decode(3, 4), kv).tolist() == [[23, 4], [24, 5]]
    assert (none.num_replayed, none.num_eager) == (0, 1)


def three_axes() -> ForwardBatch:
    return ForwardBatch.pack([SequenceInput([5], np.zeros((3, 1), np.int64), [0])], BLOCK_SIZE)


def media() -> ForwardBatch:
    sequence = SequenceInput([5], [0], [0], 0, [0], torch.zeros(1, 8))
    return ForwardBatch.pack([sequence], BLOCK_SIZE)


@pytest.mark.parametrize(
    "batch",
    [
        ForwardBatch.pack([SequenceInput([1, 2], [0, 1], [0])], BLOCK_SIZE),
        ForwardBatch.pack([SequenceInput([1], [0], [0])] * 6, BLOCK_SIZE),
        ForwardBatch.pack([SequenceInput([1], [0], [0] * 5)], BLOCK_SIZE),
        three_axes(),
        media(),
    ],
    ids=["several tokens", "too many sequences", "too long", "three axes", "media"],
)
def test_any_other_step_runs_without_a_graph(batch: ForwardBatch, kv: KvCache) -> None:
    model = RecordingModel()
    graphs = graphs_of(model, kv)
    graphs(batch, kv)
    assert graphs.num_eager == 1
    assert model.batches[-1] is batch


def test_another_cache_runs_without_a_graph(kv: KvCache) -> None:
    graphs = graphs_of(RecordingModel(), kv)
    graphs(decode(1), KvCache(kv.geometry, 4))
    assert graphs.num_eager == 1


def test_a_scratch_block_beyond_the_cache_is_refused(kv: KvCache) -> None:
    limits = GraphLimits(max_batch=1, max_context_tokens=4)
    with pytest.raises(ValueError, match="scratch block 10 of 10 blocks"):
        DecodeGraphs(RecordingModel(), kv, limits, 10, CountingRecorder())


def test_the_cpu_keeps_the_model_itself(kv: KvCache) -> None:
    model = RecordingModel()
    assert decode_step(model, kv, GraphLimits(1, 1), SCRATCH_BLOCK) is model
