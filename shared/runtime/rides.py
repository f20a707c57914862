"""Decode steps that ride in passes of prompts, where one process prefills and decodes.

A pass of prompts reads every weight once, whatever rows it has: the next tokens of the running
answers cost hardly more in it than their rows, while a step of their own reads all weights again.
So while passes follow each other, each takes the running answers along.

In: from prefill, that a pass begins, has ended or that none follows; from decode, steps that could
ride. Out: who rides in which pass. Both stages run on one event loop and know each other only
through this; it knows neither tensors nor requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from shared.runtime.signal import Signal

if TYPE_CHECKING:
    import torch

    from shared.model.batch import SequenceInput

BOARDING_S = 0.25
"""How long a pass waits for a step that is under way; a longer step rides in the pass after."""


class Riders(Protocol):
    """A decode step, as a pass computes it. Called on the compute thread."""

    def board(self) -> Sequence[SequenceInput]:
        """The sequences, each with its newest token."""
        ...

    def arrive(self, logits: torch.Tensor) -> None:
        """Take the result `[num_seqs, vocab]`. Not called if the pass failed or was given up."""
        ...


class Ride:
    """A step that waits for a pass, or is in one."""

    def __init__(self, riders: Riders) -> None:
        self.riders = riders
        self.is_computed = False
        self.ended = asyncio.Event()


class Rides:
    """`board`, `end` and `none_follow` are prefill's; `ride` and `rest` are decode's."""

    def __init__(self) -> None:
        self._passes_follow = False
        self._is_stepping = False
        self._waiting: Ride | None = None
        self._changed = Signal()

    async def board(self) -> Ride | None:
        """A pass begins; returns the step to take along, if any. Each ride must be ended.

        A step that decode is about to take, or is taking alone, is waited for.
        """
        self._passes_follow = True
        with suppress(TimeoutError):
            async with asyncio.timeout(BOARDING_S):
                await self._changed.until(lambda: not self._is_stepping)
        ride, self._waiting = self._waiting, None
        return ride

    def end(self, ride: Ride, *, is_computed: bool) -> None:
        """The pass is over; a step that it has not computed is taken alone. Idempotent."""
        if not ride.ended.is_set():
            ride.is_computed = is_computed
            ride.ended.set()
            self._is_stepping = True  # there may be a next step for the next pass

    def none_follow(self) -> None:
        """Prefill has nothing to do: whoever waits takes its step alone."""
        self._passes_follow = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self.end(waiting, is_computed=False)

    async def ride(self, riders: Riders) -> bool:
        """Take the step in a pass; False where it should be taken alone, at once."""
        if not self._passes_follow:
            self._is_stepping = True
            return False
        ride = self._waiting = Ride(riders)
        self._is_stepping = False
        self._changed.notify()
        try:
            await ride.ended.wait()
        finally:
            if self._waiting is ride:
                self._waiting = None
            else:  # on board: the pass writes into memory that a cancelled caller would hand back
                await ride.ended.wait()
        return ride.is_computed

    def rest(self) -> None:
        """Decode has no step to take until it says so: no pass waits for one."""
        self._is_stepping = False
        self._changed.notify()
