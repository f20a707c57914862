"""Attention within windows, rotation included, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from shared.model.gpu import window_attention as kernel
from shared.model.gpu.window_attention import window_attention

TOLERANCES = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = (64, 3, 17, 64, 1)


def attend_in_float64(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
) -> torch.Tensor:
    q, k, v = heads.double().unbind(1)
    half = heads.shape[-1] // 2

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos.double()[:, None] + turned * sin.double()[:, None]

    pieces = []
    for triple in zip(*(x.split(LENGTHS) for x in (rotated(q), rotated(k), v)), strict=True):
        windows = [x.transpose(0, 1) for x in triple]
        pieces.append(scaled_dot_product_attention(*windows, scale=scale).transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(4, 80), (3, 32), (2, 8), (1, 72), (8, 128)])
@pytest.mark.parametrize("num_programs", [1, 1024], ids=["several heads each", "one head each"])
def test_windows(
    num_programs: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "NUM_PROGRAMS", num_programs)
    generator = torch.Generator().manual_seed(0)
    num_patches = sum(LENGTHS)
    heads = torch.randn(num_patches, 3, num_heads, head_dim, generator=generator)
    heads = heads.to(device, dtype)
    angles = torch.randn(num_patches, head_dim // 2, generator=generator).to(device).repeat(1, 2)
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0).int().to(device)
    out = window_attention(heads, angles.cos(), angles.sin(), bounds, head_dim**-0.5)
    expected = attend_in_float64(heads, angles.cos(), angles.sin(), head_dim**-0.5)
    assert out.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
