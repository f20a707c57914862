"""LLaVA 1.5 and Gemma 3: every picture becomes one picture of the tower's own size.

Sources: LLaVA 1.5 (arXiv 2310.03744), section 3; Gemma 3 (arXiv 2503.19786), section 2.1, without
its optional crops.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.media.sizing.base import ImageLayout, refuse_extreme


@dataclass(frozen=True, slots=True)
class FixedSizing:
    """Always `num_tokens` placeholders, between `before` and `after`."""

    num_tokens: int
    before: str = ""
    after: str = ""

    def measure(self, height: int, width: int) -> ImageLayout:
        """One run, whatever the size."""
        refuse_extreme(height, width)
        pieces = (self.before, self.num_tokens, self.after)
        return ImageLayout(grid_thw=(1, 1, 1), pieces=tuple(piece for piece in pieces if piece))
