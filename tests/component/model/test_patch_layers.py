"""Patch towers with the kernels of a CPU: the same attention, and no less exact than without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.model.kernels.choice import has_bf16_instructions, has_paired_kernels
from shared.model.loader import load_plain_tower, load_tower
from shared.model.towers.patch_attention import LayersShare, attend_within
from shared.model.towers.patch_layers import KernelLinear
from shared.modelspec import ModelSpec
from tests.support.models import make_prompt
from tests.support.vision_folders import vision_dir_of

__all__ = ["vision_dir_of"]

GRIDS = ((14, 8), (2, 2), (10, 6))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float
) -> torch.Tensor:
    """In float64, one sequence after the other."""
    pieces = []
    for triple in zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True):
        query, key, value = (x.transpose(0, 1) for x in triple)
        weights = (query @ key.mT * scale).softmax(-1)
        pieces.append((weights @ value).transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize(
    "lengths", [[64, 64, 16, 64, 1], [70], [5, 5, 3, 3, 3]], ids=["windows", "picture", "frames"]
)
def test_attention_within_sequences(lengths: list[int], head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Queries, keys and values of a patch lie side by side.
    qkv = torch.randn(sum(lengths), 3, 2, head_dim, generator=generator).to(dtype)
    q, k, v = qkv.unbind(1)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    share = LayersShare()
    for scale in (head_dim**-0.5, 0.3):
        expected = attended(q, k, v, lengths, scale)
        for _ in range(2):  # in memory of its own, and in what was kept
            out = attend_within(q, k, v, bounds, scale, share)
            assert out.dtype == dtype
            assert float((out.double() - expected).abs().max()) < TOLERANCES[dtype]


@pytest.mark.skipif(not has_paired_kernels(), reason="needs bfloat16 instructions and numba")
def test_pairs_are_multiplied_where_the_processor_can() -> None:
    share = LayersShare()
    x = torch.randn(6, 2, 64).bfloat16()
    bounds = torch.tensor([0, 3, 6])
    attend_within(x, x, x, bounds, 64**-0.5, share)
    assert share.paged.cache_info().currsize == 1
    narrow = x[..., :8]
    attend_within(narrow, narrow, narrow, bounds, 8**-0.5, share)
    attend_within(x, x, x, bounds, 0.3, share)
    assert share.paged.cache_info().currsize == 1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_bfloat16_tower_is_as_exact_as_without_kernels(
    family: str,
    model_dir_of: Callable[[str], Path],
    vision_dir_of: Callable[[str], Path],
) -> None:
    folder = (vision_dir_of if family == "qwen3_vl" else model_dir_of)(family)
    pixels = make_prompt(ModelSpec.load(folder), 8, GRIDS, seed=5).pixels
    exact = torch.cat(load_tower(folder, dtype="float64").encode(pixels))
    quick = load_tower(folder, dtype="bfloat16")
    plain = load_plain_tower(folder, dtype="bfloat16")
    if has_bf16_instructions():
        kinds = {type(module) for module in quick.module.modules()}
        assert KernelLinear in kinds
        assert torch.nn.Linear not in kinds
    error, plain_error = (
        float((torch.cat(tower.encode(pixels)).double() - exact).norm()) for tower in (quick, plain)
    )
    assert plain_error > 0
    assert error < 1.3 * plain_error
