"""The deterministic model: what is computed together changes no bit; the rest is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.cache.kv_cache import KvCache
from shared.demo import model_dir
from shared.errors import SettingsError
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.batch_invariant import invariant_kernels
from shared.model.decoder import LanguageModel
from shared.model.kernels.choice import KernelChoice, has_compiled_kernels
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from shared.runtime.language import load_language

BLOCK_SIZE = 16
NUM_TOKENS = 203
BLOCKS = range(3, 3 + -(-NUM_TOKENS // BLOCK_SIZE))

needs_compiled_kernels = pytest.mark.skipif(
    not has_compiled_kernels(), reason="needs numba and AVX2"
)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec.load(model_dir())


Sized = tuple[LanguageModel, KvCache]


@pytest.fixture(scope="module")
def deterministic(spec: ModelSpec) -> Sized:
    folder = ModelFolder(model_dir(), spec, "float32", "cpu", deterministic=True)
    return load_language(folder, BLOCK_SIZE, 40)


TOKENS = np.random.default_rng(0).integers(0, 500, NUM_TOKENS)
OTHER = SequenceInput(np.arange(45), np.arange(45), range(20, 23))


def part(start: int, stop: int) -> SequenceInput:
    return SequenceInput(TOKENS[start:stop], np.arange(start, stop), BLOCKS, start)


def run(
    sized: Sized, bounds: list[int], others: list[SequenceInput]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last logits and all KV of the sequence, computed in parts that end at `bounds`."""
    model, kv = sized
    kv.data.fill_(float("nan"))
    logits = torch.empty(0)
    for start, stop in zip([0, *bounds], bounds, strict=False):
        batch = ForwardBatch.pack([*others, part(start, stop)], BLOCK_SIZE)
        logits = model(batch, kv)[-1]
    return logits, kv.gather(BLOCKS, NUM_TOKENS, slice(0, model.spec.num_layers))


@needs_compiled_kernels
@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(
    ("bounds", "others"),
    [
        (list(range(1, NUM_TOKENS + 1)), []),
        ([60, *range(61, NUM_TOKENS + 1)], []),
        ([1, 17, 130, NUM_TOKENS], []),
        ([NUM_TOKENS], [OTHER]),
        ([NUM_TOKENS - 1, NUM_TOKENS], [OTHER]),
    ],
    ids=["token by token", "prompt and decode", "chunks", "packed", "beside a prompt"],
)
def test_a_sequence_is_bit_equal_however_it_is_computed(
    deterministic: Sized, bounds: list[int], others: list[SequenceInput]
) -> None:
    expected = run(deterministic, [NUM_TOKENS], [])
    found = run(deterministic, bounds, others)
    for each, other in zip(expected, found, strict=True):
        assert torch.isfinite(each).all()
        assert torch.equal(each, other)


@needs_compiled_kernels
def test_it_is_the_same_model_but_for_rounding(deterministic: Sized, spec: ModelSpec) -> None:
    usual = load_language(ModelFolder(model_dir(), spec, "float32", "cpu"), BLOCK_SIZE, 40)
    for bounds in ([NUM_TOKENS], [100, *range(101, NUM_TOKENS + 1)]):
        expected, found = run(usual, bounds, []), run(deterministic, bounds, [])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "dtype", "wished", "complaint"),
    [
        ("cuda", "float32", KernelChoice(), "device cpu and dtype float32, not cuda"),
        ("cpu", "bfloat16", KernelChoice(), "not cpu and bfloat16"),
        ("cpu", "float32", KernelChoice("plain"), "linear_kernel .* not 'plain'"),
        ("cpu", "float32", KernelChoice(quantization="int8"), "no quantization, .* 'int8'"),
    ],
)
def test_settings_that_can_promise_no_bits_are_refused(
    spec: ModelSpec, device: str, dtype: str, wished: KernelChoice, complaint: str
) -> None:
    with pytest.raises(SettingsError, match=f"deterministic = True needs .*{complaint}"):
        invariant_kernels(spec.text, device, dtype, wished)


def test_models_that_can_promise_no_bits_are_refused(spec: ModelSpec) -> None:
    for text in (
        replace(spec.text, bidirectional_media=True),
        replace(spec.text, head_dim=12),
        replace(spec.text, intermediate_size=520),
    ):
        with pytest.raises(SettingsError, match="deterministic = True needs a"):
            invariant_kernels(text, "cpu", "float32", KernelChoice())
