"""Which steps are measured: from small to as large as memory and model allow, alone and in batches.

Pure: lengths and counts only. The fit has two or three coefficients a stage; steps are spread
geometrically, because its errors are relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PICTURE_SIDES = (56, 112, 168, 224, 336, 448, 672, 896)
PICTURE_BATCHES = (1, 2, 4, 8)
PROMPT_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
PROMPT_BATCHES = (1, 2, 4, 16)
CONTEXT_LENGTHS = (16, 64, 256, 1024, 4096, 16_384)
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds a step: tokens in one pass, tokens of one context, and KV blocks."""

    max_tokens: int
    max_context_tokens: int
    num_blocks: int
    block_size: int

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks of one sequence."""
        return -(-num_tokens // self.block_size)


def prompt_steps(room: Room) -> Iterator[tuple[int, ...]]:
    """The prompt lengths of each prefill step."""
    for length in PROMPT_LENGTHS:
        for batch in PROMPT_BATCHES:
            if (
                length <= room.max_context_tokens
                and length * batch <= room.max_tokens
                and room.num_blocks_of(length) * batch <= room.num_blocks
            ):
                yield (length,) * batch


def decode_steps(room: Room) -> Iterator[tuple[int, ...]]:
    """The context lengths of each decode step; there is room for one more token of each."""
    for length in CONTEXT_LENGTHS:
        for batch in DECODE_BATCHES:
            if (
                length < room.max_context_tokens
                and room.num_blocks_of(length + 1) * batch <= room.num_blocks
            ):
                yield (length,) * batch


def picture_batches(patches: tuple[int, ...], max_patches: int) -> Iterator[tuple[int, int]]:
    """Index of a picture and how many of it make a step; one alone may exceed the limit."""
    for index, num_patches in enumerate(patches):
        for batch in PICTURE_BATCHES:
            if batch == 1 or num_patches * batch <= max_patches:
                yield index, batch
