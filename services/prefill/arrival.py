"""A prompt's embeddings on their way here, and the word on each that has landed.

In: a job, and where embeddings come from. Out: the job's landing memory filled picture by picture;
how far it is filled decides what of the prompt can be computed. A picture counts when all of its
rows have landed, with every vector that a row carries.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch

from services.prefill.embeddings import EmbeddingReceiver
from services.prefill.job import PrefillJob
from shared.runtime.scope import unwrapped


class Arrival:
    """One job's. `on_landed` is called after each picture."""

    def __init__(
        self, receiver: EmbeddingReceiver, job: PrefillJob, on_landed: Callable[[], None]
    ) -> None:
        self._receiver = receiver
        self._job = job
        self._on_landed = on_landed

    @asynccontextmanager
    async def under_way(self, patience_s: float | None) -> AsyncIterator[None]:
        """Enter when all embeddings have landed, or after `patience_s`, and go on meanwhile.

        Raises `RequestFailed` in the middle of the block if one cannot be had. What has not come by
        its end is no longer awaited.
        """
        job, request = self._job, self._job.request
        self._receiver.skip(request, job.num_skipped)
        media = request.media[job.num_skipped :]
        if not media:
            yield
            return
        job.embeddings, rows = self._receiver.landing(media)
        job.missing = set(range(job.num_skipped, len(request.media)))
        with unwrapped():
            async with asyncio.TaskGroup() as scope:
                pictures = [
                    scope.create_task(self._land(number, into))
                    for number, into in enumerate(rows, job.num_skipped)
                ]
                await asyncio.wait(pictures, timeout=patience_s)
                yield
                for picture in pictures:
                    picture.cancel()

    async def _land(self, number: int, into: torch.Tensor) -> None:
        job = self._job
        await self._receiver.receive_item(job.request, job.request.media[number], into)
        job.missing.discard(number)
        self._on_landed()
