"""One simulated request: what the schedulers see of it, and when its tokens came."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.planner.workload import Arrival
from shared.cache.block_pool import BlockHandle


@dataclass(eq=False)
class SimRequest:
    """Also the prompt that the prefill scheduler sorts; all are of one priority.

    `spans_s` holds seconds by the names of `shared.telemetry.names`.
    """

    arrival: Arrival
    index: int
    num_missing: int = 0
    encoded_at: list[tuple[int, int]] = field(default_factory=list)  # worker, patches
    first_s: float | None = None
    ended_s: float | None = None
    is_refused: bool = False
    num_ends: int = 0
    spans_s: dict[str, float] = field(default_factory=dict)
    begun_s: float = 0.0  # what goes on at the moment
    decoded_from_s: float = 0.0
    blocks: BlockHandle | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_bare_tokens: int = 0
    priority: int = 0
    block_keys: tuple[bytes, ...] = ()
    whole_spans: tuple[tuple[int, int], ...] = ()

    def spend(self, name: str, seconds: float) -> None:
        """So many seconds went into what the services' span of this name covers."""
        self.spans_s[name] = self.spans_s.get(name, 0.0) + seconds

    @property
    def num_tokens(self) -> int:
        return self.arrival.num_prompt_tokens

    @property
    def num_ready_tokens(self) -> int:
        """All: a prompt is given to the scheduler when its pictures are there."""
        return self.num_tokens

    @property
    def max_context_tokens(self) -> int:
        return self.num_tokens + self.arrival.num_output_tokens

    @property
    def deadline_s(self) -> float:
        """All requests have the same time to live, so the order is that of arrival."""
        return self.arrival.arrival_s

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token; None if there was none."""
        return None if self.first_s is None else self.first_s - self.arrival.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; 0 for an answer of one token."""
        if self.first_s is None or self.ended_s is None:
            return None
        return (self.ended_s - self.first_s) / max(1, self.arrival.num_output_tokens - 1)
