"""Settings of `triptych planner`."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from services.planner.online.decision import Policy
from services.planner.online.load import Targets
from shared.messages.control import Role
from shared.runtime.flags import flag
from shared.runtime.settings import Group, ModelSettings
from shared.runtime.worker_settings import EndpointSettings


class TargetSettings(Group):
    """What counts as busy enough."""

    encode_depth: float = Field(
        4.0, gt=0, description="Pictures queued or at work at a full encode worker"
    )
    prefill_depth: float = Field(
        4.0, gt=0, description="Prompts queued or at work at a full prefill worker"
    )
    decode_depth: float = Field(
        16.0, gt=0, description="Answers queued or at work at a full decode worker"
    )
    wait_s: float = Field(1.0, gt=0, description="Seconds that a task may wait in a queue")


class SwitchSettings(Group):
    """When the planner acts."""

    high_load: float = Field(
        1.5, ge=1, description="Load above which a stage needs help; 1 is as it should be"
    )
    gain: float = Field(
        0.75,
        gt=0,
        lt=1,
        description="A switch must bring the highest load down to this share of it",
    )
    hold_s: float = Field(5.0, ge=0, description="Seconds that a load has to last")
    cooldown_s: float = Field(
        30.0, ge=0, description="Seconds from one switch to the next, and before fewer are advised"
    )
    max_switches: int = Field(6, ge=1, le=1000, description="Most switches in a window")
    window_s: float = Field(600.0, gt=0, description="Seconds of that window")


class PlannerSettings(EndpointSettings):
    """Watches a running system and switches workers to the stages that need them."""

    EXAMPLES: ClassVar[str] = (
        "examples:\n"
        "  triptych planner --nats-url nats://10.0.0.5:4222 --served-name triptych-demo\n"
        "  triptych planner --advise --metrics-port 9101   only say how many would be right"
    )

    model: ModelSettings = ModelSettings()
    targets: TargetSettings = TargetSettings()
    switches: SwitchSettings = SwitchSettings()
    advise: bool = Field(
        False, description="Switch nothing; publish the wanted number of workers as a metric"
    )
    max_workers: int = Field(64, ge=1, description="Most workers of a stage that are advised")
    interval_s: float = Field(1.0, gt=0, description="Seconds from one look to the next")
    registration_ttl_s: float = Field(
        6.0,
        gt=0,
        description="Seconds of silence after which a worker counts as dead",
        json_schema_extra=flag("registration-ttl-s", "SECONDS"),
    )

    @model_validator(mode="after")
    def _advises_somebody(self) -> Self:
        if self.advise and not self.metrics_port:
            raise ValueError("--advise needs --metrics-port: the metric is all that it gives")
        return self

    @property
    def policy(self) -> Policy:
        """The settings as the decisions take them."""
        targets, switches = self.targets, self.switches
        depths = {
            Role.ENCODE: targets.encode_depth,
            Role.PREFILL: targets.prefill_depth,
            Role.DECODE: targets.decode_depth,
        }
        return Policy(targets=Targets(depths, targets.wait_s), **switches.model_dump())
