"""Where a tensor waits to be pulled: owner, lease and sizes; never the bytes."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from shared.messages.base import Message
from shared.messages.descriptor import MAX_UNITS, WorkerRef


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
    cancelled, over or late, or the encoder is gone. `num_patches` is the tower's work for it.
    """

    content_key: str
    request_id: str
    attempt: Annotated[int, Field(ge=0)]
    deadline_unix_s: float
    encoder: WorkerRef | None = None
    num_patches: Annotated[int, Field(ge=0)] = 0


class EmbeddingDivision(Message):
    """The embedding of one media item is made in so many parts, each under a key of its own.

    It says nothing of whether they are there: each part has an entry.
    """

    content_key: str
    num_parts: Annotated[int, Field(ge=2, le=MAX_UNITS)]


class KvPiece(NamedTuple):
    """Tokens `first_token .. last_token` of layers `first_layer .. last_layer`, ends excluded."""

    first_token: int
    last_token: int
    first_layer: int
    last_layer: int

    @property
    def num_tokens(self) -> int:
        """Tokens in it."""
        return self.last_token - self.first_token

    @property
    def layers(self) -> slice:
        """Its layers."""
        return slice(self.first_layer, self.last_layer)


Cut = Annotated[int, Field(ge=1)]


class KvRef(Message):
    """Keys and values of a prefilled sequence, in one or several pieces.

    `kv_len` holds one length per layer (compression may shorten some of them) and `next_pos` the
    rotary position of the next token, which multimodal positions and compression both detach from
    the length.

    `token_cuts` and `layer_cuts` divide tokens and layers where a new range begins. Segment `i` of
    the tensor is piece `i`, `[layers, 2, tokens, kv_heads, head_dim]`: all layers of the first
    range of tokens, then those of the second. A tensor that is exposed while its prompt is computed
    has one segment more (see `DecodeTask`).
    """

    tensor: TensorRef
    kv_len: Annotated[tuple[int, ...], Field(min_length=1)]
    next_pos: Annotated[int, Field(ge=0)]
    token_cuts: tuple[Cut, ...] = ()
    layer_cuts: tuple[Cut, ...] = ()

    @property
    def pieces(self) -> tuple[KvPiece, ...]:
        """The pieces in the order of their segments, which is that of their being computed."""
        return pieces_of(self.kv_len[0], len(self.kv_len), self.token_cuts, self.layer_cuts)

    @model_validator(mode="after")
    def _is_divided_into_pieces(self) -> KvRef:
        for name, cuts, end in (
            ("token_cuts", self.token_cuts, min(self.kv_len)),
            ("layer_cuts", self.layer_cuts, len(self.kv_len)),
        ):
            bounds = (0, *cuts, end)
            if cuts and any(low >= high for low, high in pairwise(bounds)):
                raise ValueError(f"{name}={cuts} do not rise from 0 to {end}")
        if self.token_cuts and len(set(self.kv_len)) > 1:
            raise ValueError("token_cuts divide layers of one length only")
        num_pieces = (len(self.token_cuts) + 1) * (len(self.layer_cuts) + 1)
        if len(self.tensor.segment_bytes) not in (num_pieces, num_pieces + 1):
            raise ValueError(f"{num_pieces} pieces and {len(self.tensor.segment_bytes)} segments")
        return self


def pieces_of(
    num_tokens: int, num_layers: int, token_cuts: tuple[int, ...], layer_cuts: tuple[int, ...]
) -> tuple[KvPiece, ...]:
    """Every group of layers of the first range of tokens, then those of the second."""
    return tuple(
        KvPiece(first_token, last_token, first_layer, last_layer)
        for first_token, last_token in pairwise((0, *token_cuts, num_tokens))
        for first_layer, last_layer in pairwise((0, *layer_cuts, num_layers))
    )
