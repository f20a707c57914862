"""Whether a prompt's picture is encoded in this process, past the queue. Pure.

Only a process that hosts an encoder too can do so. Work is counted in patches: all encoders are
taken to be as quick as this one, so that no time has to be known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shared.messages.refs import EmbeddingClaim


@dataclass(frozen=True, slots=True)
class EncodeLoad:
    """What stands before one picture that no encoder has taken yet.

    `item_patches` are its own, `ahead_patches` those of what was queued before it and is not done,
    `here_patches` those of what this process' encoder holds. `num_others` are live encoders in
    other processes, `is_served_here` says whether this process' own takes from the queue.
    """

    item_patches: int
    ahead_patches: int
    here_patches: int
    num_others: int
    is_served_here: bool


def encodes_here(load: EncodeLoad) -> bool:
    """Whether this process would be done before anybody so much as began."""
    num_encoders = load.num_others + load.is_served_here
    if num_encoders == 0:
        return True
    if load.num_others == 0:
        return False  # the queue is this process' own: the task comes in its turn
    return load.ahead_patches > num_encoders * (load.here_patches + load.item_patches)


def patches_ahead(claims: Iterable[EmbeddingClaim], content_key: str) -> int:
    """Patches of what was claimed before this key; of all, if nobody has claimed it."""
    total = 0
    for claim in claims:
        if claim.content_key == content_key:
            break
        total += claim.num_patches
    return total
