"""One task per stage, each on its own JetStream work queue."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from shared.messages.base import Message
from shared.messages.descriptor import (
    MediaItem,
    MediaPart,
    RequestDescriptor,
    TokenId,
    WorkerRef,
)
from shared.messages.refs import EmbeddingClaim, KvRef

FIRST_TOKEN_BYTES = 8
"""A token id as a segment: a signed integer, little-endian."""


class Origin(NamedTuple):
    """Whose work a task is: where events about it go, and until when it is wanted."""

    request_id: str
    attempt: int
    gateway: WorkerRef
    deadline_unix_s: float


class EncodeTask(Message):
    """Turn one media item, or one part of it, into an embedding and announce it under its key.

    Nothing is to be done where another worker offers the embedding or makes it already; except that
    what is offered under one of `lost_lease_ids` could not be had, and that a task that `insists`
    has waited for the other worker in vain.
    """

    request_id: str
    attempt: Annotated[int, Field(ge=0)]
    gateway: WorkerRef
    model: str
    item: MediaItem
    deadline_unix_s: float
    part: MediaPart | None = None
    lost_lease_ids: tuple[str, ...] = ()
    insists: bool = False

    @classmethod
    def of(
        cls,
        request: RequestDescriptor,
        item: MediaItem,
        part: MediaPart | None = None,
        *,
        lost_lease_ids: tuple[str, ...] = (),
        insists: bool = False,
    ) -> EncodeTask:
        """The task for one media item of a request, or for a part of it."""
        return cls(
            request_id=request.request_id,
            attempt=request.attempt,
            gateway=request.gateway,
            model=request.model,
            item=item,
            part=part,
            deadline_unix_s=request.deadline_unix_s,
            lost_lease_ids=lost_lease_ids,
            insists=insists,
        )

    @property
    def content_key(self) -> str:
        """The key of what is to be made."""
        return self.item.content_key if self.part is None else self.part.content_key

    @property
    def num_tokens(self) -> int:
        """Rows of what is to be made."""
        return self.item.num_tokens if self.part is None else self.part.num_tokens

    @property
    def num_patches(self) -> int:
        """The tower's work for it."""
        return self.item.num_patches if self.part is None else self.part.num_patches

    def claim(self, encoder: WorkerRef | None = None) -> EmbeddingClaim:
        """What tells others that this task is queued, or with which encoder it is."""
        return EmbeddingClaim(
            content_key=self.content_key,
            request_id=self.request_id,
            attempt=self.attempt,
            deadline_unix_s=self.deadline_unix_s,
            encoder=encoder,
            num_patches=self.num_patches,
        )

    @property
    def origin(self) -> Origin:
        """Whose work this is."""
        return Origin(self.request_id, self.attempt, self.gateway, self.deadline_unix_s)

    @property
    def key(self) -> str:
        """Equal for deliveries of the same work."""
        return f"{self.request_id}:{self.attempt}:{self.content_key}"


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

    A task that is queued while its prompt is being computed has no `last_token_id` yet: the last
    segment of `kv.tensor`, behind all pieces, holds it in `FIRST_TOKEN_BYTES` bytes, little-endian.
    """

    request: RequestDescriptor
    kv: KvRef
    last_token_id: TokenId | None
    next_index: Annotated[int, Field(ge=1)]

    @property
    def origin(self) -> Origin:
        """Whose work this is."""
        return origin_of(self.request)

    @property
    def key(self) -> str:
        """Equal for deliveries of the same work: a prompt that was computed again has other KV."""
        return f"{self.request.request_id}:{self.request.attempt}:{self.kv.tensor.lease_id}"

    @model_validator(mode="after")
    def _has_its_last_token(self) -> DecodeTask:
        num_more = len(self.kv.tensor.segment_bytes) - len(self.kv.pieces)
        if num_more != (self.last_token_id is None):
            raise ValueError("last_token_id is in the task or in a segment behind the pieces")
        if num_more and self.kv.tensor.segment_bytes[-1] != FIRST_TOKEN_BYTES:
            raise ValueError(f"last_token_id takes {self.kv.tensor.segment_bytes[-1]} bytes")
        return self


def origin_of(request: RequestDescriptor) -> Origin:
    """The origin of a whole request."""
    return Origin(request.request_id, request.attempt, request.gateway, request.deadline_unix_s)


Task = EncodeTask | PrefillTask | DecodeTask
