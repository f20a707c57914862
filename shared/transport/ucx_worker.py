"""One UCX worker driven by the running event loop: posts tagged messages, reports their ends.

In: buffers, tags, peers' worker addresses. Out: one callback per operation, called from the event
loop. Knows nothing of leases, pulls or messages' meaning. The only module that imports ucxx; it
uses ucxx's thin layer instead of its asyncio one, because the latter drives a single context per
event loop, wakes once a second without need, and has no word for an operation that was given up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ucxx._lib.libucxx as ucx_api
from ucxx._lib.arr import Array

from shared.transport.base import Buffer

PROGRESS_BUDGET_S = 0.001
"""Longest stretch of UCX work before other tasks of the event loop get their turn."""

Endpoint = Any
"""A connection to one peer, as `UcxWorker.connect` returns it."""

Done = Callable[[Exception | None], None]
"""Called once when an operation ends: None, or the UCX error."""


@dataclass(eq=False)
class Operation:
    """A posted send or receive. It keeps its memory referenced until UCX has let go of it."""

    array: Any
    done: Done
    request: Any = field(default=None, repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory this operation may still touch."""
        return int(self.array.nbytes)


@dataclass(frozen=True)
class Arrival:
    """A message that nobody had posted a receive for."""

    tag: int
    num_bytes: int


def as_array(buffer: Buffer) -> Any:
    """View memory as UCX sees it. Raises `ValueError` unless it is contiguous."""
    if not hasattr(buffer, "__cuda_array_interface__"):
        buffer = _host_view(buffer)
    array = Array(buffer)
    if not array.c_contiguous:
        raise ValueError("a buffer to transfer must be contiguous")
    return array


def _host_view(buffer: Buffer) -> Buffer:
    """Prefer the buffer protocol; objects with only `__array_interface__` go through numpy."""
    try:
        return memoryview(buffer)
    except TypeError:
        import numpy  # only for exotic buffers: the gateway installs without it

        return numpy.asarray(buffer)


class UcxWorker:
    """A UCX context with one worker. Every method must be called from the event loop's thread."""

    def __init__(
        self, on_progress: Callable[[], bool], *, config: Mapping[str, str], error_handling: bool
    ) -> None:
        """`on_progress` runs after each round of progress; it says whether it did anything."""
        self._on_progress = on_progress
        self._error_handling = error_handling
        features = (ucx_api.Feature.TAG, ucx_api.Feature.WAKEUP)
        self._context = ucx_api.UCXContext(dict(config), features)
        self._worker = ucx_api.UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        self._event_fd: int = self._worker.epoll_file_descriptor
        self._loop = asyncio.get_running_loop()
        self._pending: set[Operation] = set()
        self._tick_handle: asyncio.Handle | None = None
        self.address: bytes = self._worker.address.tobytes()
        self._loop.add_reader(self._event_fd, self._tick)
        self.kick()

    def connect(self, address: bytes) -> Endpoint:
        """Connect to a worker address. Raises `OSError` if nobody can be reached there."""
        try:
            remote = ucx_api.UCXAddress.create_from_buffer(address)
            return ucx_api.UCXEndpoint.create_from_worker_address(
                self._worker, remote, self._error_handling
            )
        except (ucx_api.UCXError, ValueError) as error:
            raise OSError(f"no UCX endpoint: {error}") from error

    def send(self, endpoint: Endpoint, array: Any, tag: int, done: Done) -> Operation:
        """Post a send of an `as_array` view."""
        operation = Operation(array, done)
        return self._post(operation, endpoint.tag_send, tag)

    def receive(self, array: Any, tag: int, done: Done) -> Operation:
        """Post a receive into an `as_array` view; a longer message ends it with an error."""
        operation = Operation(array, done)
        return self._post(operation, self._worker.tag_recv, tag)

    def peek(self, tag: int, mask: int) -> Arrival | None:
        """The oldest message that waits without a posted receive and matches `tag` under `mask`."""
        probe = self._worker.tag_probe(ucx_api.UCXXTag(tag), ucx_api.UCXXTagMask(mask))
        return Arrival(probe.sender_tag.value, probe.length) if probe.matched else None

    def forget(self, operation: Operation) -> None:
        """Cancel a receive that cannot have matched yet, or let go of one that ended."""
        self._pending.discard(operation)
        # ucxx has no cancel of one request; dropping the last reference to a request cancels it.
        operation.request = None

    def kick(self) -> None:
        """Make progress soon: something was posted since UCX was last armed."""
        if self._tick_handle is None:
            self._tick_handle = self._loop.call_soon(self._tick)

    def close(self) -> None:
        """Stop progress and give back all UCX resources; operations still pending are dropped."""
        self._loop.remove_reader(self._event_fd)
        if self._tick_handle is not None:
            self._tick_handle.cancel()
        for operation in self._pending:
            operation.request = None
        self._pending.clear()
        del self._worker, self._context

    def _post(self, operation: Operation, post: Callable[..., Any], tag: int) -> Operation:
        operation.request = post(operation.array, ucx_api.UCXXTag(tag))
        self._pending.add(operation)
        self.kick()
        return operation

    def _tick(self) -> None:
        """Progress until nothing moves or the budget is spent, then sleep on the event fd."""
        if self._tick_handle is not None:
            self._tick_handle.cancel()
            self._tick_handle = None
        until = time.perf_counter() + PROGRESS_BUDGET_S
        while time.perf_counter() < until:
            moved = self._worker.progress_once()
            if not moved:
                moved = self._settle() | self._on_progress()
            if not moved:
                break
        if self._error_handling:
            self._worker.progress()  # also cancels the operations of endpoints that failed
        # A worker that has more to do refuses to be armed, and an armed one signals the event fd.
        if not self._worker.arm():
            self.kick()

    def _settle(self) -> bool:
        ended = [operation for operation in self._pending if operation.request.completed]
        for operation in ended:
            self._pending.discard(operation)
            operation.done(_error_of(operation.request))
        return bool(ended)


def _error_of(request: Any) -> Exception | None:
    try:
        request.check_error()
    except ucx_api.UCXError as error:
        return OSError(f"{type(error).__name__}: {error}")
    return None
