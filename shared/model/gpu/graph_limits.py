"""How many CUDA graphs of the decode step there are, and which one a batch takes.

In: bounds. Out: batch sizes. Pure arithmetic.
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
        for name in ("max_batch", "max_context_tokens", "num_buckets", "max_bytes"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}, the least is 1")

    def buckets(self) -> tuple[int, ...]:
        """Batch sizes to capture, ascending: powers of two and the largest batch.

        Where those are too many, an even choice of them that keeps the largest.
        """
        ladder = [1 << i for i in range((self.max_batch - 1).bit_length())] + [self.max_batch]
        count = min(self.num_buckets, len(ladder))
        step = len(ladder) / count
        return tuple(ladder[len(ladder) - 1 - int(i * step)] for i in reversed(range(count)))
