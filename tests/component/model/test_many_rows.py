"""The compiled product of many rows: right to rounding, and a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from shared.model.kernels import many_rows
from shared.model.kernels.choice import has_compiled_kernels
from shared.model.kernels.many_rows import MAX_BLOCKS, ManyRows, blocks_at_a_time

pytestmark = pytest.mark.skipif(
    not has_compiled_kernels(), reason="needs numba and a CPU with fused multiply-add"
)

BF16_ROUNDING = 2.0**-8
# Columns and width on both sides of a block, a vector and a piece of the reduced dimension.
SHAPES = ((5, 8), (16, 448), (145, 456), (24, 904), (1, 1344))


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return ManyRows(torch.bfloat16, torch.bfloat16).run(x, weight, None, bias)


def assert_right(
    got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Sums are float32: their terms, not the results, set the error of what is then rounded."""
    terms = x.double().abs() @ weight.double().abs().T
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    rounding = BF16_ROUNDING if got.dtype == torch.bfloat16 else 2.0**-24
    assert bool(((got - expected).abs() <= expected.abs() * rounding + terms * 1e-5).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_bf16_is_right_to_one_rounding(shape: tuple[int, int], has_bias: bool) -> None:
    weight = random(*shape, dtype=torch.bfloat16)
    bias = random(shape[0], dtype=torch.bfloat16, seed=1) if has_bias else None
    for rows in (1, 5, 6, 7, 49, 100):
        x = random(rows, shape[1] + 3, dtype=torch.bfloat16, seed=rows)[:, 3:]
        assert_right(product(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_right_to_one_rounding(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0))
    scale = random(shape[0], dtype=torch.float32, seed=2).abs()
    x, bias = random(50, shape[1], dtype=dtype), random(shape[0], dtype=dtype, seed=1)
    got = ManyRows(dtype, torch.int8).run(x, weight.to(torch.int8), scale, bias)
    assert got.dtype == dtype
    assert_right(got, x, weight * scale[:, None].double(), bias)


def test_a_row_depends_neither_on_others_nor_on_threads_nor_on_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, bias = random(145, 904, dtype=torch.bfloat16), random(145, dtype=torch.bfloat16, seed=1)
    x = random(100, 904, dtype=torch.bfloat16, seed=2)
    together = product(x, weight, bias)
    for rows in (1, 17, 30, 77):
        assert torch.equal(product(x[:rows], weight, bias), together[:rows])
        assert torch.equal(product(x[-rows:], weight, bias), together[-rows:])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(product(x, weight, bias), together)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(many_rows, "MAX_PANEL_BYTES", 1)  # one panel at a time
    parted = product(x.view(4, 25, 904), weight, bias)
    assert torch.equal(parted.view(100, -1), together)


def test_not_a_number_stays_in_its_row() -> None:
    weight, x = random(40, 64, dtype=torch.bfloat16), random(20, 64, dtype=torch.bfloat16)
    x[7, 5] = float("nan")
    got = product(x, weight)
    assert bool(got[7].isnan().all())
    assert int(got.isnan().any(1).sum()) == 1


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_work_is_divided_evenly(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for num_blocks in range(1, 700):
        size = blocks_at_a_time(num_blocks)
        assert 1 <= size <= MAX_BLOCKS
        num_pieces = -(-num_blocks // size)
        if num_blocks >= 16 * threads:
            # No thread has more than a quarter over the mean.
            assert -(-num_pieces // threads) * size <= num_blocks / threads * 1.25


def test_rows_of_another_format_are_refused() -> None:
    weight = random(16, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 rows for a kernel of torch.bfloat16"):
        product(random(20, 64, dtype=torch.float32), weight)
