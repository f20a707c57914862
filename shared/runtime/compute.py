"""One thread that owns the device: model steps run there, the event loop stays free.

A decode step of a small model takes less than a millisecond, so the way to the thread and back
counts: this is a plain queue and one wake-up of the loop per call, about half of what an
executor's chain of futures takes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, ParamSpec, Self, TypeVar

JOIN_TIMEOUT_S = 5.0

P = ParamSpec("P")
T = TypeVar("T")


class _Call(Generic[T]):
    """One call on its way; `claim` is taken by whoever decides first whether it runs."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[T] = self._loop.create_future()
        self.ended = asyncio.Event()
        self.claim = threading.Lock()

    def run(self) -> None:
        """On the compute thread."""
        if not self.claim.acquire(blocking=False):
            return
        try:
            value = self._call()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error)
        else:
            self._loop.call_soon_threadsafe(self._succeed, value)

    def _succeed(self, value: T) -> None:
        self.ended.set()
        if not self.result.done():
            self.result.set_result(value)

    def _fail(self, error: BaseException) -> None:
        self.ended.set()
        if not self.result.done():
            self.result.set_exception(error)


class ComputeThread:
    """Runs calls one after the other, in the order in which they were asked for."""

    def __init__(self, name: str = "compute") -> None:
        self._calls: SimpleQueue[_Call[object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def __call__(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call` on the compute thread.

        A cancelled caller still waits for a call that has begun: the call may be writing into
        memory that the caller would otherwise hand back.
        """
        queued: _Call[T] = _Call(lambda: call(*args, **kwargs))
        self._calls.put(queued)  # type: ignore[arg-type]  # the thread does not look at results
        try:
            return await queued.result
        except asyncio.CancelledError:
            if not queued.claim.acquire(blocking=False):
                await queued.ended.wait()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._calls.put(None)
        # A daemon thread: a call that never returns must not keep the process from ending.
        self._thread.join(JOIN_TIMEOUT_S)

    def _run(self) -> None:
        while (queued := self._calls.get()) is not None:
            queued.run()
