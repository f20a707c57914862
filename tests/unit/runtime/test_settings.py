"""Settings: where a value comes from, and what a mistake looks like."""

from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import ByteSize, Field, ValidationError, model_validator

from shared.errors import SettingsError
from shared.runtime.settings import (
    BusSettings,
    Group,
    ModelSettings,
    ServiceSettings,
    load_settings,
    settings_or_exit,
)


class PoolSettings(Group):
    """Memory pool."""

    blocks: int = Field(64, ge=1, le=4096, description="Blocks in the pool")
    block_tokens: int = Field(16, ge=1, description="Tokens in a block")


class BakerySettings(ServiceSettings):
    """Bakes bread, as an example of a service."""

    EXAMPLES: ClassVar[str] = "Examples:\n  bakery --ovens 2"

    model: ModelSettings = ModelSettings()
    ovens: int = Field(1, ge=1, le=8, description="Ovens that run at once")
    steam: bool = Field(default=False, description="Bake with steam")
    crust: Literal["soft", "hard"] = Field("soft", description="Crust")
    flours: tuple[str, ...] = Field(("rye",), description="Flours in the dough")
    yeast_bytes: ByteSize = Field(ByteSize(2 * 1024 * 1024), description="Yeast at hand")
    pool: PoolSettings = PoolSettings(blocks=128)

    @model_validator(mode="after")
    def _steam_needs_crust(self) -> "BakerySettings":
        if self.steam and self.crust == "soft":
            raise ValueError("steam makes a hard crust: set --crust hard")
        return self


class OvenSettings(ServiceSettings):
    """A service with a required setting."""

    heat_c: int = Field(description="Heat in degrees Celsius")


def load(*argv: str) -> BakerySettings:
    return load_settings(BakerySettings, argv, "bakery")


def test_defaults() -> None:
    settings = load()
    assert settings.bus.url == "nats://127.0.0.1:4222"
    assert settings.model.name == "triptych-demo"
    assert (settings.ovens, settings.flours, settings.pool.blocks) == (1, ("rye",), 128)


def test_flags_read_naturally() -> None:
    settings = load(
        *("--model", "org/Some-VL", "--nats-url", "nats://bus:4222", "--name", "b-1"),
        *("--ovens", "3", "--crust", "hard", "--steam", "--flours", "rye", "oat"),
    )
    assert settings.model.path == "org/Some-VL"
    assert settings.model.name == "Some-VL"
    assert settings.bus == BusSettings(url="nats://bus:4222")
    assert (settings.name, settings.ovens, settings.steam) == ("b-1", 3, True)
    assert settings.flours == ("rye", "oat")


def test_flag_wins_over_environment_over_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bakery.toml"
    file.write_text("ovens = 2\n[pool]\nblocks = 7\nblock_tokens = 8\n[model]\ndtype = 'float32'\n")
    monkeypatch.setenv("TRIPTYCH_OVENS", "4")
    monkeypatch.setenv("TRIPTYCH_POOL__BLOCKS", "9")
    settings = load("--config", str(file), "--ovens", "5")
    assert settings.ovens == 5
    assert settings.pool == PoolSettings(blocks=9, block_tokens=8)
    assert settings.model.dtype == "float32"


def test_one_flag_of_a_group_keeps_the_defaults_its_service_chose() -> None:
    assert load("--pool-block-tokens", "4").pool == PoolSettings(blocks=128, block_tokens=4)


def test_construction_ignores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_OVENS", "4")
    assert BakerySettings().ovens == 1


def test_settings_are_frozen() -> None:
    settings = load()
    with pytest.raises(ValidationError):
        settings.ovens = 2
    with pytest.raises(ValidationError):
        settings.pool.blocks = 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ovens", "9"], "--ovens = '9': should be less than or equal to 8 (or TRIPTYCH_OVENS)"),
        (["--pool-blocks", "0"], "--pool-blocks = '0': should be greater than or equal to 1"),
        (["--crust", "wet"], "--crust = 'wet': should be 'soft' or 'hard'"),
        (["--nats-url", "bus"], "--nats-url = 'bus': should begin with nats://"),
        (["--oven", "2"], "unknown argument --oven (did you mean --ovens?)"),
        (["--steam"], "settings: steam makes a hard crust: set --crust hard"),
        (["--ovens"], "argument --ovens: expected one argument"),
        (["--config", "/none.toml"], "--config = '/none.toml': cannot be read"),
    ],
)
def test_a_mistake_is_one_line_that_names_setting_value_and_limit(
    argv: list[str], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_setting_says_how_to_give_it() -> None:
    with pytest.raises(SettingsError, match=r"--heat-c is required \(or TRIPTYCH_HEAT_C\)"):
        load_settings(OvenSettings, [], "oven")


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bakery.toml"
    file.write_text("[pool]\nbloks = 7\n")
    with pytest.raises(SettingsError) as caught:
        load("--config", str(file))
    assert str(caught.value) == (
        "pool.bloks (by --config or TRIPTYCH_POOL__BLOKS) is not a setting of this service "
        "(did you mean pool.blocks?)"
    )


@pytest.mark.parametrize("variable", ["TRIPTYCH_FLOURS", "TRIPTYCH_POOL"])
def test_a_variable_that_is_not_json_is_named(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "rye")
    with pytest.raises(SettingsError, match=f"{variable} = 'rye': should be JSON, such as "):
        load()


def test_exit_code_two_and_no_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        settings_or_exit(BakerySettings, ["--ovens", "none"], "bakery")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("bakery: --ovens = 'none': ")


def test_help_teaches_meaning_limits_default_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Bakes bread, as an example of a service." in text
    assert "Ovens that run at once [at least 1, at most 8; default 1; TRIPTYCH_OVENS]" in text
    assert "default 128; TRIPTYCH_POOL__BLOCKS" in text
    assert "--yeast-bytes BYTES Yeast at hand [default 2MiB; TRIPTYCH_YEAST_BYTES]" in text
    assert "--flours FLOUR [FLOUR ...]" in text
    assert "TRIPTYCH_FLOURS as a JSON list" in text
    assert "Memory pool:" in text
    assert "bakery --ovens 2" in text
