"""All three stages over the in-memory bus and the loopback transport, on one or more workers."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from services.decode.settings import DecodeSettings
from services.encoder.settings import EncoderSettings
from services.prefill.settings import PrefillSettings
from services.stages import HostSettings, build_stages
from shared.bus import subjects
from shared.bus.base import Bus, Headers
from shared.bus.memory_bus import MemoryBus
from shared.bus.memory_hub import MemoryHub
from shared.messages.codec import encode
from shared.messages.control import CancelRequest, Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams, WorkerRef
from shared.messages.events import Event, EventBatch, TokenEvent
from shared.messages.refs import EmbeddingRef
from shared.messages.work import EncodeTask, PrefillTask
from shared.runtime.host import ModelFolder, Stage, core_turns, open_worker
from shared.runtime.lifecycle import Stop
from shared.runtime.settings import ModelSettings
from shared.runtime.topology import name_of, parse_topology
from shared.runtime.worker import Worker
from shared.runtime.worker_settings import WorkerSettings
from shared.text.prompt import Prompt
from shared.transport.base import Segment
from shared.transport.loopback import LoopbackNetwork, LoopbackTransport

MODEL = "test-model"
GATEWAY = WorkerRef(name="gateway", incarnation=1)
MEDIA = {"ttl_s": 600.0, "max_bytes": 64 * 1024 * 1024}
_numbers = itertools.count(1)


def greedy_request(prompt: Prompt, name: str, *, max_tokens: int) -> RequestDescriptor:
    """A prompt as a gateway would send it, with all the time in the world."""
    return RequestDescriptor(
        request_id=name,
        attempt=0,
        gateway=GATEWAY,
        model=MODEL,
        prompt_token_ids=prompt.token_ids,
        media=prompt.media,
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        created_unix_s=0.0,
        deadline_unix_s=4e9,
    )


@dataclass
class Pipeline:
    """The running stages and what a gateway would see of them."""

    bus: Bus
    folder: ModelFolder
    workers: dict[Role, Worker] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    everyone: list[Worker] = field(default_factory=list)
    events: dict[str, list[Event]] = field(default_factory=dict)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def on_batch(self, batch: EventBatch, headers: Headers) -> None:
        """What the gateway hears."""
        async with self.arrived:
            for event in batch.events:
                self.events.setdefault(event.request_id, []).append(event)
            self.arrived.notify_all()

    async def announce_gone(self, request: RequestDescriptor) -> None:
        """Announce embeddings for this request whose lease no longer exists."""
        encoder = self.workers[Role.ENCODE]
        bucket = await self.bus.key_value(
            subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S
        )
        hidden_size = self.folder.spec.text.hidden_size
        for item in request.media:
            memory = bytes(4 * item.num_tokens * hidden_size)
            tensor = encoder.transport.expose(
                f"emb.{request.request_id}.gone.{item.content_key[:8]}",
                [Segment(len(memory), lambda memory=memory: memory)],
                holders=["nobody"],
                on_release=lambda: None,
            )
            encoder.transport.revoke(tensor.lease_id)
            ref = EmbeddingRef(
                content_key=item.content_key,
                num_tokens=item.num_tokens,
                hidden_size=hidden_size,
                tensor=tensor,
            )
            await bucket.put(item.content_key, encode(ref))

    async def submit(
        self, request: RequestDescriptor, pictures: Sequence[bytes], *, with_encode: bool = True
    ) -> None:
        """What the gateway's dispatch does; without `with_encode` no encode task is queued."""
        media = await self.bus.object_store(subjects.MEDIA_BUCKET, **MEDIA)
        for data in pictures:
            await media.put(hashlib.sha256(data).hexdigest(), data)
        encode_tasks = await self.bus.work_queue(subjects.work(Role.ENCODE, MODEL), EncodeTask)
        for item in request.media if with_encode else ():
            task = EncodeTask(
                request_id=request.request_id,
                attempt=request.attempt,
                gateway=request.gateway,
                model=request.model,
                item=item,
                deadline_unix_s=request.deadline_unix_s,
            )
            await encode_tasks.put(task, message_id=f"e{next(_numbers)}")
        prefill = await self.bus.work_queue(subjects.work(Role.PREFILL, MODEL), PrefillTask)
        await prefill.put(PrefillTask(request=request), message_id=f"p{next(_numbers)}")

    async def cancel(self, request_id: str, attempt: int = 0) -> None:
        """What the gateway does when a client went away."""
        message = CancelRequest(request_id=request_id, attempt=attempt)
        await self.bus.publish(subjects.CANCEL, message)

    async def end_of(self, request_id: str, timeout_s: float = 30.0) -> list[Event]:
        """All events of a request, once its terminal one is there."""

        def ended() -> bool:
            events = self.events.get(request_id, [])
            return bool(events) and not isinstance(events[-1], TokenEvent)

        async with asyncio.timeout(timeout_s), self.arrived:
            await self.arrived.wait_for(ended)
        await self.cancel(request_id)  # as the gateway does at every end
        return self.events[request_id]

    async def tokens_of(self, request_id: str) -> list[int]:
        """The answer's token ids; their indices must be complete and in order."""
        events = await self.end_of(request_id)
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        assert [event.index for event in tokens] == list(range(len(tokens)))
        return [event.token_id for event in tokens]

    async def settled(self, timeout_s: float = 5.0) -> None:
        """Wait until every lease is released and every KV block is free; fail if that never is."""
        give_up_at = time.monotonic() + timeout_s
        while (left := self.left_over()) and time.monotonic() < give_up_at:
            await asyncio.sleep(0.01)
        assert not left, f"left over: {left}"

    def left_over(self) -> dict[str, float]:
        """What is still held, by worker."""
        held: dict[str, float] = {}
        for worker in self.everyone:
            role = worker.stages[0]
            open_leases = worker.transport.counters().leases_open
            if open_leases:
                held[f"{role.value} leases"] = open_leases
            for family in worker.registry.collect():
                if family.name == "triptych_kv_cache_usage_perc":
                    held |= {f"{role.value} KV": s.value for s in family.samples if s.value}
        return held


@asynccontextmanager
async def running_pipeline(
    folder: ModelFolder,
    *,
    encoder: EncoderSettings | None = None,
    prefill: PrefillSettings | None = None,
    decode: DecodeSettings | None = None,
    lease_s: float = 30.0,
    topology: str = "1E 1P 1D",
    hosts: dict[str, object] | None = None,
) -> AsyncIterator[Pipeline]:
    """The workers of a topology; they drain at the end of the block.

    Workers of one stage take that stage's settings; those of several take `hosts`, changes of the
    defaults. `Pipeline.workers` holds the last worker of each stage.
    """
    model = ModelSettings(served_name=MODEL)
    settings: dict[Role, WorkerSettings] = {
        Role.ENCODE: encoder or EncoderSettings(model=model, drain_s=1.0),
        Role.PREFILL: prefill or PrefillSettings(model=model, drain_s=1.0),
        Role.DECODE: decode or DecodeSettings(model=model, drain_s=1.0),
    }
    hub, network, stop = MemoryHub(), LoopbackNetwork(), Stop()
    async with AsyncExitStack() as scope:
        bus = MemoryBus(hub)
        scope.push_async_callback(bus.close)
        pipeline = Pipeline(bus, folder)
        await bus.subscribe(subjects.events(GATEWAY), EventBatch, pipeline.on_batch)
        for stages in parse_topology(topology):
            each = settings[stages[0]]
            if len(stages) > 1:
                changes = {"model": model, "drain_s": 1.0, **(hosts or {})}
                each = HostSettings(stages=",".join(stages), **changes)  # type: ignore[arg-type]
            # Two workers of one name would be two lives of one worker.
            num_alike = sum(worker.stages == stages for worker in pipeline.everyone)
            name = f"{name_of(stages)}-{num_alike}" if num_alike else name_of(stages)
            me = WorkerRef(name=name, incarnation=next(_numbers))
            compatibility = folder.geometry(each.block_size).compatibility_hash("test")
            transport = await scope.enter_async_context(
                LoopbackTransport(network, me, compatibility, lease_s=lease_s)
            )
            worker = await scope.enter_async_context(
                open_worker(
                    me, stages, each, MemoryBus(hub), transport, core_turns(each, folder.device)
                )
            )
            pipeline.workers |= dict.fromkeys(stages, worker)
            pipeline.everyone.append(worker)
            pipeline.stages.append(await build_stages(worker, folder, each))
        async with asyncio.TaskGroup() as tasks:
            for stage in pipeline.stages:
                tasks.create_task(stage.run(stop))
            yield pipeline
            stop.request("the test is over")
