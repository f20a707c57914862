"""What this machine's memory and arithmetic allow a model, and how near the linear kernels come.

Measures the bandwidth of reading memory and the rate of large float32 and bfloat16 matrix products,
each as the best of short bursts, since the machine may be shared. A decode step must at least read
every language weight once; a prompt must at least do two operations per weight and token. Attention
is left out: it is small here, and a floor may be low but not high.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from shared.cache.geometry import DTYPE_BYTES
from shared.model.kernels.choice import KernelChoice, has_bf16_instructions
from shared.model.linear import LinearKernel
from shared.modelspec import ModelSpec

BURST_S = 1.5
ROWS = (1, 2, 4, 8, 16, 64, 512)
READ_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Weights:
    """Numbers of weights that one token, or one picture patch, is multiplied with."""

    layers: int
    head: int
    per_patch: int
    per_merged_token: int
    bytes_each: int
    patch_size: int
    merge_size: int

    @classmethod
    def of(cls, model_dir: Path) -> Weights:
        """Counted from the names and shapes in the folder's safetensors files."""
        spec = ModelSpec.load(model_dir)
        counts = {"layers": 0, "head": 0, "per_patch": 0, "per_merged_token": 0}
        for path in sorted(model_dir.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    place, shape = spec.family.classify(name), file.get_slice(name).get_shape()
                    if place is not None and len(shape) > 1:
                        size = torch.Size(shape).numel()
                        counts[_kind(*place, tied=spec.text.tie_word_embeddings)] += size
        vision = spec.vision
        return cls(
            **counts,
            bytes_each=DTYPE_BYTES[spec.dtype],
            patch_size=vision.patch_size if vision else 1,
            merge_size=vision.merge_size if vision else 1,
        )


def _kind(part: str, name: str, *, tied: bool) -> str:
    if part == "tower":
        return "per_merged_token" if "merger" in name else "per_patch"
    return "head" if name == ("embed_tokens.weight" if tied else "lm_head.weight") else "layers"


@dataclass(frozen=True)
class Floors:
    """Bytes and operations per second of this machine, and one model's weights."""

    read_bytes_per_s: float
    operations_per_s: float
    weights: Weights

    def decode_s(self, num_rows: int) -> float:
        """Shortest step of `num_rows` sequences."""
        count = self.weights.layers + self.weights.head
        reading_s = count * self.weights.bytes_each / self.read_bytes_per_s
        return max(reading_s, 2 * count * num_rows / self.operations_per_s)

    def prefill_s(self, prompt_tokens: int, picture_size: int = 0) -> float:
        """Shortest time to a first token; a picture of `picture_size` pixels square is encoded."""
        w, tokens, operations = self.weights, prompt_tokens, 0
        if picture_size:
            patches = (picture_size // w.patch_size) ** 2
            merged = patches // w.merge_size**2
            tokens += merged
            operations = 2 * (patches * w.per_patch + merged * w.per_merged_token)
        operations += 2 * (tokens * w.layers + w.head)
        return operations / self.operations_per_s

    def describe(self) -> str:
        return (
            f"read {self.read_bytes_per_s / 1e9:.1f} GB/s, "
            f"products {self.operations_per_s / 1e9:.0f} GFLOP/s"
        )


def measure_floors(model_dir: Path, threads: int) -> Floors:
    """Measure the machine with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Floors(read_bandwidth(), matrix_rate(), Weights.of(model_dir))
    finally:
        torch.set_num_threads(before)


def read_bandwidth() -> float:
    """Bytes per second of summing memory that no cache holds."""
    values = torch.ones(READ_BYTES // 4)
    return READ_BYTES / best_s(values.sum)


def matrix_rate() -> float:
    """Operations per second of large products in the fastest format that a model may use."""
    size, rates = 1024, []
    for dtype in (torch.float32, *((torch.bfloat16,) if has_bf16_instructions() else ())):
        a = torch.randn(size, size, dtype=dtype)
        rates.append(2 * size**3 / best_s(lambda a=a: a @ a))  # type: ignore[misc]
    return max(rates)


def best_s(call: Callable[[], object], burst_s: float = BURST_S) -> float:
    """Shortest of as many calls as fit, at least two.

    One thread is measured in the processor time it got, which other load hardly changes; several
    can only be measured by the clock on the wall.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    shortest_s, end_s = float("inf"), time.perf_counter() + burst_s
    while shortest_s == float("inf") or time.perf_counter() < end_s:
        started_s = clock()
        call()
        shortest_s = min(shortest_s, clock() - started_s)
    return shortest_s


def kernel_table(shape: tuple[int, int], floors: Floors) -> str:
    """Every kernel that can run here times the number of rows."""
    lines = [f"\nweight {list(shape)}: GB/s of weights, GFLOP/s, share of the floor"]
    for name, dtype, choice in _candidates():
        # So many copies that no cache holds them all, as in a model.
        copies = max(2, READ_BYTES // (4 * shape[0] * shape[1] * 4))
        weights = [torch.randn(shape).to(dtype) for _ in range(copies)]
        kernels = [choice.kernel_for(weight) for weight in weights]
        weight_bytes = (
            shape[0] * shape[1] * (1 if choice.quantization == "int8" else dtype.itemsize)
        )
        for rows in ROWS:
            if name == "bfloat16 plain" and rows > 64 and not has_bf16_instructions():
                continue  # emulated: minutes
            x = torch.randn(rows, shape[1]).to(dtype)
            took_s = best_s(lambda k=kernels, x=x: _all(k, x), 0.5) / copies  # type: ignore[misc]
            operations = 2 * rows * shape[0] * shape[1]
            floor_s = max(
                weight_bytes / floors.read_bytes_per_s, operations / floors.operations_per_s
            )
            lines.append(
                f"  {name:20}{rows:5} rows{weight_bytes / took_s / 1e9:8.1f} GB/s"
                f"{operations / took_s / 1e9:8.1f} GFLOP/s{floor_s / took_s:7.2f}"
            )
    return "\n".join(lines)


def _all(kernels: list[LinearKernel], x: torch.Tensor) -> None:
    for kernel in kernels:
        kernel.run(x, None)


def _candidates() -> list[tuple[str, torch.dtype, KernelChoice]]:
    formats = [
        ("bfloat16 plain", torch.bfloat16, KernelChoice("plain")),
        ("bfloat16 compiled", torch.bfloat16, KernelChoice("compiled")),
        ("int8 compiled", torch.bfloat16, KernelChoice(quantization="int8")),
        ("float32 plain", torch.float32, KernelChoice("plain")),
        ("float32 packed", torch.float32, KernelChoice("packed")),
    ]
    if has_bf16_instructions():
        formats.insert(1, ("bfloat16 packed", torch.bfloat16, KernelChoice("packed")))
    return formats


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench floors", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--picture", type=int, default=448, help="pixels of a side (448)")
    options = parser.parse_args()
    floors = measure_floors(options.model, options.threads)
    torch.set_num_threads(options.threads)
    print(floors.describe())
    print(f"decode: {1 / floors.decode_s(1):.1f} tokens/s alone, {8 / floors.decode_s(8):.1f} of 8")
    print(f"prefill of {options.prompt} tokens: {1e3 * floors.prefill_s(options.prompt):.0f} ms")
    if floors.weights.per_patch:
        first_s = floors.prefill_s(16, options.picture)
        print(f"picture of {options.picture} pixels and 16 tokens: {1e3 * first_s:.0f} ms")
    text = ModelSpec.load(options.model).text
    with torch.inference_mode():
        for shape in (
            (2 * text.intermediate_size, text.hidden_size),
            (text.hidden_size, text.intermediate_size),
        ):
            print(kernel_table(shape, floors), flush=True)


if __name__ == "__main__":
    main()
