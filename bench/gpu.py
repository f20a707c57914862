"""What a 7 B Qwen2.5-VL costs on one GPU, over the least that its memory and matrix units allow.

Random weights in bfloat16, made on the device: no model folder is needed. Measures the memory
bandwidth and the matrix peak first, then decode steps, prefills, pictures and a hand-over, and
prints each beside its floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu_floors import Device, decode_floor_s, prefill_floor_s, tower_floor_s
from bench.gpu_handover import handover_lines
from bench.gpu_model import (
    BLOCK_SIZE,
    TOWER_GRID,
    LanguageBench,
    TowerBench,
    free_memory,
)
from bench.gpu_timing import median_s

DECODE_BATCHES = (1, 8, 64, 256)
DECODE_CONTEXT_TOKENS = 1024
PREFILL_TOKENS = (512, 2048, 8192, 32768)
GRAPH_TOKENS = 1024
"""As a prefill worker's default is."""
NUM_PICTURES = (1, 4, 16)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each figure (10)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench gpu needs a CUDA device, and torch finds none on this machine")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for line in report(options.rounds):
        print(line, flush=True)


@torch.inference_mode()
def report(rounds: int) -> Iterator[str]:
    """The table, line by line as it is measured."""
    device = Device.measure()
    yield f"memory {device.bytes_per_s / 1e12:.2f} TB/s, matrix {device.flops / 1e12:.0f} TFLOP/s"
    yield f"{'':<34}{'median':>10}{'floor':>12}{'ratio':>8}"
    yield from decode_lines(device, rounds)
    free_memory()
    yield from prefill_lines(device, rounds)
    free_memory()
    yield from tower_lines(device, rounds)
    free_memory()
    yield from handover_lines()


def decode_lines(device: Device, rounds: int) -> Iterator[str]:
    """One step of every sequence, through CUDA graphs; aim: ratio 1.25."""
    largest = max(DECODE_BATCHES)
    num_blocks = largest * -(-DECODE_CONTEXT_TOKENS // BLOCK_SIZE) + 1
    bench = LanguageBench(num_blocks)
    step = bench.graphs(largest, DECODE_CONTEXT_TOKENS)
    for size in DECODE_BATCHES:
        batch = bench.decode_batch(size, DECODE_CONTEXT_TOKENS)
        took_s = median_s(partial(step, batch, bench.kv), rounds)
        floor_s = decode_floor_s(
            bench.model, bench.kv.geometry, size, DECODE_CONTEXT_TOKENS, device
        )
        yield row(f"decode, batch {size}, context {DECODE_CONTEXT_TOKENS}", took_s, floor_s)


def prefill_lines(device: Device, rounds: int) -> Iterator[str]:
    """One prompt, a short one from CUDA graphs; aim: 60 % of the matrix peak, ratio 1.67."""
    bench = LanguageBench(-(-max(PREFILL_TOKENS) // BLOCK_SIZE) + 1)
    model = bench.prompt_graphs(GRAPH_TOKENS)
    for num_tokens in PREFILL_TOKENS:
        batch = bench.prefill_batch(num_tokens)
        took_s = median_s(partial(bench.prefill, model, batch), max(3, rounds // 2))
        yield row(
            f"prefill, {num_tokens} tokens",
            took_s,
            prefill_floor_s(bench.model, num_tokens, device),
        )


def tower_lines(device: Device, rounds: int) -> Iterator[str]:
    """Pictures of one megapixel in one call; aim: ratio 1.67."""
    bench = TowerBench()
    for num_pictures in NUM_PICTURES:
        pictures = bench.pictures(num_pictures)
        took_s = median_s(
            partial(bench.tower.encode, pictures),
            max(3, rounds // 2),
        )
        floor_s = tower_floor_s(bench.tower.module, bench.config, TOWER_GRID, num_pictures, device)
        yield row(f"encode, {num_pictures} pictures of 1 megapixel", took_s, floor_s)


def row(name: str, took_s: float, floor_s: float) -> str:
    """A line of the table."""
    return f"{name:<34}{1e3 * took_s:>7.2f} ms{1e3 * floor_s:>9.2f} ms{took_s / floor_s:>8.2f}"


if __name__ == "__main__":
    main()
