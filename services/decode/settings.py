"""Settings of a decode worker."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ByteSize, Field

from shared.runtime.flags import flag
from shared.runtime.worker_settings import MIB, WorkerSettings, bytes_field


class DecodeSettings(WorkerSettings):
    """Generates tokens for many sequences at once."""

    EXAMPLES: ClassVar[str] = (
        "examples:\n  triptych decode --model Qwen/Qwen2.5-VL-3B-Instruct --max-batch 128"
    )

    kv_bytes: ByteSize = bytes_field(1024 * MIB, "kv-bytes", "Memory for the KV cache")
    landing_bytes: ByteSize = bytes_field(512 * MIB, "landing-bytes", "Memory for arriving KV")
    max_batch: int = Field(
        64,
        ge=1,
        description="Sequences that are generated at the same time",
        json_schema_extra=flag("max-batch", "SEQUENCES"),
    )
