"""A picture through a patch tower on a CPU: our layers against transformers' own.

Loads the tower of a model folder twice and lets both encode the same picture in turn. The floor is
what the linear maps cost at the matrix rate that the machine reaches (see `floors`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.progress import track

from bench.floors import matrix_rate
from shared.model.loader import load_plain_tower, load_tower
from shared.model.towers.base import Tower
from shared.model.towers.patches import PatchTower
from shared.model.towers.pixels import Pixels


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench tower", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Qwen-VL model")
    parser.add_argument("--side", type=int, default=32, help="patches a side (32)")
    parser.add_argument("--threads", type=int, default=2, help="threads (2)")
    parser.add_argument("--rounds", type=int, default=20, help="pictures of each kind (20)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for line in report(options.model, options.side, options.rounds):
        print(line)


@torch.inference_mode()
def report(model_dir: Path, side: int, rounds: int) -> list[str]:
    """Medians of both, and the median of the ratios within a round."""
    plain, own = load_plain_tower(model_dir), load_tower(model_dir)
    if not isinstance(own, PatchTower):
        raise SystemExit(f"{model_dir} has no tower that takes patches")
    floor_s = 2 * linear_operations(plain, side) / matrix_rate()
    values = torch.randn(side**2, own.spec.patch_dim)
    picture = [Pixels(values, (1, side, side))]
    samples: list[tuple[float, float]] = []
    for _ in track(range(rounds + 1), "encoding"):
        samples.append((seconds_of(plain, picture), seconds_of(own, picture)))
    plain_s, own_s = zip(*samples[1:], strict=True)  # the first ones set things up
    ratio = statistics.median(a / b for a, b in samples[1:])
    return [
        f"{side} x {side} patches, {own.dtype}, {torch.get_num_threads()} threads",
        f"transformers' layers {1e3 * statistics.median(plain_s):8.1f} ms",
        f"ours                 {1e3 * statistics.median(own_s):8.1f} ms",
        f"floor                {1e3 * floor_s:8.1f} ms ({statistics.median(own_s) / floor_s:.2f})",
        f"ratio {ratio:.2f}",
    ]


def linear_operations(tower: Tower, side: int) -> int:
    """Multiplications of all linear maps: the merger's see merged patches only."""
    merged = tower.spec.merge_size**2
    return sum(
        parameter.numel() * side**2 // (merged if "merger" in name else 1)
        for name, parameter in tower.module.named_parameters()
        if parameter.ndim > 1
    )


def seconds_of(tower: Tower, pictures: list[Pixels]) -> float:
    """One call."""
    started_s = time.perf_counter()
    tower.encode(pictures)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
