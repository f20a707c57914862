"""Attention of a prompt on a CPU: products of bfloat16 pairs against products of float32.

Both kernels read the same pages and queries, in turn, round by round, in one thread, whose
processor time is measured: other load hardly changes it. Says the time over that of the products
alone at the instructions' peak, as a matrix product of the same machine shows it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.kernels import prompts
from shared.model.kernels.choice import has_paired_kernels
from shared.model.kernels.machine_code import Kernel
from shared.model.prompt_attention import PromptPlan

BLOCK_SIZE = 16
SIDES = {"float32": prompts.attend_prompts_bf16, "pairs": prompts.attend_prompts_pairs}
PEAK_SIZE = 1024
"""Rows and columns of the matrix product that shows the peak."""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench prompt_attention", description=__doc__)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--heads", type=int, default=14, help="query heads (14)")
    parser.add_argument("--kv-heads", type=int, default=2, help="heads of keys and values (2)")
    parser.add_argument("--head-dim", type=int, default=64, help="a multiple of 16 (64)")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each side (20)")
    options = parser.parse_args()
    if not has_paired_kernels():
        parser.error("needs the package numba and a CPU with AVX-512 bfloat16 instructions")
    torch.set_num_threads(1)
    sides = {name: call_of(options, kernel) for name, kernel in SIDES.items()}
    took_s: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        for name, call in sides.items():
            spent_s = timed(call)
            if number:  # the first call compiles
                took_s[name].append(spent_s)
    medians_s = {name: statistics.median(times) for name, times in took_s.items()}
    floor_s = floor(options)
    for name, median_s in medians_s.items():
        print(f"{name:<8} {1e3 * median_s:7.2f} ms, {median_s / floor_s:.1f} of the floor")
    print(f"float32 over pairs: {medians_s['float32'] / medians_s['pairs']:.2f}")


def call_of(options: argparse.Namespace, kernel: Kernel) -> Callable[[], torch.Tensor]:
    """A layer's attention over a prompt that fills a cache of random numbers."""
    num_tokens, num_blocks = options.tokens, -(-options.tokens // BLOCK_SIZE)
    geometry = KvGeometry(1, options.kv_heads, options.head_dim, BLOCK_SIZE, "bfloat16")
    kv = KvCache(geometry, num_blocks)
    kv.data.copy_(torch.randn(kv.data.shape, generator=torch.Generator().manual_seed(0)))
    prompt = SequenceInput([1] * num_tokens, range(num_tokens), range(num_blocks), 0)
    plan = PromptPlan(ForwardBatch.pack([prompt], BLOCK_SIZE), kv, (None,), kernel)
    shape = (num_tokens, options.heads, options.head_dim)
    q = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    keys, values = kv.layer_slots(0)
    return lambda: plan.attend(0, q, keys[:num_tokens], values[:num_tokens], kv)


def floor(options: argparse.Namespace) -> float:
    """Seconds of both products, of what a causal prompt sees, at the measured bfloat16 peak."""
    square = torch.randn(PEAK_SIZE, PEAK_SIZE).bfloat16()
    peak_s = min(timed(lambda: square @ square) for _ in range(20))
    operations_per_s = 2 * PEAK_SIZE**3 / peak_s
    num_seen: int = options.tokens * (options.tokens + 1) // 2
    operations: int = 4 * num_seen * options.heads * options.head_dim
    return operations / operations_per_s


def timed(call: Callable[[], object]) -> float:
    """Seconds of this thread's processor time."""
    started_s = time.thread_time()
    call()
    return time.thread_time() - started_s


if __name__ == "__main__":
    main()
