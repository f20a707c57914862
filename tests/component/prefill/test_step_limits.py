"""Tokens of a prefill step, by what it shares its device with."""

from __future__ import annotations

import pytest

from services.prefill.build import step_limits
from services.prefill.settings import SHARED_PASS_TOKENS, PrefillSettings

SETTINGS = PrefillSettings(max_batch_tokens=4096, mixed_step_tokens=256)
SHARING = PrefillSettings(max_batch_tokens=4096, mixed_step_tokens=256, core_lock="here")


@pytest.mark.parametrize(
    ("settings", "device", "beside_decode", "limits"),
    [
        (SETTINGS, "cpu", False, (4096, 0)),
        (SETTINGS, "cpu", True, (256, 256)),
        (SHARING, "cpu", False, (SHARED_PASS_TOKENS, 0)),
        (SHARING, "cuda", False, (4096, 0)),
        (SHARING, "cpu", True, (256, 256)),
    ],
)
def test_who_shares_a_device_takes_small_steps(
    settings: PrefillSettings, device: str, beside_decode: bool, limits: tuple[int, int]
) -> None:
    assert step_limits(settings, device=device, beside_decode=beside_decode) == limits
