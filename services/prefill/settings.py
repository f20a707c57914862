"""Settings of a prefill worker."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ByteSize, Field

from shared.runtime.flags import flag
from shared.runtime.worker_settings import MIB, GraphSettings, WorkerSettings, bytes_field

SHARED_PASS_TOKENS = 512
"""Prompts in one pass on cores that others share: more are hardly faster on a CPU, and all get
their first token at its end."""


class PrefillSettings(WorkerSettings):
    """Runs prompts, sends their first tokens and hands their KV to a decoder."""

    EXAMPLES: ClassVar[str] = (
        "examples:\n  triptych prefill --model Qwen/Qwen2.5-VL-3B-Instruct --kv-bytes 8GiB"
    )

    kv_bytes: ByteSize = bytes_field(512 * MIB, "kv-bytes", "Memory for the KV cache")
    landing_bytes: ByteSize = bytes_field(
        256 * MIB, "landing-bytes", "Memory for arriving embeddings"
    )
    embedding_pool_bytes: ByteSize = bytes_field(
        256 * MIB, "embedding-pool-bytes", "Memory for embeddings, kept for the next request"
    )
    max_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens in one forward pass; a longer prompt gets a pass of its own, or takes "
        "several with --chunk-tokens",
        json_schema_extra=flag("max-batch-tokens", "TOKENS"),
    )
    chunk_tokens: int = Field(
        0,
        ge=0,
        description="Tokens of one prompt in one forward pass; a longer prompt takes several; "
        "0: every prompt in one",
        json_schema_extra=flag("chunk-tokens", "TOKENS"),
    )
    mixed_step_tokens: int = Field(
        512,
        ge=0,
        description="Prompt tokens in one forward pass of a process that decodes as well, which is "
        "how long its running answers pause; 0: as --max-batch-tokens and --chunk-tokens say",
        json_schema_extra=flag("mixed-step-tokens", "TOKENS"),
    )
    kv_transfer: Literal["whole", "per-chunk", "layer-wise"] = Field(
        "layer-wise",
        description="When a prompt's KV goes to its decoder: whole, once it is computed; "
        "per-chunk, each of its passes during the next; layer-wise, each group of layers during "
        "the next",
        json_schema_extra=flag("kv-transfer"),
    )
    graphs: GraphSettings = GraphSettings()
    prefix_cache: bool = Field(
        True,
        description="Keep the KV of prompts while there is room, and start prompts with the same "
        "beginning from it",
    )
    overlap_encode: bool = Field(
        True,
        description="Compute the beginning of a prompt while other processes encode its later "
        "pictures; needs the prefix cache",
    )
    min_early_tokens: int = Field(
        128,
        ge=1,
        description="Fewer tokens than this are not computed before the embeddings behind them "
        "are there",
        json_schema_extra=flag("min-early-tokens", "TOKENS"),
    )
    max_suspended: int = Field(
        2,
        ge=0,
        le=64,
        description="Forward passes that may wait between two layers for more urgent prompts",
        json_schema_extra=flag("max-suspended", "PASSES"),
    )
    priority_step_s: float = Field(
        10.0,
        ge=0,
        description="Seconds of deadline that one level of a request's priority counts as much as",
        json_schema_extra=flag("priority-step-s", "SECONDS"),
    )
    max_held: int = Field(
        16,
        ge=1,
        description="Prompts that wait for embeddings, are computed or handed over at a time",
        json_schema_extra=flag("max-held", "PROMPTS"),
    )
