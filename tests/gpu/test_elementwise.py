"""Normalisation, rotation, gating and cache write against float64 or the plain operation."""

from __future__ import annotations

import pytest
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.gpu import fused
from shared.model.rope import RotaryEmbedding
from shared.model.rope_spec import RopeSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One rounding of a value near 4, and a second one where the plain operation rounds twice.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
    )


def float64_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> torch.Tensor:
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed * (weight.double() + unit_offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 128, 3584])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm(width: int, dtype: torch.dtype, unit_offset: bool, device: str) -> None:
    x = random(5, width, dtype=dtype, device=device) * 3
    weight = random(width, dtype=dtype, device=device, seed=1)
    out = fused.rms_norm(x, weight, 1e-6, unit_offset=unit_offset)
    close(out, float64_norm(x, weight, 1e-6, unit_offset), dtype)


def test_rms_norm_of_heads_between_others(device: str) -> None:
    """Query-key normalisation reads heads out of the fused projection's output."""
    qkv = random(7, 6, 80, dtype=torch.float32, device=device)
    weight = random(80, dtype=torch.float32, device=device, seed=1)
    heads = qkv[:, 3:5]
    close(
        fused.rms_norm(heads, weight, 1e-5),
        float64_norm(heads, weight, 1e-5, False),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_a_sum(dtype: torch.dtype, device: str) -> None:
    x, residual = (random(3, 200, dtype=dtype, device=device, seed=i) for i in (0, 1))
    weight = random(200, dtype=dtype, device=device, seed=2)
    total, normed = fused.add_rms_norm(x, residual, weight, 1e-6)
    # One unit in the last place: the interpreter cuts bfloat16 off, a GPU rounds to the nearest.
    torch.testing.assert_close(total, x + residual, rtol=2**-7, atol=0)
    close(normed, float64_norm(total, weight, 1e-6, False), dtype)


def test_rms_norm_refuses_values_that_lie_apart(device: str) -> None:
    x = random(8, 8, dtype=torch.float32, device=device).T
    with pytest.raises(ValueError, match="values of a row are 8 apart"):
        fused.rms_norm(x, x[0], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("is_three_axes", [False, True], ids=["text", "mrope"])
def test_rotation(head_dim: int, is_three_axes: bool, dtype: torch.dtype, device: str) -> None:
    half = head_dim // 2
    section = (half // 4, half // 2, half - half // 4 - half // 2) if is_three_axes else None
    spec = RopeSpec(rope_type="default", theta=10_000.0, mrope_section=section)
    positions = torch.arange(15, device=device).view(3, 5) * 7
    rotary = RotaryEmbedding(spec, head_dim, device).at(
        positions if is_three_axes else positions[0], dtype
    )
    # Query and key heads in front of value heads, as the fused projection gives them.
    heads = random(5, 7, head_dim, dtype=dtype, device=device)[:, :5]
    wide, cos, sin = heads.double(), rotary.cos.double(), rotary.sin_signed.double()
    swapped = torch.cat((wide[..., half:], wide[..., :half]), dim=-1)
    out = fused.rotate(heads, rotary.cos, rotary.sin_signed)
    close(out, wide * cos + swapped * sin, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("num_q", "num_kv", "head_dim"), [(4, 2, 64), (7, 1, 80), (3, 3, 128)])
def test_rotation_with_the_cache_write(
    num_q: int, num_kv: int, head_dim: int, dtype: str, device: str
) -> None:
    geometry = KvGeometry(2, num_kv, head_dim, block_size=4, dtype=dtype)
    kv, expected = (KvCache(geometry, 3, device=device) for _ in range(2))
    kv.data.fill_(1.0)
    expected.data.fill_(1.0)
    heads = random(5, num_q + 2 * num_kv, head_dim, dtype=kv.data.dtype, device=device)
    qk, v = heads[:, : num_q + num_kv], heads[:, num_q + num_kv :]
    spec = RopeSpec(rope_type="default", theta=10_000.0)
    positions = torch.arange(5, device=device) * 7
    rotary = RotaryEmbedding(spec, head_dim, device).at(positions, qk.dtype)
    angles = rotary.cos, rotary.sin_signed
    slots = torch.tensor([11, 0, 6, 5, 1], device=device)
    out = fused.rotate_into_cache(qk, v, *angles, kv.layer_slots(1), slots)
    assert torch.equal(out, fused.rotate(qk, *angles))
    fused.write_cache(expected.layer_slots(1), slots, out[:, num_q:], v)
    assert torch.equal(kv.data, expected.data)


def test_rotation_refuses_a_cache_of_other_heads(device: str) -> None:
    kv = KvCache(KvGeometry(1, 2, 64, 4, "float32"), 1, device=device)
    heads = random(1, 3, 64, dtype=torch.float32, device=device)
    angles = heads[:, :1], heads[:, :1]
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"values \(1, 1, 64\) do not fit a cache of"):
        fused.rotate_into_cache(heads[:, :2], heads[:, 2:], *angles, kv.layer_slots(0), slots)


def test_rotation_refuses_angles_of_other_tokens(device: str) -> None:
    heads = random(5, 2, 16, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"cosines \(4, 1, 16\) do not fit heads \(5, 2, 16\)"):
        fused.rotate(heads, heads[:4, :1], heads[:4, :1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 1024, 2500])
def test_gated_activation(width: int, dtype: torch.dtype, device: str) -> None:
    gate_up = random(3, 2 * width, dtype=dtype, device=device) * 3
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(fused.swiglu(gate_up), torch.nn.functional.silu(gate) * up, dtype)


def test_gated_activation_refuses_an_odd_width(device: str) -> None:
    with pytest.raises(ValueError, match=r"gate and up of shape \(1, 5\)"):
        fused.swiglu(random(1, 5, dtype=torch.float32, device=device))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(2, 64), (3, 80)])
def test_cache_write(dtype: str, num_kv_heads: int, head_dim: int, device: str) -> None:
    geometry = KvGeometry(2, num_kv_heads, head_dim, block_size=4, dtype=dtype)
    kv, expected = (KvCache(geometry, 3, device=device) for _ in range(2))
    kv.data.fill_(1.0)
    expected.data.fill_(1.0)
    torch_dtype = kv.data.dtype
    heads = random(4, 3 * num_kv_heads, head_dim, dtype=torch_dtype, device=device)
    k, v = heads[:, :num_kv_heads].contiguous(), heads[:, 2 * num_kv_heads :]
    slots = torch.tensor([11, 0, 6, 5], device=device)
    fused.write_cache(kv.layer_slots(1), slots, k, v)
    expected.layer_slots(1)[0, slots] = k
    expected.layer_slots(1)[1, slots] = v
    assert torch.equal(kv.data, expected.data)


def test_cache_write_refuses_heads_of_another_size(device: str) -> None:
    kv = KvCache(KvGeometry(1, 2, 64, 4, "float32"), 1, device=device)
    new = random(1, 2, 32, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="for a cache of 2 heads of 64"):
        fused.write_cache(kv.layer_slots(0), torch.zeros(1, dtype=torch.int64), new, new)
