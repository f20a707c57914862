"""A sequence's KV under a lease, whole or while it is being computed.

In: blocks, and how far they are computed. Out: a reference that a decoder can pull from, piece by
piece. The lease owns a reference to the blocks until it ends.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial

from services.prefill.executor import PrefillExecutor
from services.prefill.job import PrefillJob
from services.prefill.pieces import PiecePlan
from services.prefill.progress import PrefillProgress
from shared.cache.block_pool import BlockHandle
from shared.messages.refs import KvPiece, KvRef, pieces_of
from shared.messages.work import FIRST_TOKEN_BYTES
from shared.transport.base import Buffer, Segment, Transport
from shared.transport.tensors import byte_view

INSTANT_GATHER_BYTES = 1024 * 1024
"""KV up to this size is gathered on the event loop: copying it takes less than a thread switch."""


class KvExposer:
    """Offers the KV of this process' sequences. `plan` says in which pieces."""

    def __init__(self, transport: Transport, executor: PrefillExecutor, plan: PiecePlan) -> None:
        self._transport = transport
        self._executor = executor
        self._plan = plan

    def expose(
        self,
        job: PrefillJob,
        blocks: BlockHandle,
        *,
        next_pos: int,
        on_release: Callable[[], None],
        progress: PrefillProgress | None = None,
    ) -> KvRef:
        """Open a lease over `blocks`, which it frees when it ends.

        With `progress` the pieces are those of the plan, each ready as soon as it is computed, and
        behind them comes the first token; without, all is one piece.
        """
        geometry, request = self._plan.geometry, job.request
        token_cuts: tuple[int, ...] = ()
        layer_cuts: tuple[int, ...] = ()
        if progress is not None:
            token_cuts = self._plan.token_cuts(request.num_tokens, job.num_begun_tokens)
            layer_cuts = self._plan.layer_cuts(request.num_tokens, job.num_begun_tokens)
        pieces = pieces_of(request.num_tokens, geometry.num_layers, token_cuts, layer_cuts)
        segments = [self._segment(piece, blocks.block_ids, progress) for piece in pieces]
        if progress is not None:
            segments.append(_first_token(progress))

        def released() -> None:
            if progress is not None:
                progress.end()
            blocks.free()
            on_release()

        tensor = self._transport.expose(
            f"kv.{request.request_id}.{request.attempt}.{uuid.uuid4().hex[:8]}",
            segments,
            holders=[request.request_id],
            on_release=released,
        )
        return KvRef(
            tensor=tensor,
            kv_len=(request.num_tokens,) * geometry.num_layers,
            next_pos=next_pos,
            token_cuts=token_cuts,
            layer_cuts=layer_cuts,
        )

    def _segment(
        self, piece: KvPiece, block_ids: tuple[int, ...], progress: PrefillProgress | None
    ) -> Segment:
        num_layers = piece.last_layer - piece.first_layer
        num_bytes = piece.num_tokens * num_layers * self._plan.geometry.bytes_per_token_layer

        def gathered() -> Buffer:
            return byte_view(
                self._executor.gather(
                    block_ids, piece.num_tokens, piece.layers, start=piece.first_token
                )
            )

        ready = None
        if progress is not None:
            ready = partial(progress.until, piece.last_token, piece.last_layer)
        is_instant = num_bytes <= INSTANT_GATHER_BYTES and self._executor.gathers_at_once
        return Segment(num_bytes, gathered, is_instant=is_instant, ready=ready)


def _first_token(progress: PrefillProgress) -> Segment:
    def opened() -> Buffer:
        return progress.first.to_bytes(FIRST_TOKEN_BYTES, "little", signed=True)

    return Segment(FIRST_TOKEN_BYTES, opened, is_instant=True, ready=progress.first_token)
