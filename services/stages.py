"""The only module that knows all stages: from a set of stages to a running worker."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from services.decode.settings import DecodeSettings
from services.encoder.settings import EncoderSettings
from services.prefill.settings import PrefillSettings
from shared.errors import SettingsError
from shared.messages.control import Role
from shared.runtime.flags import flag
from shared.runtime.host import ModelFolder, Stage, serve_worker
from shared.runtime.language import Language, open_language
from shared.runtime.lifecycle import Stop, run_service
from shared.runtime.scope import unwrapped
from shared.runtime.settings import settings_or_exit
from shared.runtime.topology import Stages, parse_stages
from shared.runtime.worker import Worker
from shared.runtime.worker_settings import WorkerSettings

PACKAGES: Mapping[Role, tuple[str, type[WorkerSettings]]] = {
    Role.ENCODE: ("encoder", EncoderSettings),
    Role.PREFILL: ("prefill", PrefillSettings),
    Role.DECODE: ("decode", DecodeSettings),
}
"""Role -> (package under `services`, its settings class)."""


class HostSettings(DecodeSettings, PrefillSettings, EncoderSettings):
    """Runs any set of stages in one process; they share its weights, KV cache and connections.

    What several stages have a setting for, such as the memory for arriving tensors, each of them
    has to itself.
    """

    EXAMPLES: ClassVar[str] = (
        "examples:\n"
        "  triptych worker --stages prefill,decode --model Qwen/Qwen2.5-VL-3B-Instruct\n"
        "  triptych worker --stages encode,prefill --name worker-0"
    )

    stages: str = Field(
        ...,
        description="Stages of this process, divided by commas: encode, prefill, decode",
        json_schema_extra=flag("stages", "STAGE,..."),
    )
    max_held: int = Field(
        16,
        ge=1,
        description="Pictures that are encoded, and prompts that are prefilled, at the same time",
        json_schema_extra=flag("max-held", "TASKS"),
    )

    @field_validator("stages")
    @classmethod
    def _are_stages(cls, text: str) -> str:
        try:
            parse_stages(text)
        except SettingsError as error:
            raise ValueError(str(error).partition(": ")[2]) from None
        return text


class StageGroup:
    """Several stages of one process, run as one."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages

    async def run(self, stop: Stop) -> None:
        """Serve until a stop is requested; the first stage that fails ends all."""
        with unwrapped():
            async with asyncio.TaskGroup() as scope:
                for stage in self._stages:
                    scope.create_task(stage.run(stop))


def run_stage(role: Role, argv: Sequence[str] | None) -> None:
    """Run one worker of one stage until it is told to stop."""
    package, settings_class = PACKAGES[role]
    settings = settings_or_exit(settings_class, _given(argv), f"triptych {package}")
    _run((role,), settings)


def run_worker(argv: Sequence[str] | None) -> None:
    """Run one worker of the stages that it is told until it is told to stop."""
    settings = settings_or_exit(HostSettings, _given(argv), "triptych worker")
    _run(parse_stages(settings.stages), settings)


async def build_stages(worker: Worker, folder: ModelFolder, settings: WorkerSettings) -> Stage:
    """Load what the worker's stages need, once, and join them to it.

    `settings` are those of every stage that it hosts. Only their modules are imported.
    """
    language = await _language(worker, folder, settings)
    stages: list[Stage] = []
    for role in worker.stages:
        build = _builder(role)
        shared = () if role is Role.ENCODE else (language,)
        stages.append(await build(worker, folder, settings, *shared))
    return stages[0] if len(stages) == 1 else StageGroup(stages)


async def _language(
    worker: Worker, folder: ModelFolder, settings: WorkerSettings
) -> Language | None:
    if not {Role.PREFILL, Role.DECODE} & set(worker.stages):
        return None
    assert isinstance(settings, PrefillSettings | DecodeSettings)
    return await open_language(
        worker, folder, block_size=settings.block_size, kv_bytes=settings.kv_bytes
    )


def _run(stages: Stages, settings: WorkerSettings) -> None:
    run_service(lambda stop: serve_worker(stages, settings, build_stages, stop))


def _builder(role: Role) -> Callable[..., Awaitable[Stage]]:
    package, _ = PACKAGES[role]
    build: Callable[..., Awaitable[Stage]] = importlib.import_module(
        f"services.{package}.build"
    ).build
    return build


def _given(argv: Sequence[str] | None) -> Sequence[str]:
    return sys.argv[1:] if argv is None else argv
