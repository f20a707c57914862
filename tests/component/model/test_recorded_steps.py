"""Decode steps that are recorded and replayed: equal to the model's own to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.demo import model_dir
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.kernels.choice import KernelChoice, has_compiled_kernels
from shared.model.recorded_steps import MIN_BLOCKS, RecordedSteps
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from shared.runtime.language import load_language
from tests.support.models import quiet, spread_weights

BLOCK_SIZE = 4
NUM_BLOCKS = 120
BLOCKS_PER_SEQUENCE = 40

pytestmark = pytest.mark.skipif(not has_compiled_kernels(), reason="needs numba and AVX2")


def load(
    folder: Path, dtype: str = "bfloat16", linear: str = "auto", quantization: str = "none"
) -> tuple[LanguageModel, KvCache]:
    spec = ModelSpec.load(folder)
    loaded = ModelFolder(folder, spec, dtype, "cpu", kernels=KernelChoice(linear, quantization))
    return load_language(loaded, BLOCK_SIZE, NUM_BLOCKS)


def sequence(index: int, ids: list[int], num_cached: int = 0) -> SequenceInput:
    """Blocks as a decoder hands them out: no more than the tokens need."""
    num_blocks = -(-(num_cached + len(ids)) // BLOCK_SIZE)
    blocks = range(index * BLOCKS_PER_SEQUENCE, index * BLOCKS_PER_SEQUENCE + num_blocks)
    positions = np.arange(num_cached, num_cached + len(ids))
    return SequenceInput(ids, positions, list(blocks), num_cached)


def compare(model: LanguageModel, kv: KvCache, num_steps: int) -> RecordedSteps:
    """Three answers side by side on two caches; the second and third end and begin in between."""
    prompts = [list(range(5, 5 + length)) for length in (7, 1, 26)]
    start = ForwardBatch.pack([sequence(i, ids) for i, ids in enumerate(prompts)], BLOCK_SIZE)
    kv.data.zero_()
    tokens = model(start, kv).argmax(-1).tolist()
    other = KvCache(kv.geometry, kv.num_blocks)
    other.data.copy_(kv.data)
    steps = RecordedSteps(model, kv)
    lens = [len(ids) for ids in prompts]
    for number in range(num_steps):
        running = [0] if number % 7 == 3 else [0, 2] if number % 5 == 2 else [0, 1, 2]
        batch = ForwardBatch.pack([sequence(i, [tokens[i]], lens[i]) for i in running], BLOCK_SIZE)
        got, expected = steps(batch, kv), model(batch, other)
        assert torch.equal(got, expected)
        assert torch.equal(kv.data, other.data)
        for i, token in zip(running, got.argmax(-1).tolist(), strict=True):
            tokens[i], lens[i] = token, lens[i] + 1
    return steps


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(
    ("linear", "quantization"), [("auto", "none"), ("compiled", "none"), ("auto", "int8")]
)
def test_replayed_steps_are_those_of_the_model(linear: str, quantization: str) -> None:
    model, kv = load(model_dir(), linear=linear, quantization=quantization)
    num_steps = BLOCK_SIZE * MIN_BLOCKS  # every answer outgrows its first recording
    steps = compare(model, kv, num_steps)
    assert steps.num_recorded == 6
    assert steps.num_replayed == num_steps - 6


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "qwen3"])
def test_every_family_decodes_the_same(family: str, model_dir_of: Callable[[str], Path]) -> None:
    """Whether or not its steps can be recorded."""
    model, kv = load(model_dir_of(family))
    compare(model, kv, 12)


def test_normalised_heads_are_recorded(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        spread_weights(model, 0)
        model.save_pretrained(tmp_path)
    steps = compare(*load(tmp_path), 12)
    assert steps.num_replayed > 0


def test_what_computes_with_more_than_kernels_is_not_recorded() -> None:
    model, kv = load(model_dir(), "float32")
    steps = compare(model, kv, 4)
    assert (steps.num_recorded, steps.num_replayed) == (0, 0)
    plain, kv = load(model_dir(), linear="plain")
    steps = compare(plain, kv, 4)
    assert (steps.num_recorded, steps.num_replayed) == (0, 0)


def test_logits_outlive_the_next_step() -> None:
    model, kv = load(model_dir())
    steps = RecordedSteps(model, kv)
    batch = ForwardBatch.pack([sequence(0, [7])], BLOCK_SIZE)
    first = steps(batch, kv)
    kept = first.clone()
    for token in range(20):
        steps(ForwardBatch.pack([sequence(0, [token])], BLOCK_SIZE), kv)
    assert torch.equal(first, kept)
    assert steps.num_recorded == 1


def test_recordings_are_bounded() -> None:
    model, kv = load(model_dir())
    free = RecordedSteps(model, kv)
    batches = [ForwardBatch.pack([sequence(0, [7])] * size, BLOCK_SIZE) for size in (1, 2, 3)]
    held = []
    for batch in batches:
        free(batch, kv)
        held.append(free.num_bytes)
    steps = RecordedSteps(model, kv, max_bytes=held[1])
    for batch in (*batches, *batches):
        assert torch.equal(steps(batch, kv), free(batch, kv))
        assert steps.num_bytes <= max(held[1], held[2] - held[1])
    assert steps.num_recorded == 6
    for batch in batches[2:]:
        steps(batch, kv)
    assert steps.num_recorded == 6


def test_other_steps_are_the_models_own() -> None:
    model, kv = load(model_dir())
    steps = RecordedSteps(model, kv)
    several = ForwardBatch.pack([sequence(0, [7, 8])], BLOCK_SIZE)
    many = ForwardBatch.pack([sequence(0, [7])] * 17, BLOCK_SIZE)
    for batch in (several, many):
        assert torch.equal(steps(batch, kv), model(batch, kv))
    assert steps.num_recorded == 0


def test_only_steps_on_a_cpu_are_recorded() -> None:
    geometry = KvGeometry(1, 1, 16, BLOCK_SIZE, "bfloat16")
    elsewhere = KvCache(geometry, 4, device="meta")
    logits = torch.ones(1, 3)
    steps = RecordedSteps(lambda batch, kv: logits, elsewhere)  # a model that cannot be recorded
    batch = ForwardBatch.pack([sequence(0, [7])], BLOCK_SIZE)
    assert steps(batch, elsewhere) is logits
    assert steps.num_recorded == 0
