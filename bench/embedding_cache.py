"""Repeated pictures: time to the first token with a warm embedding cache against a cold one.

Every round draws new large pictures and asks about them twice through the running pipeline (real
bus, real transport): cold, when they must be stored, decoded, encoded and pulled, and warm. Each
question begins with another text, so that no keys and values are found in the prefix cache: what
makes the second one fast is the embeddings alone.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.progress import track

from bench.accuracy import png
from bench.client import chat_body, stream
from bench.server import running_server
from shared.demo import model_dir

NUM_WARM_UP = 2


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench embedding_cache", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="rounds (10)")
    parser.add_argument("--pictures", type=int, default=4, help="pictures of a question (4)")
    parser.add_argument("--pixels", type=int, default=896, help="side of a picture (896)")
    parser.add_argument("--model", type=Path, default=model_dir(), help="model folder (demo)")
    options = parser.parse_args()
    arguments = ["--model", str(options.model), "--served-name", "bench"]
    cold_s: list[float] = []
    warm_s: list[float] = []
    with running_server(arguments) as url, httpx.Client(timeout=300.0) as client:
        for number in track(range(-NUM_WARM_UP, options.rounds), "rounds"):
            pictures = [
                noise(options.pixels, seed=1000 * (number + NUM_WARM_UP) + place)
                for place in range(options.pictures)
            ]
            cold, warm = (
                ask(client, url, pictures, f"Round {number}, {time} time.")
                for time in ("first", "second")
            )
            if number >= 0:
                cold_s.append(cold)
                warm_s.append(warm)
    cold_ms, warm_ms = (1e3 * statistics.median(times) for times in (cold_s, warm_s))
    print(
        f"{options.pictures} pictures of {options.pixels}x{options.pixels} pixels, "
        f"{options.rounds} rounds, one question at a time, medians; the text before the pictures "
        f"differs, so the prefix cache finds nothing\n"
        f"  TTFT  cold {cold_ms:7.1f} ms   warm {warm_ms:7.1f} ms   ratio {cold_ms / warm_ms:.2f}"
    )


def ask(client: httpx.Client, url: str, pictures: list[bytes], opening: str) -> float:
    """TTFT of one question whose prompt begins with `opening`."""
    body: dict[str, Any] = chat_body(
        "bench", pictures, "What is this?", temperature=0, max_tokens=4, ignore_eos=True
    )
    body["messages"].insert(0, {"role": "system", "content": opening})
    return stream(client, url, body).ttft_s


def noise(pixels: int, seed: int) -> bytes:
    """A picture that nobody has seen: blurred noise, which PNG stores at a realistic size."""
    grain = np.random.default_rng(seed).integers(0, 256, (pixels // 8, pixels // 8, 3))
    small = Image.fromarray(grain.astype(np.uint8))
    return png(small.resize((pixels, pixels), Image.Resampling.BILINEAR))


if __name__ == "__main__":
    main()
