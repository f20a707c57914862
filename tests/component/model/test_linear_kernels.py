"""Linear kernels: right to rounding, and the same for a row whatever rows share the call."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.errors import SettingsError
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.kernels.choice import KernelChoice, has_compiled_kernels
from shared.model.kernels.narrow import INT8_MAX, MAX_COMPILED_ROWS, Bf16Kernel, Int8Kernel
from shared.model.kernels.packed import PackedKernel
from shared.model.kernels.team import run_on_team
from shared.model.linear import LinearKernel
from shared.model.loader import load_language_model
from shared.modelspec import ModelSpec
from tests.support.text_configs import VOCAB_SIZE

BF16_ROUNDING = 2.0**-8
# Widths with and without a tail of four vectors, and one that no vector divides.
SHAPES = ((77, 64), (33, 72), (5, 8), (64, 2088), (40, 30))

needs_compiled = pytest.mark.skipif(
    not has_compiled_kernels(), reason="needs numba and a CPU with fused multiply-add"
)
compiled_or_not = pytest.mark.parametrize(
    "compiled", [pytest.param(True, marks=needs_compiled), False]
)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide_bias = None if bias is None else bias.double()
    return torch.nn.functional.linear(x.double(), weight.double(), wide_bias)


@compiled_or_not
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_bf16_is_right_to_one_rounding(
    compiled: bool, shape: tuple[int, int], has_bias: bool
) -> None:
    weight = random(*shape, dtype=torch.bfloat16)
    bias = random(shape[0], dtype=torch.bfloat16, seed=1) if has_bias else None
    kernel = Bf16Kernel(weight, compiled=compiled)
    for rows in (*range(1, 34), 70):
        x = random(rows, shape[1], dtype=torch.bfloat16, seed=rows)
        expected = exact(x, weight, bias)
        got = kernel.run(x, bias)
        assert got.dtype == torch.bfloat16
        # The sum itself is float32: its terms, not the result, set its error.
        terms = exact(x.abs(), weight.abs(), None)
        allowed = expected.abs() * BF16_ROUNDING + terms * 1e-5
        assert bool(((got.double() - expected).abs() <= allowed).all())


@needs_compiled
@pytest.mark.parametrize(
    ("dtype", "quantized"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)],
)
@pytest.mark.parametrize("width", [200, 2088])  # short rows are read in another order when many
def test_a_row_does_not_depend_on_its_neighbours(
    dtype: torch.dtype, quantized: bool, width: int
) -> None:
    weight, bias = random(77, width, dtype=dtype), random(77, dtype=dtype, seed=1)
    kernel: LinearKernel = (
        Int8Kernel(weight, compiled=True) if quantized else Bf16Kernel(weight, compiled=True)
    )
    x = random(MAX_COMPILED_ROWS, width, dtype=dtype, seed=2)
    alone = torch.cat([kernel.run(row[None], bias) for row in x])
    for rows in range(1, MAX_COMPILED_ROWS + 1):
        assert torch.equal(kernel.run(x[:rows], bias), alone[:rows])
    assert torch.equal(kernel.run(x.flip(0), bias), alone.flip(0))


@needs_compiled
def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    weight = random(16, 64, dtype=torch.bfloat16)
    wide = random(5, 100, dtype=torch.bfloat16)
    kernel = Bf16Kernel(weight, compiled=True)
    assert torch.equal(kernel.run(wide[:, 7:71], None), kernel.run(wide[:, 7:71].clone(), None))


@needs_compiled
def test_threads_give_the_same_result() -> None:
    weight = random(999, 256, dtype=torch.bfloat16)
    x = random(4, 256, dtype=torch.bfloat16, seed=1)
    kernel = Bf16Kernel(weight, compiled=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = kernel.run(x, None)
        torch.set_num_threads(3)
        for _ in range(20):
            assert torch.equal(kernel.run(x, None), alone)
    finally:
        torch.set_num_threads(before)


@needs_compiled
def test_not_a_number_stays_visible() -> None:
    weight = random(16, 64, dtype=torch.bfloat16)
    x = random(2, 64, dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    got = Bf16Kernel(weight, compiled=True).run(x, None)
    assert bool(got[0].isfinite().all())
    assert bool(got[1].isnan().all())


@compiled_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_errs_by_half_a_step_per_weight_at_most(compiled: bool, dtype: torch.dtype) -> None:
    weight, bias = random(40, 96, dtype=dtype), random(40, dtype=dtype, seed=1)
    weight[3] = 0.0
    kernel = Int8Kernel(weight, compiled=compiled)
    half_step = weight.double().abs().amax(1) / INT8_MAX / 2
    for rows in (1, 2, 7, 16, 17, 33):
        x = random(rows, 96, dtype=dtype, seed=rows)
        expected = exact(x, weight, bias)
        allowed = x.double().abs().sum(1)[:, None] * half_step * 1.001
        rounding = BF16_ROUNDING if dtype == torch.bfloat16 else 1e-5
        assert bool(
            (
                (kernel.run(x, bias) - expected).abs() <= allowed + (1 + expected.abs()) * rounding
            ).all()
        )


def test_packed_float32_agrees_with_float64() -> None:
    weight, bias = random(40, 96, dtype=torch.float32), random(40, dtype=torch.float32, seed=1)
    kernel = PackedKernel(weight)
    for rows in (1, 3, 40):
        x = random(rows, 96, dtype=torch.float32, seed=rows)
        assert float((kernel.run(x, bias) - exact(x, weight, bias)).abs().max()) < 1e-4


def test_wishes_that_cannot_be_met_name_setting_value_and_what_is_allowed() -> None:
    with pytest.raises(SettingsError, match=r"linear_kernel='fast' is not one of"):
        KernelChoice(linear="fast")
    with pytest.raises(SettingsError, match=r"linear_kernel='plain' cannot .* 'compiled'"):
        KernelChoice(linear="plain", quantization="int8")
    weight = random(8, 8, dtype=torch.float64)
    with pytest.raises(SettingsError, match=r"int8' needs dtype bfloat16 or float32 .* float64"):
        KernelChoice(quantization="int8").kernel_for(weight)
    with pytest.raises(SettingsError, match=r"compiled' needs dtype bfloat16 .* float32"):
        KernelChoice(linear="compiled").kernel_for(weight.float())
    assert KernelChoice().kernel_for(weight).name == "plain"


CHOICES = {
    "bfloat16": KernelChoice(linear="compiled"),
    "bfloat16 int8": KernelChoice(quantization="int8"),
    "float32": KernelChoice(),
    "float32 packed": KernelChoice(linear="packed"),
    "float32 int8": KernelChoice(quantization="int8"),
}


@needs_compiled
@pytest.mark.parametrize("name", CHOICES)
def test_greedy_tokens_are_the_same_in_every_batch(
    name: str, model_dir_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """33 sequences: alone, and in batches on both sides of the border between the two ways."""
    folder = model_dir_of("qwen2")
    with caplog.at_level(logging.INFO, "shared.model.kernels.choice"):
        model = load_language_model(folder, dtype=name.split()[0], kernels=CHOICES[name])
    numbers = re.findall(r"(\d+) x", caplog.text)
    assert sum(map(int, numbers)) == 13  # three layers of four, and the tied head
    geometry = KvGeometry.of(ModelSpec.load(folder).text, block_size=16, dtype=name.split()[0])
    prompts = np.random.default_rng(0).integers(2, VOCAB_SIZE - 10, (33, 9))

    def tokens(rows: list[int], num_steps: int) -> list[list[int]]:
        kv = KvCache(geometry, 2 * len(rows))
        new, cached = [list(prompts[row]) for row in rows], 0
        chosen: list[list[int]] = [[] for _ in rows]
        for _ in range(num_steps):
            count = len(new[0])
            batch = ForwardBatch.pack(
                [
                    SequenceInput(ids, range(cached, cached + count), (2 * i, 2 * i + 1), cached)
                    for i, ids in enumerate(new)
                ],
                16,
            )
            picked = model(batch, kv).argmax(-1).tolist()
            for each, token in zip(chosen, picked, strict=True):
                each.append(token)
            new, cached = [[token] for token in picked], cached + count
        return chosen

    alone = [tokens([row], 8)[0] for row in range(33)]
    for size in (2, 7, 16, 17, 33):
        assert tokens(list(range(size)), 8) == alone[:size]


def test_a_kernel_runs_once_on_a_team_of_one() -> None:
    if not has_compiled_kernels():
        pytest.skip("needs numba")
    from shared.model.kernels import rows

    weight, x = random(3, 8, dtype=torch.bfloat16), random(1, 8, dtype=torch.bfloat16)
    out = torch.zeros(1, 3, dtype=torch.bfloat16)
    block = np.array(
        (0, 1, 3, 8, x.data_ptr(), 8, weight.data_ptr(), 0, 0, out.data_ptr()), np.int64
    )
    run_on_team(rows.bf16_rows.address, block, single=True)
    assert torch.equal(out, exact(x, weight, None).bfloat16())
