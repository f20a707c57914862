"""Where a tensor waits to be pulled: owner, lease and sizes; never the bytes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.messages.base import Message
from shared.messages.descriptor import WorkerRef


class TensorRef(Message):
    """Exposed memory of one owner under one lease, as a sequence of contiguous segments.

    `address` is the owner's transport address, so that a receiver needs no directory;
    `compatibility` must equal the receiver's own hash (model, dtype, block size, layout).
    """

    owner: WorkerRef
    address: bytes
    lease_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,160}$")]
    compatibility: str
    segment_bytes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all segments together."""
        return sum(self.segment_bytes)


def embedding_lease_id(request_id: str, attempt: int, nonce: str) -> str:
    """The lease under which an encoder keeps an embedding for one attempt of a request."""
    return f"emb.{request_id}.{attempt}.{nonce}"


class EmbeddingRef(Message):
    """The embedding of one media item: `[num_tokens, hidden_size]` in the model's dtype.

    `tensor` may be pulled by whoever needs it, for as long as its owner keeps it. `held_lease_id`
    is a second lease of the same memory, opened for the attempt that asked for the embedding: until
    that one releases it, the owner keeps the embedding.
    """

    content_key: str
    num_tokens: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]
    tensor: TensorRef
    held_lease_id: str | None = None

    def held_for(self, request_id: str, attempt: int) -> TensorRef | None:
        """What this attempt has to release, if the embedding is kept for it."""
        held = self.held_lease_id
        if held is None or not held.startswith(embedding_lease_id(request_id, attempt, "")):
            return None
        return self.tensor.model_copy(update={"lease_id": held})


class EmbeddingClaim(Message):
    """The embedding of one media item is being made, for this attempt of a request.

    `encoder` is None until a worker has taken the task. The claim is void when the attempt is
    cancelled, over or late, or the encoder is gone.
    """

    content_key: str
    request_id: str
    attempt: Annotated[int, Field(ge=0)]
    deadline_unix_s: float
    encoder: WorkerRef | None = None


class KvRef(Message):
    """Keys and values of a prefilled sequence.

    `kv_len` holds one length per layer (compression may shorten some of them) and `next_pos` the
    rotary position of the next token, which multimodal positions and compression both detach from
    the length. Segment `g` holds layer group `g`: `[layers, 2, kv_len, kv_heads, head_dim]`.
    """

    tensor: TensorRef
    kv_len: Annotated[tuple[int, ...], Field(min_length=1)]
    next_pos: Annotated[int, Field(ge=0)]
