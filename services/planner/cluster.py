"""What is simulated: which workers, with which limits, joined by which links. Plain values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

from services.prefill.pieces import KvTransfer
from services.prefill.settings import SHARED_PASS_TOKENS
from shared.errors import SettingsError
from shared.runtime.topology import Stages, parse_topology


@dataclass(frozen=True, slots=True)
class Links:
    """Seconds that a hop takes and how fast tensors travel.

    `queue_hop_s` is from `put` to a waiting worker (JetStream), `token_hop_s` from a worker to the
    client, `pull_s` what a transfer takes beside its bytes, `store_s` one picture into the media
    store or out of it, `step_s` what a worker does around a step (the way to the compute thread
    and back) and `row_s` what it does there for each sequence. `wait_share` is the part of all
    these in which no core works.

    `accept_s` is from a request's arrival until the gateway looks at it, `gateway_s` from there to
    its tasks, each of which takes `dispatch_s`. `event_s` is what the gateway does with the news of
    one step and `token_s` with each of its tokens, one after the other.

    `request_s` and `picture_s` are what one of them costs beside all that: nobody waits for it
    (acknowledgements, spans, metrics, the client), so it delays only who shares the cores.
    """

    queue_hop_s: float = 0.001
    token_hop_s: float = 0.0005
    pull_s: float = 0.0005
    bytes_per_s: float = 1e9
    store_s: float = 0.0
    step_s: float = 0.0
    row_s: float = 0.0
    wait_share: float = 0.0
    accept_s: float = 0.0
    gateway_s: float = 0.0
    dispatch_s: float = 0.0
    event_s: float = 0.0
    token_s: float = 0.0
    request_s: float = 0.0
    picture_s: float = 0.0

    def __post_init__(self) -> None:
        numbers = asdict(self).values()
        if not all(map(math.isfinite, numbers)) or min(numbers) < 0 or self.bytes_per_s <= 0:
            raise SettingsError(f"links take 0 s or more and carry more than 0 bytes/s: {self}")
        if self.wait_share > 1:
            raise SettingsError(f"wait_share is {self.wait_share}: should be at most 1")

    def transfer_s(self, num_bytes: float) -> float:
        """One pull of a tensor."""
        return self.pull_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Limits:
    """The workers' settings of the same names; `num_blocks` is each process's KV memory."""

    max_batch_patches: int = 16_384
    max_held: int = 16
    max_batch_tokens: int = 4096
    chunk_tokens: int = 0
    mixed_step_tokens: int = 512
    max_batch: int = 64
    kv_transfer: KvTransfer = "layer-wise"
    num_blocks: int = 4096
    block_size: int = 16


@dataclass(frozen=True, slots=True)
class Cluster:
    """A topology such as `2E 1P 1D`, in which every worker has the same limits.

    `num_cores` is 0 where every worker has a device of its own; else the workers compute on so many
    cores of one machine, and share them with the gateway and the bus. `full_speed` is how fast each
    of these is while all are busy, next to one that is busy alone.
    """

    topology: str
    limits: Limits = field(default_factory=Limits)
    links: Links = field(default_factory=Links)
    num_cores: int = 0
    full_speed: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.full_speed <= 1:
            raise SettingsError(f"full_speed is {self.full_speed}: should be above 0, at most 1")

    @property
    def workers(self) -> tuple[Stages, ...]:
        """The stages of each worker. Raises `SettingsError`."""
        return parse_topology(self.topology, "topology")

    @property
    def worker_limits(self) -> Limits:
        """Those that workers keep: on cores that others share, passes of prompts are short."""
        if not 0 < self.num_cores < len(self.workers):
            return self.limits
        pass_tokens = min(self.limits.max_batch_tokens, SHARED_PASS_TOKENS)
        return replace(self.limits, max_batch_tokens=pass_tokens)
