"""Settings of every service: nested, frozen, checked once at the start.

A service writes a subclass of `ServiceSettings` and adds its own fields and groups:

    class PrefillSettings(ServiceSettings):
        '''Runs prompts and hands their KV cache to a decoder.'''
        model: ModelSettings = ModelSettings()
        max_batch_tokens: int = Field(2048, ge=1, description="Tokens in one forward pass")

and its `__main__` calls `settings_or_exit(PrefillSettings, sys.argv[1:], "triptych prefill")`.
Flags win over `TRIPTYCH_*` variables (`TRIPTYCH_BUS__URL`), those over the TOML file named by
`--config` (`[bus]` `url = ...`), that over defaults. Constructing a settings class in a test reads
neither environment nor files.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import pydantic_settings
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from shared.demo import model_dir
from shared.errors import SettingsError
from shared.runtime.flags import (
    ENV_DELIMITER,
    ENV_PREFIX,
    flag,
    given,
    parser_for,
    settings_of,
)
from shared.runtime.lifecycle import EXIT_BAD_SETTINGS
from shared.runtime.setting_mistakes import explained

DEMO_MODEL = model_dir()
DEMO_MODEL_NAME = "triptych-demo"


class Group(BaseModel):
    """A frozen group of settings that belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class BusSettings(Group):
    """Message bus."""

    url: str = Field(
        "nats://127.0.0.1:4222",
        description="Address of the NATS server, or several divided by commas",
        json_schema_extra=flag("nats-url", "URL"),
    )

    credentials_file: Path | None = Field(
        None,
        description="NATS credentials file of this service's account",
        json_schema_extra=flag("nats-credentials", "FILE"),
    )
    connect_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Seconds to keep trying for the first connection",
        json_schema_extra=flag("nats-connect-timeout-s", "SECONDS"),
    )
    ack_wait_s: float = Field(
        10.0,
        ge=1,
        description="Seconds without a sign of a task's worker after which another one gets the "
        "task; the same for every service",
        json_schema_extra=flag("nats-ack-wait-s", "SECONDS"),
    )

    @field_validator("url")
    @classmethod
    def _names_a_protocol(cls, url: str) -> str:
        if not url.startswith(("nats://", "tls://", "ws://", "wss://")):
            raise ValueError("should begin with nats://, tls://, ws:// or wss://")
        return url


class TelemetrySettings(Group):
    """Logs, traces and metrics."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least important log line that is written",
        json_schema_extra=flag("log-level"),
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto",
        description="auto writes text to a terminal and one JSON object a line elsewhere",
        json_schema_extra=flag("log-format"),
    )
    otlp_endpoint: str = Field(
        "",
        description="OpenTelemetry collector for spans, e.g. http://localhost:4318; empty: none",
        json_schema_extra=flag("otlp-endpoint", "URL"),
    )


class ModelSettings(Group):
    """Model."""

    path: str = Field(
        str(DEMO_MODEL),
        min_length=1,
        description="Folder with config.json and safetensors, or a Hugging Face hub id",
        json_schema_extra=flag("model", "DIR_OR_HUB_ID"),
    )
    served_name: str = Field(
        "",
        description="Name under which clients ask for the model; empty: the last part of its path",
        json_schema_extra=flag("served-name", "NAME"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto",
        description="Number format of weights and KV cache; auto: the one the model was saved in",
        json_schema_extra=flag("dtype"),
    )

    @property
    def name(self) -> str:
        """What clients call the model, and what the work queues are named after."""
        if self.served_name:
            return self.served_name
        if self.path == str(DEMO_MODEL):
            return DEMO_MODEL_NAME
        return self.path.rstrip("/").rsplit("/", 1)[-1]


class ComputeSettings(Group):
    """Compute."""

    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads for tensor arithmetic; 0: what OMP_NUM_THREADS or torch decides",
        json_schema_extra=flag("threads", "COUNT"),
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where present", json_schema_extra=flag("device")
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 keeps the language model's weights in 8 bits, one scale per output",
        json_schema_extra=flag("quantization"),
    )
    linear_kernel: Literal["auto", "plain", "packed", "compiled", "paired"] = Field(
        "auto",
        description="What multiplies weights on a CPU: torch's operator, oneDNN on its own layout, "
        "ours, or both, for prompts and for decode steps (a process of both keeps weights twice); "
        "auto: what is fastest for the number format on this CPU",
        json_schema_extra=flag("linear-kernel"),
    )
    deterministic: bool = Field(
        False,
        description="A float32 model on CPUs computes the same bits whatever it computes together, "
        "so that seeded answers survive a recovery exactly; prefill takes longer",
        json_schema_extra=flag("deterministic"),
    )


class ServiceSettings(BaseSettings):
    """Settings that every service has."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        frozen=True,
        extra="forbid",
        validate_default=True,
    )
    EXAMPLES: ClassVar[str] = ""
    """Shown at the end of `--help`."""

    name: str = Field(
        "",
        max_length=64,
        pattern=r"^[A-Za-z0-9._-]*$",
        description="Name of this process in logs, traces and metrics; empty: made from its role",
        json_schema_extra=flag("name", "NAME"),
    )
    bus: BusSettings = BusSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Construction takes arguments only; `load_settings` is the one place that looks around."""
        return (init_settings,)


S = TypeVar("S", bound=ServiceSettings)


def load_settings(cls: type[S], argv: Sequence[str], prog: str) -> S:
    """Settings from flags, environment, file and defaults. `--help` prints and exits.

    Raises `SettingsError` whose one line names the setting, the value and what is allowed.
    """
    namespace = parser_for(cls, prog, cls.EXAMPLES).parse_all(argv)
    file = getattr(namespace, "config", None)
    layers = (_set_by_defaults(cls), _from_file(file), _from_environment(cls), given(namespace))
    merged: dict[str, Any] = {}
    for layer in layers:
        _overlay(merged, layer)
    try:
        return cls(**merged)
    except ValidationError as error:
        raise SettingsError(explained(settings_of(cls), error)) from None


def settings_or_exit(cls: type[S], argv: Sequence[str], prog: str) -> S:
    """`load_settings` for a `__main__`: an error is one line on stderr and exit code 2."""
    try:
        return load_settings(cls, argv, prog)
    except SettingsError as error:
        exit_with(prog, error)


def exit_with(prog: str, error: SettingsError) -> NoReturn:
    print(f"{prog}: {error}", file=sys.stderr)
    raise SystemExit(EXIT_BAD_SETTINGS) from None


def _set_by_defaults(cls: type[BaseModel]) -> dict[str, Any]:
    """What a class sets in the defaults of its groups, so that one flag keeps the others."""
    values = {}
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, Group):
            values[name] = default.model_dump(exclude_unset=True)
    return values


def _from_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config = {path!r}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--config = {path!r}: not TOML: {error}") from None


def _from_environment(cls: type[ServiceSettings]) -> dict[str, Any]:
    try:
        return EnvSettingsSource(cls)()
    except pydantic_settings.SettingsError as error:
        raise SettingsError("; ".join(_not_json(cls)) or f"environment: {error}") from None


def _not_json(cls: type[ServiceSettings]) -> Iterator[str]:
    """A line for every variable that must be JSON, being a list or a whole group, and is not."""
    lists = {setting.environment: '["a", "b"]' for setting in settings_of(cls) if setting.is_list}
    groups = {ENV_PREFIX + name.upper(): '{"key": 1}' for name in _set_by_defaults(cls)}
    for variable, example in (lists | groups).items():
        value = os.environ.get(variable, example)
        try:
            json.loads(value)
        except ValueError:
            yield f"{variable} = {value!r}: should be JSON, such as {example}"


def _overlay(base: dict[str, Any], top: Mapping[str, Any]) -> None:
    for name, value in top.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            _overlay(base[name], value)
        else:
            base[name] = dict(value) if isinstance(value, Mapping) else value
