"""The three stages called one after the other in one process, without bus or transport.

The reference that every topology must agree with, and the floor that the distributed path is
measured against. It runs the very executors of the services, one request at a time, over one KV
cache; prefill and decode share the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from services.decode.executor import DecodeExecutor
from services.decode.sequence import Sequence as RunningSequence
from services.encoder.build import load_executor as load_encoder
from services.encoder.executor import EncodeExecutor
from services.encoder.preprocess import open_preprocessor
from services.prefill.executor import PrefillExecutor, PromptInput
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import RequestFailed
from shared.media.picture import PictureLimits
from shared.messages.descriptor import RequestDescriptor
from shared.messages.events import FailedEvent, TokenEvent
from shared.model.grammar import Grammars
from shared.model.sampling_row import SamplingState
from shared.runtime.host import ModelFolder
from shared.runtime.language import load_language
from shared.runtime.step_guard import not_a_number


class LocalEngine:
    """One model, one process, one request at a time."""

    def __init__(self, folder: ModelFolder, *, block_size: int = 16, num_blocks: int = 512) -> None:
        model, kv = load_language(folder, block_size, num_blocks)
        self._pool = BlockPool(num_blocks, block_size)
        self._prefill = PrefillExecutor(model, kv, folder.spec)
        self._decode = DecodeExecutor(model, kv)
        self._grammars = Grammars(folder.directory, folder.spec)
        self._encoder: EncodeExecutor | None = None
        if folder.spec.has_tower:
            self._encoder = load_encoder(folder)
            self._preprocess = open_preprocessor(folder.directory, PictureLimits())

    def generate(self, request: RequestDescriptor, pictures: Sequence[bytes]) -> Iterator[int]:
        """The token ids of the answer, one by one, without the stop token."""
        embeddings = self._encode(pictures) if pictures else None
        num_blocks = -(-request.max_context_tokens // self._pool.block_size)
        with self._pool.allocate(num_blocks) as blocks:
            yield from self._answer(request, embeddings, blocks)

    def _encode(self, pictures: Sequence[bytes]) -> torch.Tensor:
        assert self._encoder is not None, "a text-only model was given pictures"
        return torch.cat(self._encoder.run([self._preprocess(data) for data in pictures]))

    def _answer(
        self, request: RequestDescriptor, embeddings: torch.Tensor | None, blocks: BlockHandle
    ) -> Iterator[int]:
        prompt = self._prefill.prepare(request, self._grammars.open(request))
        (first,) = self._prefill.run([PromptInput(prompt, embeddings, blocks.block_ids)])
        if first is None:
            raise not_a_number("prefill")
        if first.token_id in request.sampling.stop_token_ids:
            return
        yield first.token_id
        sequence = RunningSequence(
            request_id=request.request_id,
            attempt=request.attempt,
            gateway=request.gateway,
            sampling=request.sampling,
            state=SamplingState.of(
                request, self._grammars.open(request, first.token_id), first.token_id
            ),
            blocks=blocks,
            kv_len=request.num_tokens,
            next_pos=first.next_pos,
            last_token_id=first.token_id,
            next_index=request.next_index + 1,
        )
        while sequence.next_index < request.sampling.max_tokens:
            (token,) = self._decode.run([sequence])
            if token is None:
                raise not_a_number("decode")
            event = sequence.append(token)[0]
            if isinstance(event, FailedEvent):
                raise RequestFailed(event.kind, event.message)
            if not isinstance(event, TokenEvent):
                return
            yield event.token_id
