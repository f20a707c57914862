"""Pull requests to one durable JetStream consumer, one at a time, without losing a message.

Comes in: how many messages are wanted and for how long. Goes out: raw messages. It does not know
what they mean. A pull asks for everything that is there or, if nothing is, for the next message
(`no_wait` together with `expires`), so the server never pushes a task that nobody asked for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared.bus.nats_errors import translated
from shared.errors import BusError

# The longest single pull, and so how long a cancelled fetch may take: nothing but its end says that
# the server sends no more. Withdrawing interest instead can lose a message that is being sent.
_MAX_PULL_S = 0.25
# How long to wait for the status of a pull that the server must have ended.
_STATUS_GRACE_S = 0.5
# How long closing may take to receive what is on the wire.
_DRAIN_TIMEOUT_S = 2.0

_NOTHING_HERE = frozenset({"404", "408"})

logger = logging.getLogger(__name__)


class PullInbox:
    """The client's end of one consumer. One `fetch` at a time."""

    def __init__(self, client: Client, stream: str, consumer: str) -> None:
        self._client = client
        self._request_subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._messages: deque[tuple[float, Msg]] = deque()  # with when each arrived
        self._pull_number = 0
        self._wanted = 0
        self._status: str | None = None
        self._ended = asyncio.Event()

    async def fetch(self, max_count: int, timeout_s: float) -> tuple[list[Msg], str | None]:
        """At least one message if one comes within `timeout_s`, and up to `max_count`.

        The second value is a status by which the server refused the pull (no such consumer, leader
        change, reconnect), or None. A cancelled fetch waits for the end of its pull and keeps what
        arrived for the next one.
        """
        refusal = None
        if not self._messages:
            refusal = await self._pull(max_count, timeout_s)
        # Nothing is awaited between taking messages out and returning them: no cancellation can
        # come in between and lose them.
        count = min(max_count, len(self._messages))
        return [self._messages.popleft()[1] for _ in range(count)], refusal

    async def _pull(self, max_count: int, timeout_s: float) -> str | None:
        await self._subscribe()
        self._pull_number += 1
        self._wanted = max_count
        self._status = None
        self._ended.clear()
        wait_s = min(max(timeout_s, 0.0), _MAX_PULL_S)
        ended = asyncio.ensure_future(self._run(max_count, wait_s))
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            await asyncio.wait([ended])
            ended.exception()  # seen; a bus that is gone fails the next fetch as well
            raise
        return self._status

    async def _run(self, max_count: int, wait_s: float) -> None:
        """Ask, and wait until the server has answered in full."""
        try:
            await self._request(max_count, wait_s)
            async with asyncio.timeout(wait_s + _STATUS_GRACE_S):
                await self._ended.wait()
        except TimeoutError:
            await self.abandon()
        finally:
            self._wanted = 0

    async def _request(self, max_count: int, wait_s: float) -> None:
        body: dict[str, int | bool] = {"batch": max_count, "no_wait": True}
        if wait_s > 0:
            body["expires"] = int(wait_s * 1e9)
        with translated(self._request_subject):
            await self._client.publish(
                self._request_subject,
                json.dumps(body).encode(),
                reply=f"{self._inbox}.{self._pull_number}",
            )

    async def _subscribe(self) -> None:
        if self._subscription is not None:
            return
        self._inbox = self._client.new_inbox()
        with translated(self._request_subject):
            self._subscription = await self._client.subscribe(
                f"{self._inbox}.*", cb=self._on_message
            )

    async def _on_message(self, message: Msg) -> None:
        status = (message.headers or {}).get("Status") if not message.reply else None
        if status is None:
            self._messages.append((time.monotonic(), message))
            if self._wanted and len(self._messages) >= self._wanted:
                self._ended.set()
        elif message.subject == f"{self._inbox}.{self._pull_number}":
            self._status = None if status in _NOTHING_HERE else status
            self._ended.set()

    def interrupt(self, status: str) -> None:
        """End the pull under way: the connection that carried it is gone."""
        self._status = status
        self._ended.set()

    async def abandon(self) -> None:
        """Withdraw the pull under way. What is already on the wire is still received and kept:
        draining waits until the server has seen that nobody listens any more."""
        subscription, self._subscription = self._subscription, None
        if subscription is None or not self._client.is_connected:
            return
        try:
            with translated(self._request_subject):
                await asyncio.wait_for(
                    subscription.drain(),  # type: ignore[no-untyped-call]  # nats-py's
                    _DRAIN_TIMEOUT_S,
                )
        except BusError as error:
            # Whatever was on the wire is redelivered when its acknowledgement is overdue.
            logger.warning("pull not withdrawn: %s", error)

    @property
    def is_empty(self) -> bool:
        """Whether no message waits for a fetch."""
        return not self._messages

    def unfetched(self, min_age_s: float = 0.0) -> list[Msg]:
        """Take out what arrived after its fetch was cancelled and lies here for so long: younger
        messages may be those of a fetch under way."""
        latest_s = time.monotonic() - min_age_s
        messages: list[Msg] = []
        while self._messages and self._messages[0][0] <= latest_s:
            messages.append(self._messages.popleft()[1])
        return messages
