"""The compiled norm of a few rows against torch's operators."""

from __future__ import annotations

import pytest
import torch

from shared.model.kernels.choice import has_compiled_kernels
from shared.model.kernels.few_norm import norm_of_few
from shared.model.kernels.narrow import MAX_COMPILED_ROWS
from shared.model.norm import RmsNorm

EPS = 1e-6


@pytest.mark.skipif(
    not has_compiled_kernels(), reason="needs numba and a CPU with fused multiply-add"
)
@pytest.mark.parametrize("width", [8, 72, 896])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e4])
def test_rows_are_normalised_as_in_float64(width: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(MAX_COMPILED_ROWS, width + 5, generator=generator) * scale).bfloat16()[:, 5:]
    weight = torch.randn(width, generator=generator).bfloat16()
    got = norm_of_few(x, weight, EPS)
    assert got is not None
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    # Rounded twice: the norm itself, then its product with the weight.
    assert bool(((got - expected).abs() <= expected.abs() * 2.01 * 2.0**-8).all())
    for row, alone in zip(x, got, strict=True):
        again = norm_of_few(row[None], weight, EPS)
        assert again is not None
        assert torch.equal(again[0], alone)


def test_everything_else_goes_to_torch() -> None:
    weight = torch.ones(16)
    assert norm_of_few(torch.ones(2, 16), weight, EPS) is None
    many = torch.ones(MAX_COMPILED_ROWS + 1, 16, dtype=torch.bfloat16)
    assert norm_of_few(many, weight.bfloat16(), EPS) is None
    norm = RmsNorm(16, EPS, torch.bfloat16)
    norm.weight.data.fill_(1.0)
    assert torch.equal(norm.forward(many), many)
    heads = torch.ones(2, 4, 16, dtype=torch.bfloat16)
    assert norm_of_few(heads, weight.bfloat16(), EPS) is None
