"""Compiled norms, gates and rotations against float64 and torch's operators."""

from __future__ import annotations

import pytest
import torch

from shared.model.kernels.choice import has_compiled_kernels
from shared.model.kernels.row_kernels import norm_heads, rms_norm, rotate, swiglu
from shared.model.norm import RmsNorm

EPS = 1e-6
NUM_ROWS = 40

needs_compiled = pytest.mark.skipif(
    not has_compiled_kernels(), reason="needs numba and a CPU with fused multiply-add"
)


@needs_compiled
@pytest.mark.parametrize("width", [8, 72, 896])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e4])
def test_rows_are_normalised_as_in_float64(width: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(NUM_ROWS, width + 5, generator=generator) * scale).bfloat16()[:, 5:]
    weight = torch.randn(width, generator=generator).bfloat16()
    got = rms_norm(x, weight, EPS)
    assert got is not None
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    # Rounded twice: the norm itself, then its product with the weight.
    assert bool(((got - expected).abs() <= expected.abs() * 2.01 * 2.0**-8).all())
    for row, alone in zip(x, got, strict=True):
        again = rms_norm(row[None], weight, EPS)
        assert again is not None
        assert torch.equal(again[0], alone)


@needs_compiled
@pytest.mark.parametrize(("num_q", "num_k", "head_dim"), [(1, 1, 8), (14, 2, 72), (16, 8, 128)])
def test_heads_are_normalised_as_rows_are(num_q: int, num_k: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(NUM_ROWS, num_q + num_k + 3, head_dim, generator=generator).bfloat16()
    heads = wide[:, : num_q + num_k]
    q_weight, k_weight = torch.randn(2, head_dim, generator=generator).bfloat16()
    got = norm_heads(heads, q_weight, k_weight, EPS, num_q)
    assert got is not None
    for part, weight in ((slice(num_q), q_weight), (slice(num_q, None), k_weight)):
        rows = heads[:, part].reshape(-1, head_dim)
        expected = rms_norm(rows, weight, EPS)
        assert expected is not None
        assert torch.equal(got[:, part].reshape(-1, head_dim), expected)


@needs_compiled
@pytest.mark.parametrize("width", [8, 72, 4864])
def test_gates_are_those_of_torch(width: int) -> None:
    """Its exponential is another, so what lies on a border of rounding may go to the other side."""
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(NUM_ROWS, 2 * width + 5, generator=generator) * 6).bfloat16()[:, 5:]
    gate, up = gate_up.chunk(2, dim=-1)
    got = swiglu(gate_up)
    assert got is not None
    assert int((got != torch.nn.functional.silu(gate) * up).sum()) <= 1 + got.numel() // 1000
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert bool(((got - expected).abs() <= expected.abs() * 2.01 * 2.0**-8).all())
    for row, alone in zip(gate_up, got, strict=True):
        again = swiglu(row[None])
        assert again is not None
        assert torch.equal(again[0], alone)


@needs_compiled
def test_gates_of_every_size_and_not_a_number() -> None:
    largest = torch.finfo(torch.bfloat16).max
    gates = [0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 95.0, -95.0, largest, -largest]
    gates += [float("inf"), float("nan")] + [1.0] * 4
    up = torch.ones(16, dtype=torch.bfloat16)
    gate = torch.tensor(gates, dtype=torch.bfloat16)
    got = swiglu(torch.cat((gate, up))[None])
    assert got is not None
    expected = torch.nn.functional.silu(gate.double())
    allowed = expected.abs() * 2.01 * 2.0**-8 + 1e-34
    is_number = expected.isfinite()
    assert bool(((got[0] - expected).abs() <= allowed)[is_number].all())
    assert got[0, 10] == float("inf")
    assert bool(got[0, 11].isnan())


@needs_compiled
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_rotations_are_those_of_torch(head_dim: int) -> None:
    """To the last bit: every product and sum is rounded where torch rounds it."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(NUM_ROWS, 9, head_dim, generator=generator).bfloat16()[:, 2:]
    angles = torch.rand(NUM_ROWS, 1, head_dim, generator=generator) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    half = head_dim // 2
    swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
    for rows in (1, NUM_ROWS):
        got = rotate(heads[:rows], cos[:rows], sin[:rows])
        assert got is not None
        assert torch.equal(got, (heads * cos + swapped * sin)[:rows])
    assert rotate(heads.float(), cos.float(), sin.float()) is None
    assert rotate(heads[..., :8], cos[..., :8], sin[..., :8]) is None


@needs_compiled
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_rotations_by_float32_angles_are_rounded_once(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(NUM_ROWS, 9, head_dim, generator=generator).bfloat16()[:, 2:]
    angles = torch.rand(NUM_ROWS, 1, head_dim, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    half = head_dim // 2
    swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
    for rows in (1, NUM_ROWS):
        got = rotate(heads[:rows], cos[:rows], sin[:rows])
        assert got is not None
        expected = heads.float() * cos + swapped.float() * sin
        assert torch.equal(got, expected.bfloat16()[:rows])
    assert rotate(heads, cos.double(), sin.double()) is None


def test_everything_else_goes_to_torch() -> None:
    weight = torch.ones(16)
    assert rms_norm(torch.ones(2, 16), weight, EPS) is None
    odd = torch.ones(2, 12, dtype=torch.bfloat16)
    assert rms_norm(odd, weight[:12].bfloat16(), EPS) is None
    assert swiglu(odd) is None
    norm = RmsNorm(12, EPS, torch.bfloat16)
    norm.weight.data.fill_(1.0)
    assert torch.equal(norm.forward(odd), odd)
    assert swiglu(torch.ones(2, 16)) is None
    heads = torch.ones(2, 4, 16, dtype=torch.bfloat16)
    assert rms_norm(heads, weight.bfloat16(), EPS) is None
