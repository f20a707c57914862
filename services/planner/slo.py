"""What latency counts as good: parsed from text such as `ttft=2,tpot=0.05`. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Slo:
    """Most seconds to the first token, and per token after it."""

    ttft_s: float
    tpot_s: float


def parse_slo(text: str, setting: str = "--slo") -> Slo:
    """Both limits, each once. Raises `SettingsError`."""
    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip()
        if name not in ("ttft", "tpot") or name in values:
            raise SettingsError(f"{setting} = {text!r}: should be like ttft=2,tpot=0.05 (seconds)")
        try:
            values[name] = float(value)
        except ValueError:
            raise SettingsError(f"{setting} = {text!r}: {value!r} is no number") from None
        if not (math.isfinite(values[name]) and values[name] > 0):
            raise SettingsError(f"{setting} = {text!r}: {name} should be above 0")
    if len(values) < 2:
        raise SettingsError(f"{setting} = {text!r}: both ttft and tpot are needed")
    return Slo(values["ttft"], values["tpot"])
