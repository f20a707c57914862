"""What the stages of all simulated workers share: tasks, queues, and whom to tell.

Plain values; the stages themselves are in `encode_side`, `prefill_side` and `decode_side`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from services.planner.cluster import Limits, Links
from services.planner.engine import Action, Device, Host, TaskQueue, Timeline
from services.planner.perf_model import PerformanceModel
from services.planner.request import SimRequest
from shared.cache.block_pool import BlockHandle


@dataclass(eq=False)
class Picture:
    """A task for an encoder."""

    request: SimRequest
    num_patches: int


class KvOwner(Protocol):
    """The prefill stage of a worker, as decode stages know it."""

    def release(self, blocks: BlockHandle) -> None:
        """A decoder has the KV of a lease."""
        ...

    def wake(self) -> None:
        """Blocks may have become free."""
        ...


@dataclass(eq=False)
class Prefilled:
    """A task for a decoder: its KV lies in `blocks` on the worker `owner`."""

    request: SimRequest
    owner: KvOwner
    blocks: BlockHandle


@dataclass(frozen=True)
class World:
    """What all stages share."""

    timeline: Timeline
    host: Host
    model: PerformanceModel
    limits: Limits
    links: Links
    pictures: TaskQueue[Picture]
    prompts: TaskQueue[SimRequest]
    prefilled: TaskQueue[Prefilled]
    embedded: Callable[[Picture, int], None]
    ended: Callable[[SimRequest, bool], None]  # and whether it was refused

    def compute(self, device: Device, seconds: float, done: Action) -> None:
        """One step of a stage: the device's time, then what its process needs around it."""
        device.compute(seconds, lambda: self.host.run(self.links.step_s, done))

    def tell(self, num_tokens: int) -> None:
        """The gateway passes tokens on: nobody here waits for it, but it may share the cores."""
        if self.host.is_shared and num_tokens and self.links.token_s:
            self.host.run(self.links.token_s * num_tokens, _nothing)


def _nothing() -> None:
    pass
