"""Workers change their roles under load: every answer is that of one process, nothing is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

from bench.prompts import PromptMaker
from services.encoder.executor import EncodeExecutor
from services.local_engine import LocalEngine
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams
from shared.runtime import language
from shared.runtime.host import ModelFolder
from shared.runtime.role_rules import RefusalKind, SwitchRefused
from tests.support.demo_engine import plates
from tests.support.parts import ask, pictures_of
from tests.support.roles import Hosts, running_hosts
from tests.support.stages import GATEWAY, MODEL

pytestmark = pytest.mark.timeout(300)


def make(
    prompts: PromptMaker, name: str, pictures: list[bytes], *, max_tokens: int
) -> RequestDescriptor:
    sampling = SamplingParams(temperature=0.7, seed=5, max_tokens=max_tokens)
    made = prompts.request(pictures, f"What is this? ({name})", sampling)
    return made.model_copy(update={"request_id": name, "gateway": GATEWAY, "model": MODEL})


async def started(system: Hosts, names: list[str], num_tokens: int) -> None:
    """Wait until some of these answers are in the middle of their decoding."""
    async with system.arrived:
        await system.arrived.wait_for(
            lambda: any(len(system.events.get(name, ())) >= num_tokens for name in names)
        )


async def decoding(system: Hosts, name: str) -> None:
    """Wait until this worker has answers in the middle of their decoding."""
    while not system.num_running(name, "decode"):
        await asyncio.sleep(0.001)


def num_moved(system: Hosts) -> int:
    return sum(t.counters().transfers_sent for t in system.transports.values())


async def test_a_decoder_becomes_prefill_and_comes_back_under_load(
    folder: ModelFolder,
    engine: LocalEngine,
    prompts: PromptMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its running answers go on elsewhere with their KV, and the weights are read once a worker."""
    loads: list[object] = []
    load = language.load_language_model

    def counted(*args: object, **options: object) -> object:
        loads.append(args)
        return load(*args, **options)

    monkeypatch.setattr(language, "load_language_model", counted)
    requests = {f"r{n}": make(prompts, f"r{n}", [], max_tokens=60) for n in range(12)}
    async with running_hosts(
        folder, "2P 2D", switch_finish_s=0.0, max_batch=4, kv_bytes="16MiB"
    ) as system:
        await asyncio.gather(*(system.submit(each, []) for each in requests.values()))
        await decoding(system, "w3")
        there = await system.switch("w3", "prefill")
        assert (there.before, there.after) == ((Role.DECODE,), (Role.PREFILL,))
        back = await system.switch("w3", "decode")
        assert back.after == (Role.DECODE,)
        answers = {name: await system.tokens_of(name) for name in requests}
        assert num_moved(system) > len(requests)  # beside each prefill's KV, some decoder's
        await system.settled()
    assert len(loads) == 4
    for name, request in requests.items():
        assert answers[name] == list(engine.generate(request, [])), name


@pytest.mark.parametrize(
    ("topology", "name", "role"),
    [
        ("2E 1P 1D", "w0", "D"),
        ("1E 2P 1D", "w2", "E"),
        ("1E 2PD", "w2", "E"),
        ("2E 1PD", "w1", "P"),
    ],
)
async def test_other_switches_lose_and_change_nothing(
    topology: str,
    name: str,
    role: str,
    folder: ModelFolder,
    engine: LocalEngine,
    prompts: PromptMaker,
    caplog: pytest.LogCaptureFixture,
) -> None:
    jobs = {f"r{n}": plates(n, n % 3) for n in range(9)}
    requests = {k: make(prompts, k, pictures, max_tokens=24) for k, pictures in jobs.items()}
    async with running_hosts(folder, topology, switch_finish_s=0.3, kv_bytes="16MiB") as system:
        await asyncio.gather(*(system.submit(requests[k], jobs[k]) for k in jobs))
        await started(system, list(jobs), 1)
        await system.switch(name, role)
        answers = {k: await system.tokens_of(k) for k in jobs}
        await system.settled()
    assert "nobody announced it" not in caplog.text, "what an encoder hands back is taken at once"
    for k, pictures in jobs.items():
        assert answers[k] == list(engine.generate(requests[k], pictures)), k


async def test_a_prefill_worker_leaves_in_the_middle_of_its_early_work(
    folder: ModelFolder,
    engine: LocalEngine,
    prompts: PromptMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts that it began, and whose pictures are still being encoded, are computed elsewhere."""
    run = EncodeExecutor.run

    def slowly(executor: EncodeExecutor, pixels: Sequence[Any]) -> Any:
        time.sleep(0.2 * len(pixels))
        return run(executor, pixels)

    monkeypatch.setattr(EncodeExecutor, "run", slowly)
    jobs = {f"r{n}": [f"{n} What is this? " * 30, *plates(n, 2), "And?"] for n in range(4)}
    requests = {
        name: ask(prompts, name, parts, temperature=0.7, seed=5) for name, parts in jobs.items()
    }
    async with running_hosts(
        folder, "1E 2P 1D", kv_bytes="16MiB", min_early_tokens=16, max_batch_patches=1
    ) as system:
        await asyncio.gather(
            *(system.submit(requests[name], pictures_of(parts)) for name, parts in jobs.items())
        )
        while not num_early(system, "w1"):
            await asyncio.sleep(0.001)
        assert not any(system.events.values()), "all pictures are still being encoded"
        switched = await system.switch("w1", "decode")
        assert switched.after == (Role.DECODE,)
        answers = {name: await system.tokens_of(name) for name in jobs}
        await system.settled()
    for name, parts in jobs.items():
        assert answers[name] == list(engine.generate(requests[name], pictures_of(parts))), name


def num_early(system: Hosts, name: str) -> float:
    """Prompt tokens that a worker has computed before their pictures were there."""
    registry = system.hosts[name].registry
    return registry.get_sample_value("triptych_prompt_tokens_early_total") or 0.0


async def test_a_switch_that_cannot_be_is_refused_and_changes_nothing(
    folder: ModelFolder, prompts: PromptMaker
) -> None:
    async with running_hosts(folder, "1P 2D", has_tower=False, kv_bytes="16MiB") as system:
        for name, role, kind in (
            ("w9", "decode", RefusalKind.UNKNOWN_WORKER),
            ("w0", "decode", RefusalKind.LEAVES_UNSERVED),
            ("w1", "encode", RefusalKind.MISSING_PART),
            ("w1", "gateway", RefusalKind.UNKNOWN_ROLE),
        ):
            with pytest.raises(SwitchRefused) as refused:
                await system.switch(name, role)
            assert refused.value.kind is kind
        outcomes = await asyncio.gather(
            system.switch("w1", "PD"), system.switch("w1", "P"), return_exceptions=True
        )
        refusals = [each for each in outcomes if isinstance(each, SwitchRefused)]
        assert [each.kind for each in refusals] == [RefusalKind.IN_PROGRESS]
        assert all(each.ready for each in system.registered())
        forced = await system.switch("w0", "decode", force=True)
        assert forced.after == (Role.DECODE,)


async def test_stages_that_cannot_be_built_leave_the_old_ones_at_work(
    folder: ModelFolder, prompts: PromptMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_hosts(folder, "1P 2D", kv_bytes="16MiB") as system:
        monkeypatch.setattr(
            "services.encoder.build.load_executor", lambda _: (_ for _ in ()).throw(MemoryError())
        )
        with pytest.raises(SwitchRefused, match="encode cannot be built: MemoryError") as refused:
            await system.switch("w2", "encode")
        assert refused.value.kind is RefusalKind.FAILED
        registered = {each.worker.name: each for each in system.registered()}
        assert registered["w2"].ready
        assert registered["w2"].stages == (Role.DECODE,)
        request = make(prompts, "after", [], max_tokens=4)
        await system.submit(request, [])
        assert await system.tokens_of("after")
