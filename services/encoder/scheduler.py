"""Which pictures go through the tower together.

In: preprocessed pictures with their patch counts. Out: batches within a patch budget, first come,
first served. Pure: no torch, no clock, no bus.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from shared.errors import SettingsError


class EncodeJob(Protocol):
    """What the scheduler needs to know of a picture."""

    @property
    def num_patches(self) -> int: ...


J = TypeVar("J", bound=EncodeJob)

SPREAD_S = 0.002
"""About the time in which an idle worker's call for a task reaches the bus."""


def take_delay_s(num_held: int, num_encoders: int) -> float:
    """How long an encoder that holds so many pictures leaves the next one to others.

    The less an encoder holds the sooner it asks, so that the pictures of one request are spread
    over all encoders instead of lining up at the one that happened to ask twice. Alone it asks at
    once.
    """
    return SPREAD_S * num_held if num_encoders > 1 else 0.0


class EncodeScheduler(Generic[J]):
    """Packs waiting pictures into batches of at most `max_batch_patches` patches.

    A picture larger than the budget makes a batch of its own: it cannot be split and must not wait
    for ever.
    """

    def __init__(self, max_batch_patches: int) -> None:
        if max_batch_patches < 1:
            raise SettingsError(f"max_batch_patches is {max_batch_patches}, at least 1 is needed")
        self._max_batch_patches = max_batch_patches
        self._waiting: deque[J] = deque()

    @property
    def num_waiting(self) -> int:
        """Pictures that are ready and wait for the tower."""
        return len(self._waiting)

    def add(self, job: J) -> None:
        """A picture is ready for the tower."""
        self._waiting.append(job)

    def cancel(self, job: J) -> None:
        """Forget a waiting picture. Idempotent."""
        if job in self._waiting:
            self._waiting.remove(job)

    def next_batch(self) -> list[J]:
        """Take the pictures of the next step; empty when none waits."""
        batch: list[J] = []
        num_patches = 0
        while self._waiting:
            head = self._waiting[0]
            if batch and num_patches + head.num_patches > self._max_batch_patches:
                break
            batch.append(self._waiting.popleft())
            num_patches += head.num_patches
        return batch
