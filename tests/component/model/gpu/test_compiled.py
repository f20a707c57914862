"""Every kernel becomes machine code for Hopper (sm_90) on a machine without a GPU.

The launches are those of production: triton's launcher is replaced by its compiler, which is given
the very arguments. Says nothing about speed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from shared.model.gpu import fused
from shared.model.gpu.attention import TritonAttention
from tests.support.paged_attention import Heads, paged_step

HOPPER = GPUTarget("cuda", 90, 32)
HOPPER_SHARED_BYTES = 227 * 1024
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
MATRIX_UNITS = {
    "_prefill": "wgmma.mma_async",
    "_split": "mma.sync",
}
BF16 = torch.bfloat16


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel's name and what the compiler made of it."""

    name: str
    result: Any

    def stack_bytes(self, folder: Path) -> int:
        """Local memory of a thread: registers that were spilled."""
        cubin = folder / f"{self.name}.cubin"
        cubin.write_bytes(self.result.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        shown = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        )
        return int(shown.stdout.partition("STACK:")[2].split()[0])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Compiled]:
    """Fills with every kernel that is launched."""
    results: list[Compiled] = []

    def compile_instead(
        self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        assert list(values) == self.arg_names
        constants = {p.name: values[p.name] for p in self.params if p.is_constexpr}
        signature = {
            name: "constexpr" if name in constants else type_of(value)
            for name, value in values.items()
        }
        # What the launcher would find out by itself: memory is aligned, rows are multiples of 16.
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name.endswith("stride")
        }
        source = ASTSource(self, signature, constants, aligned)
        result = triton.compile(source, target=HOPPER, options=options)
        results.append(Compiled(self.__name__, result))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_instead)
    return results


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launch_attention() -> None:
    heads = Heads(4, 7, 128)
    step = paged_step([(40, 30), (50, 1)], heads, block_size=16, dtype=BF16, device="cpu")
    plan = TritonAttention(heads.num_heads).plan(step.batch, step.kv)
    plan.attend(0, step.q, step.k, step.k, step.kv)


def launch_norms() -> None:
    x = torch.zeros(4, 3584, dtype=BF16)
    fused.rms_norm(x, x[0], 1e-6)
    fused.add_rms_norm(x, x, x[0], 1e-6)


def launch_others() -> None:
    heads = torch.zeros(4, 32, 128, dtype=BF16)
    fused.rotate(heads, heads[:, :1], heads[:, :1])
    fused.swiglu(torch.zeros(4, 2 * 18944, dtype=BF16))
    cached = torch.zeros(2, 16, 4, 128, dtype=BF16)
    fused.write_cache(cached, torch.arange(4), heads[:, :4], heads[:, 4:8])
    angles = heads[:, :1], heads[:, :1]
    fused.rotate_into_cache(heads[:, :28], heads[:, 28:], *angles, cached, torch.arange(4))


@pytest.mark.parametrize(
    ("launch", "names"),
    [
        (launch_attention, ["_prefill", "_split", "_join"]),
        (launch_norms, ["_rms_norm", "_rms_norm"]),
        (launch_others, ["_rotate", "_swiglu", "_write", "_rotate"]),
    ],
    ids=["attention", "norms", "others"],
)
def test_compiles_for_hopper_without_spilling(
    launch: Callable[[], None], names: list[str], compiled: list[Compiled], tmp_path: Path
) -> None:
    launch()
    assert [each.name for each in compiled] == names
    for each in compiled:
        assert each.result.metadata.shared <= HOPPER_SHARED_BYTES, each.name
        # A few words for the compiler's own bookkeeping.
        assert each.stack_bytes(tmp_path) <= 16, each.name
        assert MATRIX_UNITS.get(each.name, "") in each.result.asm["ptx"], each.name
