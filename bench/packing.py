"""Packed against padded prefill: prompts of unequal lengths through one model, in this process.

Padded, every prompt is as long as the longest: the rectangle that a batch is without packing.
Packed, they lie end to end. The same model, kernels and cache compute both, in turn, round by
round; the logits of the last real tokens must agree.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.demo import model_dir
from shared.model.batch import ForwardBatch, IntArray, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.loader import load_language_model
from shared.modelspec import ModelSpec

BLOCK_SIZE = 16
NUM_WARM_UP = 2


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench packing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of both (15)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts in the batch (32)")
    parser.add_argument("--mean-tokens", type=int, default=116, help="their mean length (116)")
    parser.add_argument("--max-tokens", type=int, default=345, help="their greatest length (345)")
    parser.add_argument("--model", type=Path, default=model_dir(), help="model folder (demo)")
    parser.add_argument("--dtype", default="float32", help="float64, float32, bfloat16 (float32)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = ragged_lengths(options.prompts, options.mean_tokens, options.max_tokens)
    sides = Sides(options.model, options.dtype, lengths)
    print(compare(sides, options.rounds))


def ragged_lengths(num_prompts: int, mean_tokens: int, max_tokens: int) -> list[int]:
    """Log-normal lengths, as those of chat traffic are; the longest has `max_tokens`."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(mean=np.log(mean_tokens) - 0.32, sigma=0.8, size=num_prompts)
    lengths: list[int] = np.clip(drawn.astype(int), 1, max_tokens).tolist()
    lengths[0] = max_tokens
    return lengths


@dataclass(frozen=True, eq=False)
class Side:
    """A batch, and the rows of its prompts' last tokens."""

    batch: ForwardBatch
    last_rows: torch.Tensor


class Sides:
    """Both batches of the same prompts, and the model that runs them."""

    def __init__(self, folder: Path, dtype: str, lengths: Sequence[int]) -> None:
        spec = ModelSpec.load(folder)
        self.lengths = lengths
        self._model: LanguageModel = load_language_model(folder, spec, dtype=dtype)
        geometry = KvGeometry.of(spec.text, block_size=BLOCK_SIZE, dtype=dtype)
        longest = max(lengths)
        width = geometry.blocks_for(longest)
        self._kv = KvCache(geometry, width * len(lengths))
        rng = np.random.default_rng(1)
        tokens = [rng.integers(0, spec.text.vocab_size, longest) for _ in lengths]
        self.packed = self._side([ids[:n] for ids, n in zip(tokens, lengths, strict=True)], width)
        # A causal model does not look ahead: what fills a row up changes nothing before it.
        self.padded = self._side(tokens, width)

    def run(self, side: Side) -> torch.Tensor:
        """Logits `[num_prompts, vocab]` of the prompts' last tokens."""
        step = self._model.begin(side.batch, self._kv, all_positions=True)
        hidden = self._model.embed(side.batch)
        hidden = self._model.forward_layers(hidden, step, self._kv, 0, self._model.spec.num_layers)
        return self._model.finish(hidden[side.last_rows], step)

    def _side(self, prompts: Sequence[IntArray], width: int) -> Side:
        inputs = [
            SequenceInput(ids, np.arange(len(ids)), range(row * width, (row + 1) * width))
            for row, ids in enumerate(prompts)
        ]
        batch = ForwardBatch.pack(inputs, BLOCK_SIZE)
        last = batch.cu_seqlens_q[:-1] + torch.tensor(self.lengths) - 1
        return Side(batch, last)


def compare(sides: Sides, rounds: int) -> str:
    """Both sides in turn; a paragraph of figures."""
    took_s: dict[str, list[float]] = {"padded": [], "packed": []}
    for number in range(rounds + NUM_WARM_UP):
        for name, side in (("padded", sides.padded), ("packed", sides.packed)):
            started_s = time.perf_counter()
            sides.run(side)
            if number >= NUM_WARM_UP:
                took_s[name].append(time.perf_counter() - started_s)
    padded, packed = sides.run(sides.padded), sides.run(sides.packed)
    difference = float((padded - packed).abs().max())
    num_equal = int((padded.argmax(-1) == packed.argmax(-1)).sum())
    ratios = [a / b for a, b in zip(took_s["padded"], took_s["packed"], strict=True)]
    num_padded, num_packed = len(sides.lengths) * max(sides.lengths), sum(sides.lengths)
    return (
        f"{len(sides.lengths)} prompts of {min(sides.lengths)} to {max(sides.lengths)} tokens, "
        f"mean {num_packed / len(sides.lengths):.0f}\n"
        f"  padded  {1e3 * statistics.median(took_s['padded']):8.1f} ms  {num_padded:6d} tokens\n"
        f"  packed  {1e3 * statistics.median(took_s['packed']):8.1f} ms  {num_packed:6d} tokens\n"
        f"  ratio   {statistics.median(ratios):8.2f} (rounds {min(ratios):.2f} to "
        f"{max(ratios):.2f}); tokens {num_padded / num_packed:.2f}\n"
        f"  logits differ by at most {difference:.1e}; greedy tokens equal: "
        f"{num_equal} of {len(sides.lengths)}"
    )


if __name__ == "__main__":
    main()
