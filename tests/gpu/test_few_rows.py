"""Linear maps of few rows against float64, whole and in parts, and what reads parts."""

from __future__ import annotations

import pytest
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.gpu import few_rows, fused
from shared.model.gpu.parts import Parts, whole
from shared.model.rope import RotaryEmbedding
from shared.model.rope_spec import RopeSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A result near 4 is rounded once; products are exact and summed in float32.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}

SHAPES = [
    (256, 64),  # a weight of few rows: several parts
    (200, 120),  # neither width is a multiple of a tile
    (64, 8704),  # a weight of many rows: whole, also on a large device
]


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


class Map:
    """A weight and its bias."""

    def __init__(self, width_in: int, width_out: int, dtype: torch.dtype, device: str) -> None:
        weight = random(width_out, width_in, dtype=dtype, device=device, seed=1)
        self.weight = weight / width_in**0.5
        self.bias = random(width_out, dtype=dtype, device=device, seed=2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor | Parts:
        return few_rows.few_rows(x, self.weight, self.bias)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        return x.double() @ self.weight.double().T + self.bias.double()


def close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width_in", "width_out"), SHAPES)
@pytest.mark.parametrize("num_rows", [1, 5, 33])
def test_a_map_of_few_rows(
    num_rows: int, width_in: int, width_out: int, dtype: torch.dtype, device: str
) -> None:
    apply = Map(width_in, width_out, dtype, device)
    # Rows out of a wider matrix: they are apart.
    x = random(num_rows, 2 * width_in, dtype=dtype, device=device)[:, :width_in]
    out = apply(x)
    assert isinstance(out, Parts) == (width_out < 8704)
    close(whole(out), apply.exact(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width_in", "width_out"), SHAPES)
@pytest.mark.parametrize(
    ("num_rows", "companies"),
    [(16, [slice(0, 1), slice(3, 8)]), (64, [slice(0, 17), slice(20, 53)])],
    ids=["small", "large"],
)
def test_a_row_is_the_same_in_every_company_of_its_kind(
    num_rows: int,
    companies: list[slice],
    width_in: int,
    width_out: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    # Bit for bit on a GPU. The interpreter multiplies by NumPy, which orders sums by the shapes.
    tolerance = 0.0 if device == "cuda" else TOLERANCES[dtype]
    apply = Map(width_in, width_out, dtype, device)
    x = random(num_rows, width_in, dtype=dtype, device=device)
    together = whole(apply(x))
    for rows in companies:
        alone = whole(apply(x[rows]))
        torch.testing.assert_close(alone, together[rows], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_with_a_residual_and_its_norm(dtype: torch.dtype, device: str) -> None:
    apply = Map(256, 120, dtype, device)
    x = random(3, 256, dtype=dtype, device=device)
    residual = random(3, 120, dtype=dtype, device=device, seed=3)
    weight = random(120, dtype=dtype, device=device, seed=4)
    parts = apply(x)
    assert isinstance(parts, Parts)
    expected = apply.exact(x) + residual.double()
    close(parts.sum(residual), expected, dtype)
    total, normed = fused.add_rms_norm(parts, residual, weight, 1e-6)
    assert torch.equal(total, parts.sum(residual))
    wide = total.double()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    close(normed, wide, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("num_q", "num_kv", "head_dim"), [(4, 2, 16), (7, 1, 8)])
def test_heads_in_parts_are_rotated_into_the_cache(
    num_q: int, num_kv: int, head_dim: int, dtype: str, device: str
) -> None:
    geometry = KvGeometry(2, num_kv, head_dim, block_size=4, dtype=dtype)
    kv, expected = (KvCache(geometry, 3, device=device) for _ in range(2))
    kv.data.fill_(1.0)
    expected.data.fill_(1.0)
    apply = Map(256, (num_q + 2 * num_kv) * head_dim, kv.data.dtype, device)
    x = random(5, 256, dtype=kv.data.dtype, device=device)
    parts = apply(x)
    assert isinstance(parts, Parts)
    positions = torch.arange(5, device=device) * 7
    rotary = RotaryEmbedding(RopeSpec(rope_type="default", theta=10_000.0), head_dim, device).at(
        positions, kv.data.dtype
    )
    angles = rotary.cos, rotary.sin_signed
    slots = torch.tensor([11, 0, 6, 5, 1], device=device)
    out = fused.rotate_parts_into_cache(parts, *angles, kv.layer_slots(1), slots)
    heads = whole(parts).view(5, -1, head_dim)
    v = heads[:, num_q + num_kv :]
    qk = fused.rotate_into_cache(
        heads[:, : num_q + num_kv], v, *angles, expected.layer_slots(1), slots
    )
    # Parts are rounded after rotation and not before it: once less.
    tolerance = {"float32": 1e-5, "float16": 8e-3, "bfloat16": 6e-2}[dtype]
    torch.testing.assert_close(out, torch.cat((qk, v), 1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(kv.data, expected.data, rtol=tolerance, atol=tolerance)
    cached = kv.layer_slots(1)[:, slots]
    assert torch.equal(cached[0], out[:, num_q : num_q + num_kv])
    assert torch.equal(cached[1], out[:, num_q + num_kv :])


def test_a_weight_of_another_width_is_refused(device: str) -> None:
    x = random(1, 8, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"rows \(1, 8\).*for a weight \(4, 16\)"):
        few_rows.few_rows(x, random(4, 16, dtype=torch.float32, device=device), None)


def test_a_residual_of_other_rows_is_refused(device: str) -> None:
    parts = Parts(torch.zeros(2, 3, 4, device=device), None, torch.float32)
    with pytest.raises(ValueError, match=r"residual \(2, 4\).*for 3 rows of 4"):
        parts.sum(torch.zeros(2, 4, device=device))
