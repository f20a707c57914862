"""Settings of `triptych profile`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import ByteSize, Field

from shared.runtime.flags import flag
from shared.runtime.settings import ComputeSettings, ModelSettings, ServiceSettings
from shared.runtime.worker_settings import MIB, bytes_field


class ProfileSettings(ServiceSettings):
    """Measures how long steps of a model and hops between processes take on this machine.

    Nothing else should run meanwhile. Without --nats-url it starts a NATS server of its own.
    """

    EXAMPLES: ClassVar[str] = (
        "examples:\n"
        "  triptych profile --model DIR --out profile.json\n"
        "  triptych plan --profile profile.json --trace day.jsonl --slo ttft=2,tpot=0.05"
    )

    model: ModelSettings = ModelSettings()
    compute: ComputeSettings = ComputeSettings()
    out: Path = Field(
        Path("profile.json"),
        description="File that the profile is written to",
        json_schema_extra=flag("out", "FILE"),
    )
    repeats: int = Field(
        5, ge=1, le=1000, description="How often each step is measured; the median counts"
    )
    max_tokens: int = Field(
        4096,
        ge=64,
        description="Prompt tokens of the largest step",
        json_schema_extra=flag("max-tokens", "TOKENS"),
    )
    max_patches: int = Field(
        8192,
        ge=1,
        description="Patches of the largest step of several pictures",
        json_schema_extra=flag("max-patches", "PATCHES"),
    )
    kv_bytes: ByteSize = bytes_field(512 * MIB, "kv-bytes", "Memory for the KV cache")
    block_size: int = Field(
        16,
        ge=1,
        le=1024,
        description="Tokens in one KV block",
        json_schema_extra=flag("block-size", "TOKENS"),
    )
    links: bool = Field(True, description="Measure NATS and UCX as well")
