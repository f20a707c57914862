"""Settings of an encode worker."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ByteSize, Field

from shared.runtime.flags import flag
from shared.runtime.worker_settings import MIB, WorkerSettings, bytes_field


class EncoderSettings(WorkerSettings):
    """Turns pictures into embeddings and announces them."""

    EXAMPLES: ClassVar[str] = (
        "examples:\n  triptych encoder --model Qwen/Qwen2.5-VL-3B-Instruct --name encoder-0"
    )

    max_batch_patches: int = Field(
        16_384,
        ge=1,
        description="Patches in one pass of the vision tower",
        json_schema_extra=flag("max-batch-patches", "PATCHES"),
    )
    max_held: int = Field(
        8,
        ge=1,
        description="Pictures that are fetched, preprocessed or encoded at the same time",
        json_schema_extra=flag("max-held", "PICTURES"),
    )
    preprocess_threads: int = Field(
        2,
        ge=1,
        le=64,
        description="Threads that decode, resize and cut pictures while the tower computes others",
        json_schema_extra=flag("preprocess-threads", "THREADS"),
    )
    embedding_pool_bytes: ByteSize = bytes_field(
        512 * MIB, "embedding-pool-bytes", "Memory for finished embeddings, leased and cached"
    )
    max_picture_bytes: ByteSize = bytes_field(
        16 * MIB, "max-picture-bytes", "Largest picture file that is decoded"
    )
    max_picture_pixels: int = Field(
        64_000_000,
        ge=1,
        description="Most pixels that a picture may decode to",
        json_schema_extra=flag("max-picture-pixels", "PIXELS"),
    )
    media_store_bytes: ByteSize = bytes_field(
        512 * MIB, "media-store-bytes", "Bound of the media store, if this process has to make it"
    )
    media_ttl_s: float = Field(
        600.0,
        gt=0,
        description="Life of stored media in seconds, if this process has to make the store",
        json_schema_extra=flag("media-ttl-s", "SECONDS"),
    )
