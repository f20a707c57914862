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
from shared.runtime.host import ModelFolder, serve_worker
from shared.runtime.language import Language, keep_language, open_language
from shared.runtime.lifecycle import Stop, run_service
from shared.runtime.scope import unwrapped
from shared.runtime.settings import load_settings, settings_or_exit
from shared.runtime.topology import Stages, name_of, parse_stages
from shared.runtime.worker import Stage, Worker
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


class StageBuilder:
    """Builds the stages of one process, in one role after the other.

    The language model and its KV cache are kept as long as each role uses them; they have the size
    that the first such role asked for.
    """

    def __init__(self) -> None:
        self._language: Language | None = None

    async def __call__(
        self, worker: Worker, folder: ModelFolder, settings: WorkerSettings
    ) -> Stage:
        """Load what the worker's stages need and the process has not, and join them to it.

        `settings` are those that the process was started with. Only the stages' modules are
        imported.
        """
        settings = settings_in_role(worker.stages, settings)
        self._language = await self._open_language(worker, folder, settings)
        built: dict[Role, Stage] = {}
        for role in worker.stages:
            shared: dict[Role, tuple[object, ...]] = {
                # Encode comes first; its stage is what prefill may ask past the queue.
                Role.PREFILL: (self._language, built.get(Role.ENCODE)),
                Role.DECODE: (self._language,),
            }
            build = _builder(role)
            built[role] = await build(worker, folder, settings, *shared.get(role, ()))
        stages = list(built.values())
        return stages[0] if len(stages) == 1 else StageGroup(stages)

    async def _open_language(
        self, worker: Worker, folder: ModelFolder, settings: WorkerSettings
    ) -> Language | None:
        if not {Role.PREFILL, Role.DECODE} & set(worker.stages):
            return None
        if self._language is not None:
            return await keep_language(worker, self._language)
        assert isinstance(settings, PrefillSettings | DecodeSettings)
        return await open_language(
            worker, folder, block_size=settings.block_size, kv_bytes=settings.kv_bytes
        )


async def build_stages(worker: Worker, folder: ModelFolder, settings: WorkerSettings) -> Stage:
    """The stages of a worker that keeps its role."""
    return await StageBuilder()(worker, folder, settings)


def settings_in_role(stages: Stages, started_with: WorkerSettings) -> WorkerSettings:
    """The settings of a role: what the process was given for it, by flag, variable or file.

    A process of one stage knows no flags of another's: their variables and defaults hold. Raises
    `SettingsError`.
    """
    if isinstance(started_with, HostSettings):
        return started_with.model_copy(update={"stages": ",".join(stages)})
    wanted = PACKAGES[stages[0]][1] if len(stages) == 1 else HostSettings
    if isinstance(started_with, wanted):
        return started_with
    argv = ["--stages", ",".join(stages)] if wanted is HostSettings else []
    changed = load_settings(wanted, argv, f"triptych {name_of(stages)}")
    given = {
        name: getattr(started_with, name)
        for name in started_with.model_fields_set & set(wanted.model_fields)
    }
    return changed.model_copy(update=given)


def _run(stages: Stages, settings: WorkerSettings) -> None:
    run_service(lambda stop: serve_worker(stages, settings, StageBuilder(), stop))


def _builder(role: Role) -> Callable[..., Awaitable[Stage]]:
    package, _ = PACKAGES[role]
    build: Callable[..., Awaitable[Stage]] = importlib.import_module(
        f"services.{package}.build"
    ).build
    return build


def _given(argv: Sequence[str] | None) -> Sequence[str]:
    return sys.argv[1:] if argv is None else argv
