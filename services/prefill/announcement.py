"""A prompt's decode task, queued while the prompt is being computed.

In: a job that is about to be computed. Out: a decoder that reserves memory and pulls each piece of
the KV as it is finished, or the news that none was told (the queue is full, say), and then the task
is queued when the prompt is computed. Nothing here makes a prompt wait.
"""

from __future__ import annotations

import asyncio
import logging

from services.prefill.exposure import KvExposer
from services.prefill.job import PrefillJob
from shared.bus.base import WorkQueue
from shared.errors import BusError
from shared.messages.work import DecodeTask
from shared.runtime.signal import Signal
from shared.telemetry import tracing
from shared.transport.base import Transport

logger = logging.getLogger(__name__)


class Announcement:
    """One job's. It must be withdrawn, or `confirmed` and left to its lease."""

    def __init__(
        self,
        job: PrefillJob,
        exposer: KvExposer,
        transport: Transport,
        decode_tasks: WorkQueue[DecodeTask],
        freed: Signal,
    ) -> None:
        self._job = job
        self._exposer = exposer
        self._transport = transport
        self._decode_tasks = decode_tasks
        self._freed = freed
        self._lease_id: str | None = None
        self._task = asyncio.create_task(
            self._announce(), name=f"announce {job.request.request_id}"
        )

    def withdraw(self) -> None:
        """The prompt will not go on from here. Idempotent."""
        self._task.cancel()
        self._job.progress.end()
        if self._lease_id is not None:
            self._transport.revoke(self._lease_id)

    async def confirmed(self) -> bool:
        """Whether the task is queued and the lease has the blocks; it is withdrawn if not."""
        if await self._task:
            return True
        self.withdraw()
        return False

    async def _announce(self) -> bool:
        job, request = self._job, self._job.request
        await job.begun.wait()
        assert job.blocks is not None
        kv = self._exposer.expose(
            job,
            job.blocks.share(),
            next_pos=job.prompt.next_pos,
            on_release=self._freed.notify,
            progress=job.progress,
        )
        self._lease_id = kv.tensor.lease_id
        task = DecodeTask(
            request=request, kv=kv, last_token_id=None, next_index=request.next_index + 1
        )
        try:
            # Not the id of a prompt that is queued when it is computed: if this one is computed
            # again elsewhere, its new task must not pass for a copy of this one.
            message_id = f"{request.request_id}:{request.attempt}:{self._lease_id}"
            await self._decode_tasks.put(task, message_id=message_id, headers=tracing.inject())
        except BusError as error:
            logger.info("%s is queued when it is computed: %s", request.request_id, error)
            return False
        return True
