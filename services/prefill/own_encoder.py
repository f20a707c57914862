"""The encoder of this process, asked for a prompt's picture where it is quicker than the queue."""

from __future__ import annotations

from collections.abc import Callable, Collection

from services.prefill.local_encode import EncodeLoad, encodes_here, patches_ahead
from shared.messages.descriptor import WorkerRef
from shared.messages.work import EncodeTask
from shared.runtime.embedding_index import EmbeddingIndex
from shared.runtime.local_encoder import LocalEncoder


class OwnEncoder:
    """`encoders` are those that live, in whatever process."""

    def __init__(
        self,
        encoder: LocalEncoder,
        index: EmbeddingIndex,
        me: WorkerRef,
        encoders: Callable[[], Collection[WorkerRef]],
    ) -> None:
        self._encoder = encoder
        self._index = index
        self._me = me
        self._encoders = encoders

    def is_quicker(self, content_key: str, num_patches: int) -> bool:
        """Whether to have it made here; not if an encoder is at it already."""
        claim = self._index.claim_of(content_key)
        if not self._encoder.is_open or (claim is not None and claim.encoder is not None):
            return False
        encoders = self._encoders()
        return encodes_here(
            EncodeLoad(
                item_patches=num_patches,
                ahead_patches=patches_ahead(self._index.claims(), content_key),
                here_patches=self._encoder.num_held_patches,
                num_others=sum(each != self._me for each in encoders),
                is_served_here=self._me in encoders,
            )
        )

    async def encode(self, task: EncodeTask) -> None:
        """Make it, or find that another encoder has begun. Raises `RequestFailed`."""
        await self._encoder.encode_now(task)
