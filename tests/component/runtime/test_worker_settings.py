"""Settings of a process that hosts several stages."""

from __future__ import annotations

import pytest

from services.decode.settings import DecodeSettings
from services.encoder.settings import EncoderSettings
from services.prefill.settings import PrefillSettings
from services.stages import HostSettings
from shared.errors import SettingsError
from shared.runtime.settings import load_settings

ALL = ("encode", "prefill", "decode")


def test_they_are_those_of_every_stage() -> None:
    argv = ["--stages", ",".join(ALL), "--max-batch", "3", "--max-batch-patches", "7"]
    settings = load_settings(HostSettings, [*argv, "--kv-bytes", "2MiB"], "worker")
    assert isinstance(settings, EncoderSettings | PrefillSettings)
    assert (settings.max_batch, settings.max_batch_patches) == (3, 7)
    assert settings.kv_bytes == 2 * 1024 * 1024
    for stage in (EncoderSettings, PrefillSettings, DecodeSettings):
        assert stage.model_fields.keys() <= HostSettings.model_fields.keys()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--stages is required"),
        (["--stages", "prefill,gateway"], "--stages = 'prefill,gateway': 'gateway' is no stage"),
        (["--stages", "decode,decode"], "a stage is named twice"),
        (["--stages", "decode", "--max-batch", "0"], "--max-batch = '0'"),
    ],
)
def test_mistakes_name_setting_and_value(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(HostSettings, argv, "worker")
    assert message in str(caught.value)
