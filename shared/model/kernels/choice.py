"""Which kernel computes a linear map: by number format, by what the CPU can do, and by settings.

In: a loaded weight. Out: a `LinearKernel`. The model does not know which; the log says it once.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from shared.errors import SettingsError
from shared.model.kernels.narrow import PAIRED_LANES, PAIRED_WIDTH, Bf16Kernel, Int8Kernel
from shared.model.kernels.packed import PackedKernel
from shared.model.kernels.paired import PairedKernel
from shared.model.linear import LinearKernel, PlainKernel, Rows

logger = logging.getLogger(__name__)

LINEAR_KERNELS = ("auto", "plain", "packed", "compiled", "paired")
QUANTIZATIONS = ("none", "int8")

NARROW_TYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """What a process asks for.

    `linear`: `plain` is torch's own operator, `packed` oneDNN's on weights in its own layout,
    `compiled` ours, which reads bfloat16 or int8 weights without widening them in memory, `paired`
    ours for few rows and oneDNN's for many, where the CPU has bfloat16 instructions; `auto` takes
    what is fastest for the number format on this CPU. `quantization="int8"` stores weights as int8
    with one scale per output; activations stay as they are. `rows`: what `paired` keeps weights
    for; for both kinds it keeps them twice.
    """

    linear: str = "auto"
    quantization: str = "none"
    rows: Rows = Rows.BOTH

    def __post_init__(self) -> None:
        _one_of("linear_kernel", self.linear, LINEAR_KERNELS)
        _one_of("quantization", self.quantization, QUANTIZATIONS)
        if self.quantization != "none" and self.linear in ("plain", "packed", "paired"):
            raise SettingsError(
                f"linear_kernel={self.linear!r} cannot compute with quantization="
                f"{self.quantization!r}; allowed: 'auto', 'compiled'"
            )

    def kernel_for(self, weight: torch.Tensor) -> LinearKernel:
        """Prepare `weight` `[out_features, in_features]`. `SettingsError` where the wish is no."""
        if self.quantization == "int8":
            _require(weight, NARROW_TYPES, "quantization", "int8")
            is_paired = has_paired_kernels() and self.linear == "auto"
            return Int8Kernel(weight, compiled=has_compiled_kernels(), paired=is_paired)
        linear = self.linear if self.linear != "auto" else _fastest(weight)
        if linear == "packed":
            _require(weight, _packable(), "linear_kernel", linear)
            return PackedKernel(weight)
        if linear == "paired":
            _require(weight, (torch.bfloat16,), "linear_kernel", linear)
            if not has_paired_kernels():
                raise SettingsError(
                    "linear_kernel='paired' needs a CPU with AVX-512 bfloat16 instructions and the "
                    "package numba"
                )
            is_fit = weight.shape[1] % PAIRED_LANES == 0
            return PairedKernel(weight, self.rows) if is_fit else PackedKernel(weight)
        if linear == "compiled":
            _require(weight, (torch.bfloat16,), "linear_kernel", linear)
            return Bf16Kernel(weight, compiled=has_compiled_kernels())
        return PlainKernel(weight)


def log_kernels(kernels: Iterable[LinearKernel]) -> None:
    """Say once what computes the linear maps of a model."""
    counts = Counter(kernel.name for kernel in kernels)
    logger.info("linear kernels: %s", ", ".join(f"{n} x {name}" for name, n in counts.items()))


def _fastest(weight: torch.Tensor) -> str:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return "plain"
    if has_paired_kernels():
        return "paired"
    # With bfloat16 instructions oneDNN is at the machine's limits; without them torch emulates.
    return "packed" if has_bf16_instructions() else "compiled"


def _packable() -> tuple[torch.dtype, ...]:
    return NARROW_TYPES if has_bf16_instructions() else (torch.float32,)


@cache
def has_bf16_instructions() -> bool:
    """Whether oneDNN multiplies bfloat16 without emulating it on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def has_paired_kernels() -> bool:
    """Whether our kernel for bfloat16 instructions can run here."""
    if not (has_bf16_instructions() and has_compiled_kernels()):
        return False
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bf16"))


def attends_in_pairs(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention multiplies pairs of such values."""
    return dtype == torch.bfloat16 and has_paired_kernels() and head_dim % PAIRED_WIDTH == 0


@cache
def has_compiled_kernels() -> bool:
    """Whether our kernels can run here: numba is installed and the CPU has fused multiply-add."""
    has_vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return has_vectors and importlib.util.find_spec("numba") is not None


def _require(
    weight: torch.Tensor, dtypes: tuple[torch.dtype, ...], setting: str, value: str
) -> None:
    if weight.device.type != "cpu":
        raise SettingsError(f"{setting}={value!r} needs device cpu, not {weight.device.type}")
    if weight.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        dtype = str(weight.dtype).removeprefix("torch.")
        raise SettingsError(f"{setting}={value!r} needs dtype {names} on this CPU, not {dtype}")


def _one_of(setting: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{setting}={value!r} is not one of {allowed}")
