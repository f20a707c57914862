"""One UCX worker driven by the running event loop: posts tagged messages, reports their ends.

In: buffers, tags, peers' worker addresses. Out: one callback per operation, called from the event
loop. Knows nothing of leases, pulls or what a message means. The only module that imports ucxx. It
uses ucxx's thin layer instead of its asyncio one, because the latter drives a single context per
event loop, polls for each operation that waits, and has no word for an operation that was given up.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ucxx._lib.libucxx as ucx_api
from ucxx._lib.arr import Array

from shared.transport.base import Buffer
from shared.transport.buffers import host_bytes, is_on_device

PROGRESS_BUDGET_S = 0.001
"""Longest stretch of UCX work before other tasks of the event loop get their turn."""

HANDLED_ERRORS_CONFIG: Mapping[str, str] = {
    # By default UCX falls back to TCP between processes of one host when errors are to be handled,
    # and without error handling it aborts this process when a peer dies while its memory is read.
    # These let shared memory and direct reads of the peer's memory take part in error handling.
    "POSIX_ERROR_HANDLING": "y",
    "SYSV_ERROR_HANDLING": "y",
    # UCX warns that it cannot truly invalidate memory of a send that it gave up, so a receiver may
    # still read it. Pulls do not depend on it: what arrives after their deadline is refused.
    "CMA_MEMORY_INVALIDATE": "y",
    # How soon a dead peer is noticed when nothing is under way; the default is 20 s.
    "KEEPALIVE_INTERVAL": "1s",
}

Endpoint = Any
"""A connection to one peer, as `UcxWorker.connect` returns it."""

Done = Callable[[Exception | None], None]
"""Called once when an operation ends: with None, or with the UCX error as an `OSError`."""


@dataclass(eq=False)
class Operation:
    """Something posted. It keeps its memory referenced until UCX has let go of it."""

    done: Done
    array: Any = None
    endpoint: Endpoint = None
    request: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Arrival:
    """A message that nobody had posted a receive for."""

    tag: int
    num_bytes: int


def as_array(buffer: Buffer) -> Any:
    """View memory as UCX sees it. Raises `ValueError` unless it is contiguous."""
    array = Array(buffer if is_on_device(buffer) else host_bytes(buffer))
    if not array.c_contiguous:
        raise ValueError("memory to transfer must be contiguous")
    return array


class UcxWorker:
    """A UCX context with one worker. Every method must be called from the event loop's thread."""

    def __init__(
        self,
        on_progress: Callable[[], bool],
        *,
        error_handling: bool = True,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """`on_progress` runs after each round of progress and says whether it did anything.

        `config` holds UCX options without their prefix; the environment (`UCX_...`) wins over both.
        """
        self._on_progress = on_progress
        self._error_handling = error_handling
        options = {**(HANDLED_ERRORS_CONFIG if error_handling else {}), **(config or {})}
        chosen = {key: options[key] for key in options if f"UCX_{key}" not in os.environ}
        features = (ucx_api.Feature.TAG, ucx_api.Feature.WAKEUP)
        self._context = ucx_api.UCXContext(chosen, features)
        self._worker = ucx_api.UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        self._event_fd: int = self._worker.epoll_file_descriptor
        self._pending: set[Operation] = set()
        self._next_tick: asyncio.Handle | None = None
        self.address: bytes = self._worker.address.tobytes()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._event_fd, self._tick)
        self.kick()

    @property
    def num_pending(self) -> int:
        """Operations that have not ended."""
        return len(self._pending)

    def connect(self, address: bytes) -> Endpoint:
        """Connect to a worker address. Raises `OSError` if nobody can be reached there."""
        try:
            remote = ucx_api.UCXAddress.create_from_buffer(address)
            return ucx_api.UCXEndpoint.create_from_worker_address(
                self._worker, remote, self._error_handling
            )
        except (ucx_api.UCXError, ValueError, RuntimeError) as error:
            raise OSError(f"no UCX endpoint: {error}") from error

    def disconnect(self, endpoint: Endpoint) -> None:
        """Close an endpoint without waiting; what is under way on it ends with an error."""
        if endpoint.alive:
            # A blocking close spins in UCX until a peer that may be dead has answered.
            operation = Operation(_ignore, endpoint=endpoint)
            operation.request = endpoint.close()
            self._pending.add(operation)
        self.kick()

    def send(self, endpoint: Endpoint, buffer: Buffer, tag: int, done: Done) -> Operation:
        """Post a send."""
        operation = Operation(done, as_array(buffer), endpoint)
        return self._post(operation, endpoint.tag_send, tag)

    def receive(
        self, buffer: Buffer, tag: int, done: Done, *, endpoint: Endpoint = None
    ) -> Operation:
        """Post a receive; a longer message ends it with an error.

        If it is bound to an `endpoint`, the failure of that endpoint ends it too.
        """
        operation = Operation(done, as_array(buffer), endpoint)
        post = self._worker.tag_recv if endpoint is None else endpoint.tag_recv
        return self._post(operation, post, tag)

    def peek(self, tag: int, mask: int) -> Arrival | None:
        """The oldest message that waits without a posted receive and matches `tag` under `mask`."""
        probe = self._worker.tag_probe(ucx_api.UCXXTag(tag), ucx_api.UCXXTagMask(mask))
        return Arrival(probe.sender_tag.value, probe.length) if probe.matched else None

    def forget(self, operation: Operation) -> None:
        """Cancel a receive that no message has matched yet; its callback will not be called."""
        self._pending.discard(operation)
        # ucxx cannot cancel one request; dropping its last reference does, and at once.
        operation.request = None

    def kick(self) -> None:
        """Make progress soon: something was posted since the worker was last armed."""
        if self._next_tick is None:
            self._next_tick = self._loop.call_soon(self._tick)

    def close(self) -> None:
        """Stop progress and give back all UCX resources; operations still pending are dropped."""
        self._loop.remove_reader(self._event_fd)
        if self._next_tick is not None:
            self._next_tick.cancel()
        for operation in self._pending:
            operation.request = operation.endpoint = None
        self._pending.clear()
        del self._worker, self._context

    def _post(self, operation: Operation, post: Callable[..., Any], tag: int) -> Operation:
        try:
            operation.request = post(operation.array, ucx_api.UCXXTag(tag))
        except (ucx_api.UCXError, RuntimeError) as error:
            # An endpoint that failed is closed; tell it like every other end, from the loop.
            self._loop.call_soon(operation.done, _translated(error))
            return operation
        self._pending.add(operation)
        self.kick()
        return operation

    def _tick(self) -> None:
        """Progress until nothing moves or the budget is spent, then sleep on the event fd."""
        until = time.perf_counter() + PROGRESS_BUDGET_S
        moved = True
        while moved and time.perf_counter() < until:
            moved = self._worker.progress_once() or self._settle() | self._on_progress()
        if self._error_handling and not moved:
            self._worker.progress()  # also cancels the operations of endpoints that failed
            moved = self._settle()
        # Only a worker with nothing left to do may be armed: an armed one with work of its own
        # pending (a long copy, say) sleeps on it. `arm` itself refuses if an event came meanwhile.
        is_asleep = not moved and self._worker.arm()
        # What was posted during this tick is under way too: the tick it asked for is not needed.
        if self._next_tick is not None:
            self._next_tick.cancel()
            self._next_tick = None
        if not is_asleep:
            self.kick()

    def _settle(self) -> bool:
        ended = [operation for operation in self._pending if operation.request.completed]
        for operation in ended:
            if operation in self._pending:  # a callback may have forgotten it
                self._pending.discard(operation)
                operation.done(_error_of(operation.request))
        return bool(ended)


def _error_of(request: Any) -> Exception | None:
    try:
        request.check_error()
    except (ucx_api.UCXError, RuntimeError) as error:
        return _translated(error)
    return None


def _translated(error: Exception) -> OSError:
    return OSError(f"{type(error).__name__}: {error}")


def _ignore(_error: Exception | None) -> None:
    """The end of a close is nobody's business."""
