"""Which pictures and videos of a request are divided over encoders, and into how many parts. Pure.

In: the work of every item that has to be encoded, and how many encoders are free. Out: a number of
parts for each. All encoders work on the first item, then on the next: prefill begins with the first
while the others are encoded. A part costs a task and often the resizing of the whole picture, so of
many items whole ones go round the encoders, and only what is left over is divided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from shared.media.sizing.division import max_parts
from shared.messages.descriptor import MediaItem, WorkerRef
from shared.messages.refs import EmbeddingClaim

MAX_ROUNDS = 2
"""With more whole items for each encoder, these go round."""


def num_free(encoders: Collection[WorkerRef], claims: Iterable[EmbeddingClaim]) -> int:
    """Encoders without work. A task that still is in the queue will take one of them."""
    given = [claim.encoder for claim in claims]
    busy = {encoder for encoder in given if encoder is not None}
    return max(0, len(set(encoders) - busy) - given.count(None))


def numbers_of_parts(
    items: Sequence[MediaItem], *, num_encoders: int, min_part_patches: int
) -> list[int]:
    """One for each item; 1 is whole. `num_encoders` are free; 0 for `min_part_patches`: none is
    divided, otherwise no part gets fewer patches."""
    if num_encoders < 2 or not min_part_patches:
        return [1] * len(items)
    num_whole = len(items) // num_encoders * num_encoders
    if num_whole <= MAX_ROUNDS * num_encoders:
        num_whole = 0
    return [
        1
        if number < num_whole
        else max(1, min(num_encoders, max_parts(item.units), item.num_patches // min_part_patches))
        for number, item in enumerate(items)
    ]
