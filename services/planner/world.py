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
from services.prefill.pieces import PiecePlan
from shared.cache.block_pool import BlockHandle
from shared.cache.geometry import DTYPE_BYTES, KvGeometry

BFLOAT16_BYTES = DTYPE_BYTES["bfloat16"]


@dataclass(eq=False)
class Picture:
    """A task for an encoder, queued at `queued_s`."""

    request: SimRequest
    num_patches: int
    queued_s: float


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
    """A task for a decoder: its KV lies in `blocks` on the worker `owner`.

    It may be queued before the prompt `is_complete`, in so many pieces: `on_complete` is then
    called when the rest can travel.
    """

    request: SimRequest
    owner: KvOwner
    blocks: BlockHandle
    queued_s: float
    num_pieces: int = 1
    is_complete: bool = True
    on_complete: Action | None = None

    def complete(self) -> None:
        """The prompt is computed."""
        self.is_complete = True
        if self.on_complete is not None:
            self.on_complete()


@dataclass(frozen=True)
class World:
    """What all stages share."""

    timeline: Timeline
    host: Host
    gateway: Device
    model: PerformanceModel
    limits: Limits
    links: Links
    pictures: TaskQueue[Picture]
    prompts: TaskQueue[SimRequest]
    prefilled: TaskQueue[Prefilled]
    embedded: Callable[[Picture, int], None]
    ended: Callable[[SimRequest, bool], None]  # and whether it was refused

    def num_pieces(self, num_tokens: int) -> int:
        """In how many pieces a prompt's KV travels to another process."""
        limits, num_layers = self.limits, self.model.num_layers
        head_dim = max(1, self.model.kv_bytes_per_token // (num_layers * 2 * BFLOAT16_BYTES))
        geometry = KvGeometry(num_layers, 1, head_dim, limits.block_size, "bfloat16")
        plan = PiecePlan(limits.kv_transfer, geometry, limits.chunk_tokens)
        cuts = (plan.token_cuts(num_tokens, 0), plan.layer_cuts(num_tokens, 0))
        return (1 + len(cuts[0])) * (1 + len(cuts[1]))

    def compute(self, device: Device, seconds: float, num_rows: int, done: Action) -> None:
        """One step of a stage: the device's time, then what its process needs around it."""
        around_s = self.links.step_s + self.links.row_s * num_rows
        device.compute(seconds, lambda: self.host.hop(around_s, done))

    def tell(self, num_tokens: int, seen: Action) -> None:
        """The gateway passes a step's tokens on; `seen` is when the clients have them."""
        links = self.links
        self.gateway.compute(
            links.event_s + links.token_s * num_tokens,
            lambda: self.host.hop(links.token_hop_s, seen),
        )

    def aside(self, seconds: float) -> None:
        """Work that nobody waits for."""
        if seconds:
            self.host.run(seconds, nothing)


def nothing() -> None:
    """Nobody waits for it."""
