"""Settings of the gateway."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from shared.runtime.access import AccessSettings
from shared.runtime.flags import flag
from shared.runtime.settings import Group, ModelSettings, ServiceSettings

MEBIBYTE = 1024 * 1024


class AdmissionSettings(Group):
    """What the gateway takes on."""

    max_in_flight: int = Field(256, ge=1, description="Requests at work at once; more get a 503")
    max_body_bytes: int = Field(32 * MEBIBYTE, ge=1024, description="Largest HTTP body")
    max_held_bytes: int = Field(
        1024 * MEBIBYTE, ge=1024, description="Bytes of all bodies held at once; more get a 503"
    )
    max_text_chars: int = Field(
        2_000_000, ge=1, description="Characters of text in one request's messages"
    )
    retry_after_s: int = Field(1, ge=1, description="Seconds that a 503 asks the client to wait")
    request_timeout_s: float = Field(600.0, gt=0, description="A request's longest life in seconds")
    send_timeout_s: float = Field(
        30.0, gt=0, description="Seconds after which a client that takes no data counts as gone"
    )
    default_max_tokens: int = Field(
        1024, ge=1, description="Tokens in an answer when the client names no limit"
    )


class MediaSettings(Group):
    """Pictures, videos and sounds."""

    max_pictures: int = Field(16, ge=0, description="Pictures in one request")
    max_picture_bytes: int = Field(16 * MEBIBYTE, ge=1, description="Bytes of one picture's file")
    max_picture_pixels: int = Field(64_000_000, ge=1, description="Pixels of one decoded picture")
    max_videos: int = Field(4, ge=0, description="Videos in one request")
    max_video_bytes: int = Field(24 * MEBIBYTE, ge=1, description="Bytes of one video's file")
    max_video_duration_s: float = Field(600.0, gt=0, description="Seconds that one video lasts")
    max_video_frames: int = Field(36_000, ge=1, description="Frames in one video's file")
    max_video_frame_pixels: int = Field(
        8_847_360, ge=1, description="Pixels of one decoded frame of a video"
    )
    max_audio_clips: int = Field(8, ge=0, description="Audio clips in one request")
    max_audio_bytes: int = Field(
        16 * MEBIBYTE,
        ge=1,
        description="Bytes of one audio clip's file; how long it may last is the model's",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Hosts that pictures may be fetched from: example.org, .example.org for all "
        "below it, host:port for another port; empty: data: URLs only",
    )
    fetch_timeout_s: float = Field(10.0, gt=0, description="Seconds for fetching one picture")
    min_part_patches: int = Field(
        2048,
        ge=0,
        description="Fewest patches in a part of a picture or video that several idle encoders "
        "share; 0: none is shared",
    )
    threads: int = Field(4, ge=1, le=64, description="Threads that decode pictures and tokenise")
    store_ttl_s: float = Field(
        600.0,
        gt=0,
        description="Life of stored media in seconds, if this process has to make the store",
        json_schema_extra=flag("media-ttl-s", "SECONDS"),
    )
    store_bytes: int = Field(
        512 * MEBIBYTE,
        ge=1,
        description="Bound of the media store, if this process has to make it",
        json_schema_extra=flag("media-store-bytes", "BYTES"),
    )


class RecoverySettings(Group):
    """What happens when a worker fails."""

    max_attempts: int = Field(3, ge=1, description="Times that a request is tried in all")
    first_event_s: float = Field(
        120.0, gt=0, description="Silence, in seconds, after which a queued attempt is given up"
    )
    stall_s: float = Field(
        30.0, gt=0, description="Silence, in seconds, after which a started attempt is given up"
    )
    gap_s: float = Field(
        2.0, gt=0, description="Seconds to wait for a token that later ones have overtaken"
    )
    unserved_s: float = Field(
        15.0, gt=0, description="Seconds to wait for a worker of a stage that has none any more"
    )


class TraceSettings(Group):
    """Traces kept for GET /v1/traces."""

    max_traces: int = Field(512, ge=0, description="Newest traces kept")
    max_spans: int = Field(512, ge=1, description="Spans kept of one trace")


class GatewaySettings(ServiceSettings):
    """Serves the OpenAI HTTP API and hands the work to encode, prefill and decode workers."""

    EXAMPLES: ClassVar[str] = """\
examples:
  triptych gateway --model Qwen/Qwen2.5-VL-3B-Instruct --port 8000
  triptych gateway --nats-url nats://10.0.0.5:4222 --media-allowed-hosts upload.wikimedia.org"""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free one")
    drain_s: float = Field(
        20.0,
        ge=0,
        description="Seconds that running answers have to finish after a stop was asked for",
        json_schema_extra=flag("drain-s", "SECONDS"),
    )
    registration_ttl_s: float = Field(
        6.0,
        gt=0,
        description="Seconds of silence after which a worker counts as dead",
        json_schema_extra=flag("registration-ttl-s", "SECONDS"),
    )
    model: ModelSettings = ModelSettings()
    access: AccessSettings = AccessSettings()
    admission: AdmissionSettings = AdmissionSettings()
    media: MediaSettings = MediaSettings()
    recovery: RecoverySettings = RecoverySettings()
    traces: TraceSettings = TraceSettings()
