"""The decoder with all kernels against the decoder without: prompts, chunks, decoding, graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.attention import SdpaAttention
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.gpu.attention import TritonAttention
from shared.model.gpu.decode_graphs import DecodeGraphs
from shared.model.gpu.graph_limits import GraphLimits, PrefillGraphLimits
from shared.model.gpu.graph_recorder import CudaGraphRecorder, GraphRecorder, Step
from shared.model.gpu.prefill_graphs import PrefillGraphs
from shared.model.loader import load_language_model
from shared.model.step import StepContext
from shared.modelspec import ModelSpec

BLOCK_SIZE = 16
SCRATCH_BLOCK = 11
SHORT_PROMPTS = PrefillGraphLimits(max_tokens=32, max_context_tokens=64, max_seqs=3, step_tokens=8)


class DirectRecorder:
    """The recorder's twin: runs the step again instead of replaying it."""

    def record(self, run: Step) -> Step | None:
        return run


class Twins:
    """One model twice over caches of their own: with kernels and with PyTorch's operations."""

    def __init__(self, folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = ModelSpec.load(folder)
        self.device = device
        self.geometry = KvGeometry.of(spec.text, block_size=BLOCK_SIZE, dtype="float32")
        self.kv, self.plain_kv = (KvCache(self.geometry, 12, device=device) for _ in range(2))
        self.kv.data.fill_(torch.nan)
        self.plain_kv.data.zero_()
        heads = spec.text.num_heads
        self.model = self._load(folder, device, TritonAttention(heads, split_tokens=16))
        self._plain = self._load(folder, device, SdpaAttention())
        self._monkeypatch = monkeypatch

    def _load(
        self, folder: Path, device: str, backend: TritonAttention | SdpaAttention
    ) -> LanguageModel:
        return load_language_model(folder, dtype="float32", device=device, backend=backend)

    def pack(self, sequences: list[SequenceInput]) -> ForwardBatch:
        return ForwardBatch.pack(sequences, BLOCK_SIZE, device=self.device)

    def plain(self, batch: ForwardBatch) -> torch.Tensor:
        with self._monkeypatch.context() as patch:
            patch.setattr("shared.model.gpu.fused.takes", lambda x: False)
            return self._plain(batch, self.plain_kv)


@pytest.fixture
def twins(
    tiny_model: Path, device: str, use_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> Twins:
    return Twins(tiny_model, device, monkeypatch)


@pytest.fixture
def recorder(device: str) -> GraphRecorder:
    if device == "cpu":
        return DirectRecorder()
    return CudaGraphRecorder(torch.device("cuda", 0), max_bytes=1 << 30)


def tokens(num: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(2, 140, num)]


def new(num: int, cached: int, blocks: list[int]) -> SequenceInput:
    return SequenceInput(tokens(num, cached), range(cached, cached + num), blocks, cached)


def same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert logits.argmax(-1).tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("tiny_model", ["qwen2_5_vl", "gemma3_text"], indirect=True)
def test_a_model_with_kernels_gives_the_same_logits(twins: Twins) -> None:
    prompts = [new(19, 0, [3, 7]), new(4, 0, [1])]
    mixed = [new(9, 19, [3, 7]), new(1, 4, [1])]
    for sequences in (prompts, mixed):
        batch = twins.pack(sequences)
        same(twins.model(batch, twins.kv), twins.plain(batch))


@pytest.mark.parametrize("tiny_model", ["qwen3"], indirect=True)
def test_graphs_of_the_decode_step(twins: Twins, recorder: GraphRecorder) -> None:
    limits = GraphLimits(max_batch=4, max_context_tokens=64)
    graphs = DecodeGraphs(twins.model, twins.kv, limits, SCRATCH_BLOCK, recorder)
    assert graphs.sizes == (1, 2, 4)
    prompts = twins.pack([new(5, 0, [3]), new(9, 0, [1, 8]), new(2, 0, [0])])
    same(graphs(prompts, twins.kv), twins.plain(prompts))
    assert (graphs.num_replayed, graphs.num_eager) == (0, 1)
    steps = [
        [new(1, 5, [3]), new(1, 9, [1, 8]), new(1, 2, [0])],
        [new(1, 10, [1, 8])],  # a smaller graph
    ]
    for sequences in steps:
        batch = twins.pack(sequences)
        same(graphs(batch, twins.kv), twins.plain(batch))
    assert (graphs.num_replayed, graphs.num_eager) == (2, 1)
    # Nothing but the scratch block was written beside the sequences' own slots.
    own = [0, 1, 3, 8, SCRATCH_BLOCK]
    others = [block for block in range(12) if block not in own]
    assert bool(twins.kv.data[:, :, others].isnan().all())


def test_a_step_without_memory_is_not_recorded(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a CUDA device: the CPU records nothing")
    # More than the least that torch's allocator takes from the device, less than the second step.
    recorder = CudaGraphRecorder(torch.device("cuda", 0), max_bytes=1 << 23)
    assert recorder.record(lambda: torch.empty(1 << 50, device=device)) is None
    assert recorder.record(lambda: torch.ones(1 << 24, device=device)) is None
    replay = recorder.record(lambda: torch.ones(4, device=device) * 2)
    assert replay is not None
    assert replay().tolist() == [2, 2, 2, 2]


class Layered:
    """Prompts through graphs, layer by layer, beside the plain model."""

    def __init__(
        self, twins: Twins, recorder: GraphRecorder, limits: PrefillGraphLimits = SHORT_PROMPTS
    ) -> None:
        self.twins = twins
        self.graphs = PrefillGraphs(twins.model, twins.kv, limits, SCRATCH_BLOCK, recorder)

    def begin(self, batch: ForwardBatch) -> tuple[StepContext, torch.Tensor]:
        return self.graphs.begin(batch, self.twins.kv), self.graphs.embed(batch)

    def go_on(self, step: StepContext, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        for layer in range(start, stop):
            hidden = self.graphs.forward_layers(hidden, step, self.twins.kv, layer, layer + 1)
        return hidden

    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        step, hidden = self.begin(batch)
        hidden = self.go_on(step, hidden, 0, self.graphs.spec.num_layers)
        return self.graphs.finish(hidden, step)


@pytest.mark.parametrize("tiny_model", ["qwen2_5_vl", "gemma3_text"], indirect=True)
def test_graphs_of_short_prompts(twins: Twins, recorder: GraphRecorder) -> None:
    layered = Layered(twins, recorder)
    assert layered.graphs.sizes == (8, 16, 24, 32)
    steps = [
        [new(9, 0, [1, 8]), new(5, 0, [3]), new(2, 0, [0])],  # as many as a graph has tokens
        [new(18, 9, [1, 8]), new(1, 5, [3])],  # behind a prefix, and one token beside it
        [new(3, 2, [0])],  # a smaller graph
    ]
    for sequences in steps:
        batch = twins.pack(sequences)
        same(layered.logits(batch), twins.plain(batch))
    assert (layered.graphs.num_replayed, layered.graphs.num_eager) == (3, 0)
    # Nothing but the scratch block was written beside the sequences' own slots.
    own = [0, 1, 3, 8, SCRATCH_BLOCK]
    others = [block for block in range(12) if block not in own]
    assert bool(twins.kv.data[:, :, others].isnan().all())


@pytest.mark.parametrize("tiny_model", ["qwen2_5_vl"], indirect=True)
def test_graphs_of_a_prompt_with_a_picture(twins: Twins, recorder: GraphRecorder) -> None:
    layered = Layered(twins, recorder)
    width = layered.graphs.spec.hidden_size
    rows = torch.from_numpy(np.random.default_rng(3).standard_normal((4, width))).float()
    positions = np.stack([np.arange(12), np.arange(12) // 2, np.arange(12) % 5])
    picture = SequenceInput(
        tokens(12, 0),
        positions,
        [3],
        media_index=[2, 3, 4, 5],
        media_embeddings=rows.to(twins.device),
    )
    batch = twins.pack([picture])
    same(layered.logits(batch), twins.plain(batch))
    assert layered.graphs.num_replayed == 1


@pytest.mark.parametrize("tiny_model", ["qwen3"], indirect=True)
def test_a_step_between_two_layers_of_another_runs_without_graphs(
    twins: Twins, recorder: GraphRecorder
) -> None:
    layered = Layered(twins, recorder)
    first, second = twins.pack([new(9, 0, [1])]), twins.pack([new(6, 0, [3])])
    num_layers = layered.graphs.spec.num_layers
    step, hidden = layered.begin(first)
    hidden = layered.go_on(step, hidden, 0, 1)
    same(layered.logits(second), twins.plain(second))
    hidden = layered.go_on(step, hidden, 1, num_layers)
    same(layered.graphs.finish(hidden, step), twins.plain(first))
    assert (layered.graphs.num_replayed, layered.graphs.num_eager) == (1, 1)
    # A step that is dropped gives the graphs back too.
    step, hidden = layered.begin(first)
    del step, hidden
    same(layered.logits(second), twins.plain(second))
    assert (layered.graphs.num_replayed, layered.graphs.num_eager) == (3, 1)


@pytest.mark.parametrize("tiny_model", ["qwen3"], indirect=True)
def test_prompts_beyond_the_limits_run_without_graphs(
    twins: Twins, recorder: GraphRecorder
) -> None:
    layered = Layered(twins, recorder)
    beyond = [
        [new(33, 0, [1, 2, 3])],  # tokens
        [new(2, 0, [block]) for block in (0, 1, 2, 3)],  # sequences
        [new(2, 64, [4, 5, 6, 7, 8])],  # context
        [new(1, 5, [3])],  # a decode step
    ]
    twins.kv.data.zero_()
    for sequences in beyond:
        batch = twins.pack(sequences)
        same(layered.logits(batch), twins.plain(batch))
    assert (layered.graphs.num_replayed, layered.graphs.num_eager) == (0, 4)


@pytest.mark.parametrize("tiny_model", ["qwen3"], indirect=True)
def test_steps_of_hardly_more_tokens_than_sequences_are_not_recorded(
    twins: Twins, recorder: GraphRecorder
) -> None:
    """The last layer gives a row for each sequence only where there are more tokens than those."""
    limits = PrefillGraphLimits(max_tokens=4, max_context_tokens=64, max_seqs=3, step_tokens=8)
    layered = Layered(twins, recorder, limits)
    batch = twins.pack([new(3, 0, [1])])
    same(layered.logits(batch), twins.plain(batch))
    assert layered.graphs.sizes == ()
