"""How a sequence's KV comes here: piece by piece, each into landing memory and on into its blocks.

In: a decode task and the blocks that it will lie in. Out: KV in the blocks, the newest token of
the answer, the lease released. Where the prompt is still being computed, a pull waits at the owner
until its piece is finished. Few pieces are under way at a time, so that landing memory is that of
a few.

Pieces are moved by a thread of their own: their blocks are nobody else's, so no decode step waits
for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import TracebackType

from services.decode.landing_moves import LandingMoves
from shared.cache.block_pool import BlockHandle
from shared.cache.kv_cache import KvCache
from shared.errors import FailureKind, Outcome, RequestFailed, TransferError
from shared.messages.descriptor import TokenId
from shared.messages.refs import KvPiece, KvRef
from shared.messages.work import FIRST_TOKEN_BYTES, DecodeTask
from shared.runtime.compute import ComputeThread
from shared.runtime.intake import Ticket
from shared.runtime.scope import unwrapped
from shared.runtime.worker import Worker
from shared.telemetry import names, tracing
from shared.telemetry.metrics import DecodeMetrics
from shared.transport.base import Buffer
from shared.transport.landing import Landing
from shared.transport.tensors import byte_view

NUM_IN_FLIGHT = 2
"""Pieces that are pulled or moved at a time: one travels while another is moved."""

WITHDRAWN_GRACE_S = 2.0


class Withdrawn(RequestFailed):
    """The prefill worker took the sequence back while its prompt was being computed.

    It says itself why, or has ended the answer, or has given its task to another worker.
    """

    async def when_nobody_else_ends_it(self) -> RequestFailed:
        """Wait for the cancel request that every end of a request brings; then it is a loss."""
        await asyncio.sleep(WITHDRAWN_GRACE_S)
        return RequestFailed(self.kind, self.message, retryable=self.retryable)


class KvInlet:
    """One decode stage's. A `with` block starts and ends its thread."""

    def __init__(
        self,
        worker: Worker,
        kv: KvCache,
        landing: Landing,
        *,
        pull_timeout_s: float,
        metrics: DecodeMetrics,
    ) -> None:
        self._worker = worker
        self._transport = worker.transport
        self._kv = kv
        self._landing = landing
        self._pull_timeout_s = pull_timeout_s
        self._metrics = metrics
        self._moves = LandingMoves(kv)
        self._thread = ComputeThread("kv-landing")

    def __enter__(self) -> KvInlet:
        self._thread.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.__exit__(kind, error, traceback)

    async def receive(self, task: DecodeTask, blocks: BlockHandle, ticket: Ticket) -> TokenId:
        """Pull everything and release the lease. Raises `RequestFailed`."""
        ref, holder = task.kv, task.request.request_id
        self._check_sizes(ref)
        sizes = sorted(ref.tensor.segment_bytes[: len(ref.pieces)], reverse=True)
        async with self._landing.reserved(holder, sum(sizes[:NUM_IN_FLIGHT])):
            ticket.admit()
            try:
                with (
                    tracing.span(names.TRANSFER_KV, num_bytes=ref.tensor.num_bytes),
                    self._metrics.kv_transfer_s.time(),
                ):
                    last_token_id = await self._all(task, blocks)
            except TransferError as error:
                raise _failure(task, error) from error
        await self._transport.release(ref.tensor, holder)
        return last_token_id

    async def _all(self, task: DecodeTask, blocks: BlockHandle) -> TokenId:
        pieces = iter(enumerate(task.kv.pieces))
        with unwrapped():
            async with asyncio.TaskGroup() as scope:
                token = scope.create_task(self._last_token(task))
                for _ in range(NUM_IN_FLIGHT):
                    scope.create_task(self._some(task.kv, pieces, blocks))
        return token.result()

    async def _some(
        self, ref: KvRef, pieces: Iterator[tuple[int, KvPiece]], blocks: BlockHandle
    ) -> None:
        """Pull and move one piece after the other until none is left."""
        for segment, piece in pieces:
            values = self._moves.empty(piece)
            await self._pull(ref, segment, byte_view(values))
            await self._thread(self._moves.move, values, piece, blocks.block_ids)

    async def _last_token(self, task: DecodeTask) -> TokenId:
        if task.last_token_id is not None:
            return task.last_token_id
        landing = bytearray(FIRST_TOKEN_BYTES)
        await self._pull(task.kv, len(task.kv.pieces), landing)
        token_id = int.from_bytes(landing, "little", signed=True)
        if not 0 <= token_id < 2**31:
            raise RequestFailed(FailureKind.INTERNAL, f"{token_id} arrived as a token id")
        return token_id

    async def _pull(self, ref: KvRef, segment: int, into: Buffer) -> None:
        """Pull one segment, asking again while it is still being computed; the request's deadline
        bounds that."""
        while True:
            try:
                await self._transport.pull(
                    ref.tensor, segment, into, timeout_s=self._pull_timeout_s
                )
            except TransferError as error:
                if error.outcome is Outcome.NOT_READY:
                    continue  # the owner has let us wait for half the time: no busy loop
                raise
            return

    def _check_sizes(self, ref: KvRef) -> None:
        geometry = self._kv.geometry
        expected = tuple(
            piece.num_tokens
            * (piece.last_layer - piece.first_layer)
            * geometry.bytes_per_token_layer
            for piece in ref.pieces
        )
        arriving = ref.tensor.segment_bytes[: len(expected)]
        if (len(ref.kv_len), arriving) != (geometry.num_layers, expected):
            raise RequestFailed(
                FailureKind.INTERNAL,
                f"KV of {len(ref.kv_len)} layers in {sum(arriving)} bytes arrived, "
                f"{geometry.num_layers} layers in {sum(expected)} bytes were expected",
            )


def _failure(task: DecodeTask, error: TransferError) -> RequestFailed:
    message = f"KV was not received: {error}"
    if error.outcome is Outcome.INCOMPATIBLE:
        return RequestFailed(FailureKind.INTERNAL, message)
    is_withdrawn = task.last_token_id is None and error.outcome is Outcome.CANCELLED
    kind = Withdrawn if is_withdrawn else RequestFailed
    return kind(FailureKind.WORKER_LOST, message, retryable=True)
