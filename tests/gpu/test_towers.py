"""Patch towers with the kernels of a GPU against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen
from torch.nn.functional import scaled_dot_product_attention

from shared.model.gpu import towers
from shared.model.gpu.tower_layouts import TowerLayouts
from shared.model.loader import load_plain_tower, load_tower
from shared.model.towers.patches import PatchTower
from shared.modelspec import ModelSpec
from tests.support.models import make_prompt

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
GRIDS = ((14, 8), (2, 2), (10, 6))
"""Of 112 patches, which attention takes packed, and of fewer than a window holds."""


def quick_tower(folder: Path, device: str, dtype: str) -> PatchTower:
    """As a worker on a GPU loads it; on the CPU the same changes."""
    if device == "cuda":
        tower = load_tower(folder, dtype=dtype, device=device)
    else:
        tower = load_plain_tower(folder, dtype=dtype)
    assert isinstance(tower, PatchTower)
    if device == "cpu":
        towers.quicken(tower.module)
        tower._layouts = TowerLayouts(tower.module, tower.device)
    return tower


def attend_one_by_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    bounds_k: torch.Tensor,
    longest: int,
    longest_k: int,
    *,
    scale: float,
) -> torch.Tensor:
    """What torch's kernel for GPUs computes."""
    lengths = (bounds[1:] - bounds[:-1]).tolist()
    assert max(lengths) <= longest
    pieces = []
    for triple in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads = [x.transpose(0, 1) for x in triple]
        pieces.append(scaled_dot_product_attention(*heads, scale=scale).transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quick_tower_gives_the_same(
    family: str,
    dtype: str,
    device: str,
    model_dir_of: Callable[[str], Path],
    vision_dir_of: Callable[[str], Path],
    use_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cpu":
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend_one_by_one)
    folder = (vision_dir_of if family == "qwen3_vl" else model_dir_of)(family)
    pixels = make_prompt(ModelSpec.load(folder), 8, GRIDS, seed=5).pixels
    expected = load_tower(folder, dtype="float64").encode(pixels)
    quick = quick_tower(folder, device, dtype)
    is_packed = isinstance(quick.module.blocks[0].attn, towers.PackedAttention)
    assert is_packed == (dtype == "bfloat16")
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    for _ in range(2):  # with a layout of its own, and with one that was kept
        for mine, theirs in zip(quick.encode(pixels), expected, strict=True):
            assert mine.dtype == getattr(torch, dtype)
            scale = float(theirs.abs().max())
            assert float((mine.cpu().double() - theirs).abs().max()) < tolerance * scale


def test_an_odd_width_between_gate_and_up_is_filled_up(device: str) -> None:
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

    config = Qwen2_5_VLConfig().vision_config
    config.hidden_size, config.intermediate_size = 16, 21
    mlp = Qwen2_5_VLMLP(config, bias=True).double().to(device)
    x = torch.randn(5, 16, dtype=torch.float64, device=device)
    joined = towers.JoinedMlp(mlp)
    assert joined.gate_up.out_features == 48
    assert joined.down.in_features == 24
    torch.testing.assert_close(joined(x), mlp(x), rtol=0, atol=1e-12)
