"""A decode step of the language model on a CPU: call by call, and recorded as one call.

The sides are the linear kernels that this CPU can use, and int8 weights. All take the same steps in
turn, each as the model itself does it and as `RecordedSteps` replays it. Prints the median time of
a step, what the recording saves, and the distance to the floor of `bench/floors.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.floors import measure_floors
from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.cpu_attention import CpuAttention
from shared.model.kernels.choice import KernelChoice, has_paired_kernels
from shared.model.linear import Rows
from shared.model.loader import load_language_model
from shared.model.recorded_steps import RecordedSteps

BLOCK_SIZE = 16
Step = Callable[[], torch.Tensor]


def steps_of(options: argparse.Namespace, choice: KernelChoice) -> dict[str, Step]:
    """One step over a warm cache, as the model does it and as it is replayed."""
    backend = CpuAttention()
    model = load_language_model(options.model, dtype="bfloat16", backend=backend, kernels=choice)
    per_sequence = -(-(options.cached + 1) // BLOCK_SIZE)
    geometry = KvGeometry.of(model.spec, block_size=BLOCK_SIZE, dtype="bfloat16")
    kv = KvCache(geometry, per_sequence * options.batch)
    kv.data.copy_(torch.randn(kv.data.shape, generator=torch.Generator().manual_seed(0)))
    sequences = [
        SequenceInput(
            [7 + i],
            np.array([options.cached]),
            range(i * per_sequence, (i + 1) * per_sequence),
            options.cached,
        )
        for i in range(options.batch)
    ]
    batch = ForwardBatch.pack(sequences, BLOCK_SIZE)
    recorded = RecordedSteps(model, kv)
    return {
        "call by call": lambda: model.forward(batch, kv),
        "recorded": lambda: recorded(batch, kv),
    }


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, the steps in turn, after two of each to warm up."""
    took_s: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            started_s = time.perf_counter()
            step()
            if number >= 2:
                took_s[name].append(time.perf_counter() - started_s)
    return took_s


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench decode_step", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=30, help="steps of each side (30)")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step (1)")
    parser.add_argument("--cached", type=int, default=512, help="tokens before them (512)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    floors = measure_floors(options.model, options.threads)
    floor_s = floors.decode_s(options.batch)
    print(f"{floors.describe()}; floor of this step {1e3 * floor_s:.1f} ms", flush=True)
    linears = ("packed", "compiled", "paired") if has_paired_kernels() else ("compiled",)
    choices = {name: KernelChoice(name, rows=Rows.FEW) for name in linears}
    choices["int8"] = KernelChoice("auto", "int8")
    steps = {
        f"{name}, {way}": step
        for name, choice in choices.items()
        for way, step in steps_of(options, choice).items()
    }
    took_s = measure(steps, options.rounds)
    first = statistics.median(next(iter(took_s.values())))
    for name, each in took_s.items():
        median = statistics.median(each)
        print(
            f"{name:24} {1e3 * median:7.2f} ms  {options.batch / median:6.1f} tok/s  "
            f"{first / median:5.2f} of the first's rate  {median / floor_s:5.2f} of the floor"
        )


if __name__ == "__main__":
    main()
