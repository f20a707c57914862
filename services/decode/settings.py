"""Settings of a decode worker."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import ByteSize, Field, model_validator

from services.decode.speculation import MAX_DRAFT_TOKENS
from shared.runtime.flags import flag
from shared.runtime.settings import Group
from shared.runtime.worker_settings import MIB, GraphSettings, WorkerSettings, bytes_field


class SpeculationSettings(Group):
    """Speculative decoding."""

    mode: Literal["off", "ngram", "draft"] = Field(
        "off",
        description="Who guesses tokens ahead: nobody, the text so far, or a smaller model",
        json_schema_extra=flag("speculate"),
    )
    draft_model: str = Field(
        "",
        description="Folder or hub id of the smaller model, which must have the same tokenizer",
        json_schema_extra=flag("draft-model", "DIR_OR_HUB_ID"),
    )
    max_draft_tokens: int = Field(
        5,
        ge=1,
        le=MAX_DRAFT_TOKENS,
        description="Tokens guessed at a time at most; fewer, or none, where fewer are faster",
        json_schema_extra=flag("max-draft-tokens", "TOKENS"),
    )
    draft_kv_bytes: ByteSize = bytes_field(
        256 * MIB, "draft-kv-bytes", "Memory for the smaller model's KV cache"
    )

    @model_validator(mode="after")
    def _names_a_model_where_one_guesses(self) -> Self:
        if (self.mode == "draft") != bool(self.draft_model):
            raise ValueError(
                f"--speculate is {self.mode} and --draft-model is {self.draft_model!r}: "
                "a draft model goes with --speculate draft, and only with it"
            )
        return self


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
    reserve: Literal["full", "grow"] = Field(
        "full",
        description="full: an answer's memory is reserved for its longest form; grow: it is taken "
        "block by block, more answers fit, and one may have to give way to others",
        json_schema_extra=flag("reserve"),
    )
    headroom_tokens: int = Field(
        128,
        ge=0,
        description="With --reserve grow: tokens that every running answer must still have room "
        "for before another is admitted",
        json_schema_extra=flag("headroom-tokens", "TOKENS"),
    )
    swap_bytes: ByteSize = Field(
        ByteSize(256 * MIB),
        ge=0,
        description="With --reserve grow: host memory for the KV of answers that gave way; what "
        "does not fit is computed again",
        json_schema_extra=flag("swap-bytes", "BYTES"),
    )
    graphs: GraphSettings = GraphSettings()
    speculation: SpeculationSettings = SpeculationSettings()
