"""For which sizes of steps there are CUDA graphs.

In: bounds. Out: batch sizes of decode steps, numbers of tokens of prompts. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import SettingsError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """Bounds of what is captured; what lies beyond runs without a graph.

    `max_bytes` bounds the memory that all graphs hold together, `num_buckets` their number.
    """

    max_batch: int
    max_context_tokens: int
    num_buckets: int = 10
    max_bytes: int = 2 * GIB

    def __post_init__(self) -> None:
        _check_at_least_1(self, "max_batch", "max_context_tokens", "num_buckets", "max_bytes")

    def buckets(self) -> tuple[int, ...]:
        """Batch sizes to capture, ascending: powers of two and the largest batch.

        Where those are too many, an even choice of them that keeps the largest.
        """
        ladder = [1 << i for i in range((self.max_batch - 1).bit_length())] + [self.max_batch]
        count = min(self.num_buckets, len(ladder))
        step = len(ladder) / count
        return tuple(ladder[len(ladder) - 1 - int(i * step)] for i in reversed(range(count)))


@dataclass(frozen=True, slots=True)
class PrefillGraphLimits:
    """The same for steps of prompts: `max_seqs` prompts of `max_tokens` new tokens together."""

    max_tokens: int
    max_context_tokens: int
    max_seqs: int = 8
    step_tokens: int = 128
    max_bytes: int = 2 * GIB

    def __post_init__(self) -> None:
        names = ("max_tokens", "max_context_tokens", "max_seqs", "step_tokens", "max_bytes")
        _check_at_least_1(self, *names)

    def sizes(self) -> tuple[int, ...]:
        """Numbers of tokens to capture, ascending: every `step_tokens`, and the largest.

        None without more tokens than sequences, the one that fills a step up counted in: such a
        step would be one of decoding.
        """
        steps = (*range(self.step_tokens, self.max_tokens, self.step_tokens), self.max_tokens)
        return tuple(size for size in steps if size > self.max_seqs + 1)


def _check_at_least_1(limits: object, *names: str) -> None:
    for name in names:
        if getattr(limits, name) < 1:
            raise SettingsError(f"{name}={getattr(limits, name)}, the least is 1")
