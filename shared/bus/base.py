"""What Triptych needs of a message bus, and no more.

Work travels through durable queues: a task stays until it is acknowledged, and returns to the queue
when its worker dies. Events travel as plain publish-subscribe: cheap, unordered between publishers,
and allowed to be lost. Small facts with a lifetime live in key-value buckets, media bytes in an
object store. Adapters raise `BusError` and its subclasses only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shared.messages.base import Message

M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)

Headers = Mapping[str, str]


class Delivery(Protocol, Generic[M_co]):
    """One task taken from a work queue.

    Exactly one of ack, nak or reject ends it; each is idempotent, and none does anything after
    another one. Between hops the acknowledgement may get lost: a task may come twice.
    """

    @property
    def message(self) -> M_co: ...

    @property
    def headers(self) -> Headers: ...

    @property
    def num_delivered(self) -> int:
        """1 on the first delivery."""
        ...

    @property
    def queued_s(self) -> float:
        """Seconds between publication and this delivery, by the bus's clock."""
        ...

    async def ack(self) -> None:
        """The result is safe with the next hop: forget the task."""
        ...

    async def nak(self, delay_s: float = 0.0) -> None:
        """Give the task back to the queue, for another worker. A task given back on its last
        allowed delivery goes to the dead letters."""
        ...

    async def in_progress(self) -> None:
        """Still at work: restart the redelivery timer."""
        ...

    async def reject(self, reason: str) -> None:
        """Never deliver again; keep the task in the dead-letter stream with the reason."""
        ...


class WorkQueue(Protocol, Generic[M]):
    """One bounded queue of tasks of one type."""

    async def put(self, message: M, *, message_id: str, headers: Headers | None = None) -> None:
        """Queue a task. Raises `QueueFull`; after any other `BusError` it may be queued or not, and
        putting it again with the same id is safe.

        A `message_id` seen within the duplicate window is dropped without a word, even when that
        task has ended meanwhile: an id must name the attempt, not only the content.
        """
        ...

    async def take(self, max_count: int, timeout_s: float) -> list[Delivery[M]]:
        """Wait up to `timeout_s` for at least one task; return up to `max_count`, perhaps none.

        Cancelling it loses nothing, and no task is taken that this call did not ask for. What
        cannot be decoded or was delivered too often goes to the dead letters, unseen.
        """
        ...

    async def depth(self) -> int:
        """Tasks waiting or unacknowledged."""
        ...


class Subscription(Protocol):
    """A standing subscription; `close` is idempotent."""

    async def close(self) -> None: ...


@dataclass(frozen=True)
class KeyValueEntry:
    """A key's newest state; `value is None` says that it was deleted or lapsed."""

    key: str
    value: bytes | None


class KeyValue(Protocol):
    """A bucket of small values with a lifetime."""

    async def put(self, key: str, value: bytes) -> None: ...

    async def get(self, key: str) -> bytes | None: ...

    async def delete(self, key: str) -> None: ...

    def watch(self) -> AsyncGenerator[KeyValueEntry, None]:
        """All present entries first, then every change; ends when the bus is closed.

        Lapsed keys may be reported late or never. After a reconnect the present entries come
        again. Iterate under `contextlib.aclosing`, so that leaving the loop ends the watch.
        """
        ...


class ObjectStore(Protocol):
    """A bounded store of byte strings with a lifetime."""

    async def put(self, name: str, data: bytes) -> None:
        """Store `data`; storing the same name again is cheap and keeps it alive.

        Equal names must mean equal bytes. Raises `QueueFull` if the store has no room.
        """
        ...

    async def get(self, name: str) -> bytes:
        """Raises `ObjectMissing`."""
        ...


class Bus(Protocol):
    """A connection to the bus. Queues, buckets and stores are opened once and kept: they live as
    long as the connection."""

    async def work_queue(self, subject: str, kind: type[M]) -> WorkQueue[M]:
        """The work queue of that subject, made if it does not exist."""
        ...

    async def publish(self, subject: str, message: Message, headers: Headers | None = None) -> None:
        """Send an event to whoever listens now."""
        ...

    async def subscribe(
        self, subject: str, kind: type[M], handler: Callable[[M, Headers], Awaitable[None]]
    ) -> Subscription:
        """Call `handler` for every event on `subject`, one at a time and in order.

        Events published after this returns are heard. What the handler raises is logged.
        """
        ...

    async def key_value(self, bucket: str, *, ttl_s: float) -> KeyValue: ...

    async def object_store(self, bucket: str, *, ttl_s: float, max_bytes: int) -> ObjectStore: ...

    async def close(self) -> None:
        """End every subscription and watch, and give untaken tasks back. Idempotent."""
        ...
