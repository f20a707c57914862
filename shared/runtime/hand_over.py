"""From prefill to decode inside one process: a sequence's blocks change owner, nothing is copied.

In: prefilled sequences, and the decode stage's word on whether it takes one now. Out: their
answers, or the advice to queue them for whoever has room; and, for a decode task that this process
queued itself, the blocks behind its lease. The two stages know each other only through this. It
knows neither tensors nor the bus.

Blocks that are queued under a lease make up half of the pool at most. So a task of another worker
that needs no more than the other half gets it in the end, even if all of these stand behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from shared.cache.block_pool import BlockPool
from shared.messages.descriptor import RequestDescriptor, TokenId
from shared.model.grammar import GrammarState
from shared.runtime.signal import Signal


@dataclass(frozen=True)
class Prefilled:
    """A sequence whose prompt is computed.

    The first `request.num_tokens` tokens lie in `block_ids`; `last_token_id` is the newest token of
    the answer, not in the blocks yet, and stands at rotary position `next_pos`. `grammar` has
    taken it in.
    """

    request: RequestDescriptor
    block_ids: tuple[int, ...]
    last_token_id: TokenId
    next_pos: int
    grammar: GrammarState | None = None


Answer = Coroutine[Any, Any, None]
"""Ends when the answer is complete, raises what went wrong. Must be awaited without a wait before:
its blocks and its slot are taken already."""

Accept = Callable[[Prefilled], Answer | None]
"""Takes references of its own to the blocks and begins an answer; None if there is no room now."""


class HandOver:
    """Joins the prefill and the decode stage of one process over one block pool.

    `room` is notified whenever blocks or slots may have become free in either of them;
    `num_answers` are under way.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._accept: Accept | None = None
        self._leased: dict[str, tuple[int, ...]] = {}
        self.num_answers = 0
        self.room = Signal()

    def open(self, accept: Accept) -> None:
        """The decode stage takes sequences from now on."""
        self._accept = accept

    def close(self) -> None:
        """The decode stage takes no more; those that it took go on."""
        self._accept = None
        self.room.notify()

    async def offer(self, prefilled: Prefilled) -> Answer | None:
        """An answer that has begun here; None where the sequence should be queued.

        Waits while it has no room here and so much is queued that no more should be.
        """

        def decide() -> tuple[Answer | None] | None:
            answer = self._accept(prefilled) if self._accept is not None else None
            return (answer,) if answer is not None or self._may_queue(prefilled) else None

        (answer,) = await self.room.until(decide)
        return answer

    def leased(self, lease_id: str) -> tuple[int, ...]:
        """The blocks behind an open lease of this process; empty for any other."""
        return self._leased.get(lease_id, ())

    def opened(self, lease_id: str, block_ids: tuple[int, ...]) -> None:
        """These blocks are exposed under a lease, for whichever decoder takes them."""
        self._leased[lease_id] = block_ids

    def ended(self, lease_id: str) -> None:
        """The lease is over, and the reference that it stood for. Idempotent."""
        self._leased.pop(lease_id, None)
        self.room.notify()

    def _may_queue(self, prefilled: Prefilled) -> bool:
        num_leased = sum(map(len, self._leased.values()))
        is_closed = self._accept is None
        return is_closed or num_leased + len(prefilled.block_ids) <= self._pool.num_blocks // 2
