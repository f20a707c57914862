"""Settings that encode, prefill and decode workers share, some of them with other services."""

from __future__ import annotations

from pydantic import ByteSize, Field

from shared.runtime.flags import flag
from shared.runtime.settings import ComputeSettings, Group, ModelSettings, ServiceSettings

MIB = 1024 * 1024


class TransferSettings(Group):
    """Tensor transfer."""

    lease_s: float = Field(
        30.0,
        gt=0,
        description="Seconds for which an exposed tensor is kept without a sign of its consumer",
        json_schema_extra=flag("lease-s", "SECONDS"),
    )
    pull_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Seconds after which a transfer that did not end counts as failed",
        json_schema_extra=flag("pull-timeout-s", "SECONDS"),
    )


class GraphSettings(Group):
    """CUDA graphs, on a GPU: steps that are recorded at the start and launched as a whole."""

    memory_bytes: ByteSize = Field(
        ByteSize(2048 * MIB),
        ge=0,
        description="On a GPU: memory for CUDA graphs of each stage; 0: none",
        json_schema_extra=flag("graph-bytes", "BYTES"),
    )
    context_tokens: int = Field(
        8192,
        ge=1,
        description="On a GPU: steps with a longer context run without a graph",
        json_schema_extra=flag("graph-context-tokens", "TOKENS"),
    )
    prompt_tokens: int = Field(
        1024,
        ge=0,
        description="On a GPU: forward passes over more prompt tokens run without a graph, which "
        "saves them little; 0: all",
        json_schema_extra=flag("graph-prompt-tokens", "TOKENS"),
    )


class EndpointSettings(ServiceSettings):
    """A service that is watched over HTTP."""

    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of the /metrics and /health endpoint; 0: none",
        json_schema_extra=flag("metrics-port", "PORT"),
    )
    metrics_host: str = Field(
        "127.0.0.1",
        description="Address that the /metrics and /health endpoint listens on",
        json_schema_extra=flag("metrics-host", "HOST"),
    )


class WorkerSettings(EndpointSettings):
    """A worker of one stage."""

    model: ModelSettings = ModelSettings()
    compute: ComputeSettings = ComputeSettings()
    transfer: TransferSettings = TransferSettings()
    block_size: int = Field(
        16,
        ge=1,
        le=1024,
        description="Tokens in one KV block; the same for every worker of a model",
        json_schema_extra=flag("block-size", "TOKENS"),
    )
    core_lock: str = Field(
        "",
        max_length=1024,
        description="Workers that name the same file here share CPU cores and compute on them one "
        "after the other, in small steps; empty: on its own",
        json_schema_extra=flag("core-lock", "FILE"),
    )
    drain_s: float = Field(
        20.0,
        ge=0,
        description="Seconds that running work has to finish after a stop was asked for",
        json_schema_extra=flag("drain-s", "SECONDS"),
    )
    switch_finish_s: float = Field(
        1.0,
        ge=0,
        description="Seconds that begun work has to finish before a change of role moves it to "
        "other workers; answers that would take longer move at once",
        json_schema_extra=flag("switch-finish-s", "SECONDS"),
    )
    registration_ttl_s: float = Field(
        6.0,
        gt=0,
        description="Seconds of silence after which this worker counts as dead",
        json_schema_extra=flag("registration-ttl-s", "SECONDS"),
    )


def bytes_field(default_bytes: int, name: str, description: str) -> ByteSize:
    """A setting that takes `512MiB` as well as `536870912`."""
    field: ByteSize = Field(
        ByteSize(default_bytes),
        ge=1,
        description=description,
        json_schema_extra=flag(name, "BYTES"),
    )
    return field
