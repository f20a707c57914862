"""bfloat16 instructions: right to rounding, and each form of the weight only where it is wanted."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from shared.demo import model_dir
from shared.errors import SettingsError
from shared.model.kernels.choice import KernelChoice, has_paired_kernels
from shared.model.kernels.narrow import Int8Kernel
from shared.model.kernels.packed import PackedKernel
from shared.model.kernels.paired import MAX_FEW_ROWS, PairedKernel
from shared.model.linear import FusedLinear, Rows
from shared.model.loader import load_language_model

needs_paired = pytest.mark.skipif(
    not has_paired_kernels(), reason="needs numba and a CPU with AVX-512 bfloat16 instructions"
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_paired
@pytest.mark.parametrize("shape", [(77, 64), (3, 32), (130, 1056)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kept", list(Rows))
def test_it_is_right_to_one_rounding(shape: tuple[int, int], has_bias: bool, kept: Rows) -> None:
    weight = random(*shape)
    bias = random(shape[0], seed=1) if has_bias else None
    kernel = PairedKernel(weight, kept)
    for rows in (*range(1, 20), 70):
        x = random(rows, shape[1] + 8, seed=rows)[:, 8:]
        wide_bias = None if bias is None else bias.double()
        expected = torch.nn.functional.linear(x.double(), weight.double(), wide_bias)
        terms = x.double().abs() @ weight.double().abs().T
        allowed = expected.abs() * 2.0**-8 + terms * 1e-5
        assert bool(((kernel.run(x, bias).double() - expected).abs() <= allowed).all())


@needs_paired
@pytest.mark.parametrize("width", [192, 2080])
def test_a_row_does_not_depend_on_its_neighbours(width: int) -> None:
    weight, bias, x = random(77, width), random(77, seed=1), random(40, width, seed=2)
    kernel = PairedKernel(weight, Rows.FEW)
    whole = kernel.run(x, bias)
    for start, stop in ((0, 1), (3, 4), (5, 7), (9, 16), (0, 39)):
        assert torch.equal(kernel.run(x[start:stop], bias), whole[start:stop])


@needs_paired
@pytest.mark.parametrize("shape", [(77, 64), (3, 32), (130, 1056)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_int8_weights_are_multiplied_exactly(shape: tuple[int, int], has_bias: bool) -> None:
    """As float32 products would be: only the order of the sum differs, and rounding at the end."""
    weight = random(*shape)
    bias = random(shape[0], seed=1) if has_bias else None
    kernel = Int8Kernel(weight, compiled=True, paired=True)
    other = Int8Kernel(weight, compiled=True)
    assert (kernel.name, other.name) == ("paired int8", "compiled int8")
    whole = kernel.run(random(70, shape[1], seed=2), bias)
    terms = random(70, shape[1], seed=2).float().abs() @ weight.float().abs().T
    for rows in (*range(1, 20), 70):
        x = random(70, shape[1], seed=2)[:rows]
        got, expected = kernel.run(x, bias), other.run(x, bias)
        allowed = expected.float().abs() * 2.0**-7 + terms[:rows] * 1e-5
        assert bool(((got.float() - expected.float()).abs() <= allowed).all())
        assert torch.equal(got, whole[:rows])


@needs_paired
def test_rows_of_several_dimensions_keep_them() -> None:
    weight, x = random(40, 64), random(6, 64, seed=1)
    for kernel in (PairedKernel(weight, Rows.FEW), Int8Kernel(weight, compiled=True, paired=True)):
        assert torch.equal(kernel.run(x.view(2, 3, 64), None), kernel.run(x, None).view(2, 3, 40))


@needs_paired
def test_a_form_is_made_when_it_is_wanted_and_given_up_when_it_is_not() -> None:
    weight = random(96, 64)
    x = random(MAX_FEW_ROWS + 1, 64, seed=1)
    few, many = PairedKernel(weight, Rows.FEW).run(x, None), PackedKernel(weight).run(x, None)
    kept = weakref.ref(weight)
    kernel = PairedKernel(weight, Rows.BOTH)
    del weight
    assert torch.equal(kernel.run(x[:3], None), few[:3])
    assert torch.equal(kernel.run(x, None), many)
    kernel.expect(Rows.MANY)
    gc.collect()
    assert kept() is None
    assert torch.equal(kernel.run(x, None), many)
    kernel.expect(Rows.FEW)
    assert torch.equal(kernel.run(x, None), few)
    kernel.expect(Rows.BOTH)
    assert torch.equal(kernel.run(x, None), many)
    assert torch.equal(kernel.run(x[:3], None), few[:3])


@needs_paired
def test_a_model_keeps_what_its_steps_need() -> None:
    choice = KernelChoice(rows=Rows.MANY)
    model = load_language_model(model_dir(), dtype="bfloat16", kernels=choice)
    maps = [module for module in model.layers.modules() if isinstance(module, FusedLinear)]
    assert {type(each.kernel) for each in maps} == {PairedKernel}
    model.expect(Rows.FEW)
    x = random(40, model.spec.hidden_size)
    fresh = load_language_model(model_dir(), dtype="bfloat16", kernels=KernelChoice(rows=Rows.FEW))
    qkv = next(each for each in fresh.layers.modules() if isinstance(each, FusedLinear))
    assert torch.equal(maps[0].forward(x), qkv.forward(x))


def test_where_the_cpu_cannot_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.model.kernels.choice.has_paired_kernels", lambda: False)
    with pytest.raises(SettingsError, match="needs a CPU with AVX-512 bfloat16"):
        KernelChoice("paired").kernel_for(random(8, 32))


@needs_paired
def test_widths_that_no_instruction_reads_go_to_onednn() -> None:
    assert isinstance(KernelChoice("paired").kernel_for(random(8, 40)), PackedKernel)
    assert isinstance(KernelChoice().kernel_for(random(8, 64)), PairedKernel)
