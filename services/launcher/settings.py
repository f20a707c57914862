"""Settings of `triptych up` and `triptych demo`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.errors import SettingsError
from shared.messages.control import Role
from shared.runtime.access import AccessSettings
from shared.runtime.flags import flag
from shared.runtime.settings import ModelSettings, ServiceSettings, TelemetrySettings
from shared.runtime.topology import Stages, parse_topology

COUNTS = {"encoders": Role.ENCODE, "prefills": Role.PREFILL, "decodes": Role.DECODE}
"""Settings that count workers of one stage each."""


class LauncherSettings(ServiceSettings):
    """Starts a NATS server, one gateway and the workers on this machine, and watches over them.

    The processes inherit TRIPTYCH_* variables, so a setting of theirs can be given that way.
    """

    EXAMPLES: ClassVar[str] = """\
examples:
  triptych up                                  the demo model on port 8000
  triptych up --model DIR --decodes 2          a model of yours, two decode workers
  triptych up --topology "1EP 2D"              encode and prefill share a process
  triptych up --nats-url nats://10.0.0.5:4222  join a NATS server that already runs
  triptych up --data-dir /var/lib/triptych     keep queued work across restarts
  TRIPTYCH_MAX_BATCH=8 triptych up             a setting of the workers: they read TRIPTYCH_*"""

    model: ModelSettings = ModelSettings()
    # What the children say at info level is for their log; the terminal shows what needs a reader.
    telemetry: TelemetrySettings = TelemetrySettings(log_level="warning")
    access: AccessSettings = AccessSettings()
    host: str = Field("127.0.0.1", min_length=1, description="Address that the gateway listens on")
    port: int = Field(
        8000, ge=0, le=65535, description="Port that the gateway listens on; 0: any free one"
    )
    encoders: int = Field(1, ge=0, le=64, description="Encode workers")
    prefills: int = Field(1, ge=1, le=64, description="Prefill workers")
    decodes: int = Field(1, ge=1, le=64, description="Decode workers")
    topology: str = Field(
        "",
        description="Workers by the stages that share a process, such as '2E 1PD' or '1EPD'; "
        "instead of --encoders, --prefills and --decodes",
        json_schema_extra=flag("topology", "WORKERS"),
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of each worker; 0: this machine's cores divided among them, "
        "two at least where there are two",
        json_schema_extra=flag("threads", "COUNT"),
    )
    pin: Literal["auto", "none"] = Field(
        "auto",
        description="auto: where there are cores enough, each worker stays on some of its own",
        json_schema_extra=flag("pin"),
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 keeps the language model's weights in 8 bits, one scale per output",
        json_schema_extra=flag("quantization"),
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65000,
        description="Port of the first worker's /metrics, the others' count up from it; 0: none",
    )
    data_dir: Path | None = Field(
        None,
        description="Folder for queued work and media; without one it ends with the command",
        json_schema_extra=flag("data-dir", "DIR"),
    )
    ready_timeout_s: float = Field(
        900.0, gt=0, description="Seconds until the start counts as failed"
    )
    drain_s: float = Field(
        20.0, ge=0, description="Seconds for requests in flight to end before processes are killed"
    )

    @field_validator("topology")
    @classmethod
    def _is_a_topology(cls, text: str) -> str:
        try:
            parse_topology(text or "1P 1D")
        except SettingsError as error:
            raise ValueError(str(error).partition(": ")[2]) from None
        return text

    @model_validator(mode="after")
    def _counts_once(self) -> Self:
        given = [
            f"--{name} = {getattr(self, name)}" for name in COUNTS if name in self.model_fields_set
        ]
        if self.topology and given:
            raise ValueError(
                f"--topology = {self.topology!r} and {', '.join(given)}: give one or the other"
            )
        return self

    @property
    def workers(self) -> tuple[Stages, ...]:
        """The stages of each worker, the first stage's first."""
        if self.topology:
            return parse_topology(self.topology)
        return tuple((role,) for name, role in COUNTS.items() for _ in range(getattr(self, name)))

    @property
    def num_workers(self) -> int:
        return len(self.workers)

    @property
    def starts_nats(self) -> bool:
        """Whether nobody named a NATS server, so that the launcher runs its own."""
        return "url" not in self.bus.model_fields_set
