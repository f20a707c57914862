"""Where the time of a step of the language model goes on a CPU, and what compiled kernels save.

Models of the same weights take the same step in turn: on torch's float32 products of widened
weights and its attention, on our compiled kernels alone, and on what a prefill worker takes on this
CPU, once with all rows of the last layer and once with the last one, as it is served. Prints for
each the time in linear maps, in attention and in everything else, the median of the per-round
ratios to the last, and the distance to the floor of `bench/floors.py`. `--tokens 1 --cached 512` is
a decode step instead of a prompt.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.floors import measure_floors
from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.attention import AttentionBackend, AttentionPlan, SdpaAttention
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.cpu_attention import CpuAttention
from shared.model.decoder import LanguageModel
from shared.model.kernels.choice import KernelChoice, has_compiled_kernels
from shared.model.kernels.narrow import Bf16Kernel
from shared.model.linear import ChooseKernel, LinearKernel, Rows
from shared.model.loader import load_language_model
from shared.modelspec import ModelSpec

BLOCK_SIZE = 16
PARTS = ("linear", "attention")


@dataclass
class Stopwatch:
    """Seconds by part of the current step."""

    clock: Callable[[], float]
    spent_s: dict[str, float] = field(default_factory=dict)

    def measure(self, part: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        started_s = self.clock()
        result = call()
        self.spent_s[part] = self.spent_s.get(part, 0.0) + self.clock() - started_s
        return result


class TimedLinear:
    """A linear kernel under the watch."""

    def __init__(self, kernel: LinearKernel, watch: Stopwatch) -> None:
        self._kernel = kernel
        self._watch = watch
        self.name = kernel.name

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._watch.measure("linear", lambda: self._kernel.run(x, bias))


class TimedAttention:
    """An attention backend under the watch."""

    def __init__(self, backend: AttentionBackend, watch: Stopwatch) -> None:
        self._backend = backend
        self._watch = watch

    def plan(
        self, batch: ForwardBatch, kv: KvCache, sliding_windows: Sequence[int | None] = ()
    ) -> AttentionPlan:
        return TimedPlan(self._backend.plan(batch, kv, sliding_windows), self._watch)


class TimedPlan:
    """A plan of it."""

    def __init__(self, plan: AttentionPlan, watch: Stopwatch) -> None:
        self._plan = plan
        self._watch = watch

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KvCache
    ) -> torch.Tensor:
        return self._watch.measure("attention", lambda: self._plan.attend(layer, q, k, v, kv))


class Side:
    """A model, its cache and the watch over both; with `all_rows` its last layer computes them all
    and not only the last."""

    def __init__(
        self,
        model_dir: Path,
        backend: AttentionBackend,
        choose: ChooseKernel,
        watch: Stopwatch,
        *,
        all_rows: bool = False,
    ) -> None:
        self._watch = watch
        self._all_rows = all_rows
        self._model = load_language_model(
            model_dir, dtype="bfloat16", backend=TimedAttention(backend, watch)
        )
        self._model.prepare_linears(lambda weight: TimedLinear(choose(weight), watch))
        self._geometry = KvGeometry.of(self._model.spec, block_size=BLOCK_SIZE, dtype="bfloat16")

    def step(self, num_tokens: int, num_cached: int) -> tuple[dict[str, float], int]:
        """Seconds by part, and the token chosen."""
        num_blocks = -(-(num_tokens + num_cached) // BLOCK_SIZE)
        kv = KvCache(self._geometry, num_blocks)
        kv.data.copy_(torch.randn(kv.data.shape, generator=torch.Generator().manual_seed(0)))
        batch = _batch(self._model, num_tokens, num_cached, num_blocks)
        self._watch.spent_s = {}
        started_s = self._watch.clock()
        token = int(self._logits(batch, kv).argmax())
        whole_s = self._watch.clock() - started_s
        parts = {part: self._watch.spent_s.get(part, 0.0) for part in PARTS}
        return {**parts, "rest": whole_s - sum(parts.values()), "whole": whole_s}, token

    def _logits(self, batch: ForwardBatch, kv: KvCache) -> torch.Tensor:
        model = self._model
        context = model.begin(batch, kv, all_positions=self._all_rows)
        hidden = model.forward_layers(model.embed(batch), context, kv, 0, model.spec.num_layers)
        return model.finish(hidden[-1:], context)


def _batch(model: LanguageModel, num_tokens: int, num_cached: int, num_blocks: int) -> ForwardBatch:
    ids = np.random.default_rng(0).integers(2, model.spec.vocab_size - 100, num_tokens)
    places = np.arange(num_cached, num_cached + num_tokens)
    axes = any(rope.mrope_section is not None for rope in model.spec.ropes)
    positions = np.broadcast_to(places, (3, num_tokens)).copy() if axes else places
    sequence = SequenceInput(ids, positions, range(num_blocks), num_cached)
    return ForwardBatch.pack([sequence], BLOCK_SIZE)


def compare(sides: dict[str, Side], options: argparse.Namespace, floor_s: float) -> str:
    """Both sides in turn, after one step each to warm up; a paragraph of figures."""
    took_s: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    tokens = {}
    for number in range(options.rounds + 1):
        for name, side in sides.items():
            parts, tokens[name] = side.step(options.tokens, options.cached)
            if number:
                took_s[name].append(parts)
    lines = []
    for name, rounds in took_s.items():
        medians = {part: statistics.median(each[part] for each in rounds) for part in rounds[0]}
        figures = "  ".join(f"{part} {1e3 * each:8.1f} ms" for part, each in medians.items())
        lines.append(f"  {name:9} {figures}  {medians['whole'] / floor_s:5.2f} of the floor")
    *others, last = took_s
    for name in others:
        ratios = [a["whole"] / b["whole"] for a, b in zip(took_s[name], took_s[last], strict=True)]
        lines.append(
            f"  {name} over {last}: {statistics.median(ratios):.3f} (rounds {min(ratios):.2f} to "
            f"{max(ratios):.2f}); same token: {tokens[name] == tokens[last]}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench prefill", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side (5)")
    parser.add_argument("--tokens", type=int, default=512, help="new tokens of the step (512)")
    parser.add_argument("--cached", type=int, default=0, help="tokens before them (0)")
    options = parser.parse_args()
    if not has_compiled_kernels():
        parser.error("needs the package numba and a CPU with AVX2")
    torch.set_num_threads(options.threads)
    # One thread is measured in the processor time it got, which other load hardly changes.
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    floors = measure_floors(options.model, options.threads)
    is_decode = options.tokens == 1
    floor_s = floors.decode_s(1) if is_decode else floors.prefill_s(options.tokens)
    print(f"{floors.describe()}; floor of this step {1e3 * floor_s:.0f} ms", flush=True)
    family = ModelSpec.load(options.model).model_type
    watch = Stopwatch(clock)
    compiled, auto = KernelChoice("compiled"), KernelChoice("auto", rows=Rows.MANY)
    sides = {
        "torch": Side(
            options.model,
            SdpaAttention(),
            lambda weight: Bf16Kernel(weight, compiled=False),
            watch,
            all_rows=True,
        ),
        "compiled": Side(options.model, CpuAttention(), compiled.kernel_for, watch),
        "all rows": Side(options.model, CpuAttention(), auto.kernel_for, watch, all_rows=True),
        "auto": Side(options.model, CpuAttention(), auto.kernel_for, watch),
    }
    print(f"{family}: {options.tokens} tokens behind {options.cached}, {options.threads} threads")
    print(compare(sides, options, floor_s))


if __name__ == "__main__":
    main()
