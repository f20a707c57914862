"""One task per stage, each on its own JetStream work queue."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from shared.messages.base import Message
from shared.messages.descriptor import MediaItem, RequestDescriptor, TokenId, WorkerRef
from shared.messages.refs import KvRef


class Origin(NamedTuple):
    """Whose work a task is: where events about it go, and until when it is wanted."""

    request_id: str
    attempt: int
    gateway: WorkerRef
    deadline_unix_s: float


class EncodeTask(Message):
    """Turn one media item into an embedding and announce it under its content key."""

    request_id: str
    attempt: Annotated[int, Field(ge=0)]
    gateway: WorkerRef
    model: str
    item: MediaItem
    deadline_unix_s: float

    @property
    def origin(self) -> Origin:
        """Whose work this is."""
        return Origin(self.request_id, self.attempt, self.gateway, self.deadline_unix_s)

    @property
    def key(self) -> str:
        """Equal for deliveries of the same work."""
        return f"{self.request_id}:{self.attempt}:{self.item.content_key}"


class PrefillTask(Message):
    """Compute the keys and values of a prompt and its first token."""

    request: RequestDescriptor

    @property
    def origin(self) -> Origin:
        """Whose work this is."""
        return origin_of(self.request)

    @property
    def key(self) -> str:
        """Equal for deliveries of the same work."""
        return f"{self.request.request_id}:{self.request.attempt}"


class DecodeTask(Message):
    """Go on from a prefilled sequence: pull its KV, then generate from `last_token_id` on.

    `last_token_id` is the newest token of the answer (already sent to the gateway); its own keys
    and values are not in `kv` yet. `next_index` is the index of the next token to generate.
    """

    request: RequestDescriptor
    kv: KvRef
    last_token_id: TokenId
    next_index: Annotated[int, Field(ge=1)]

    @property
    def origin(self) -> Origin:
        """Whose work this is."""
        return origin_of(self.request)

    @property
    def key(self) -> str:
        """Equal for deliveries of the same work."""
        return f"{self.request.request_id}:{self.request.attempt}"


def origin_of(request: RequestDescriptor) -> Origin:
    """The origin of a whole request."""
    return Origin(request.request_id, request.attempt, request.gateway, request.deadline_unix_s)


Task = EncodeTask | PrefillTask | DecodeTask
