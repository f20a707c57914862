"""The parts of a media item by their number, as gateway, encoder and prefill all name them."""

from __future__ import annotations

from shared.media.content_key import part_key
from shared.media.sizing.division import divide, max_parts
from shared.messages.descriptor import MediaItem, MediaPart
from shared.runtime.embedding_index import EmbeddingIndex


def can_divide(item: MediaItem, num_parts: int) -> bool:
    """Whether the item has so many parts."""
    return 2 <= num_parts <= max_parts(item.units)


def parts_of(item: MediaItem, num_parts: int) -> tuple[MediaPart, ...]:
    """All parts in order; their rows one after the other are the item's."""
    return tuple(
        MediaPart(
            content_key=part_key(item.content_key, index, num_parts),
            index=index,
            count=num_parts,
            first_row=part.first_row,
            num_tokens=part.num_rows,
            num_patches=part.num_patches,
        )
        for index, part in enumerate(divide(item.units, num_parts))
    )


def known_parts(index: EmbeddingIndex, item: MediaItem) -> tuple[MediaPart, ...]:
    """The parts in which somebody has it made; none if it is made whole, or not at all."""
    division = index.division_of(item.content_key)
    if division is None or not can_divide(item, division.num_parts):
        return ()
    return parts_of(item, division.num_parts)
