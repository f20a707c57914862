"""Which pictures and videos of a request are divided over encoders, and into how many parts. Pure.

In: the work of every item that has to be encoded, and how many encoders are free. Out: a number of
parts for each. Whole items go round the encoders first, because a part costs a task and often the
resizing of the whole picture; what would make one encoder work longer than the others is divided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from shared.media.sizing.division import max_parts
from shared.messages.descriptor import MediaItem, WorkerRef
from shared.messages.refs import EmbeddingClaim

SLACK = 1.1
"""An encoder may get so much more than an equal share before an item is divided for it."""


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
    work = [item.num_patches for item in items]
    fair = sum(work) / num_encoders
    loads = [0.0] * num_encoders
    chosen = []
    for item, patches in zip(items, work, strict=True):
        loads.sort()
        most = min(num_encoders, max_parts(item.units), patches // min_part_patches)
        if most < 2 or loads[0] + patches <= SLACK * fair:
            most = 1
        for number in range(most):
            loads[number] += patches / most
        chosen.append(most)
    return chosen
