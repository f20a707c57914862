"""Which stages share a process, as users write it: `2E 1P 1D`, `1EP 2D`, `1EPD`.

In: the text of a setting. Out: one set of stages per worker process, or a `SettingsError` that
names the setting, its value and what is allowed. Pure: starts nothing and knows no process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from shared.errors import SettingsError
from shared.messages.control import STAGES, Role

LETTERS = {"E": Role.ENCODE, "P": Role.PREFILL, "D": Role.DECODE}
"""How a topology names a stage."""

MAX_WORKERS = 64

_WORD = re.compile(r"([0-9]{0,6})([A-Za-z]+)")
_DIVIDERS = re.compile(r"[\s,+-]+")

Stages = tuple[Role, ...]
"""The stages of one process, each once, in the order of a request's life."""


def parse_topology(text: str, setting: str = "--topology") -> tuple[Stages, ...]:
    """The stages of every worker, in the order in which they are named.

    `2E 1PD` means two encoders and one worker for prefill and decode; a missing count means one.
    Every topology needs prefill and decode; without an encoder only text is answered.
    """
    workers: list[Stages] = []
    for word in filter(None, _DIVIDERS.split(text)):
        count, stages = _parse_word(word, text, setting)
        # Compared before the list grows: a count may have six digits.
        if len(workers) + count > MAX_WORKERS:
            raise SettingsError(f"{setting} = {text!r}: at most {MAX_WORKERS} workers are allowed")
        workers += [stages] * count
    hosted = {stage for stages in workers for stage in stages}
    missing = [stage.value for stage in (Role.PREFILL, Role.DECODE) if stage not in hosted]
    if missing:
        raise SettingsError(
            f"{setting} = {text!r}: no worker for {' and '.join(missing)}; "
            "at least one P and one D are needed, such as 1E 1P 1D or 1EPD"
        )
    return tuple(workers)


def parse_stages(text: str, setting: str = "--stages") -> Stages:
    """The stages of one worker, written as `prefill,decode`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    allowed = [stage.value for stage in STAGES]
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        wrong = f"{unknown[0]!r} is no stage" if unknown else "names no stage"
        raise SettingsError(f"{setting} = {text!r}: {wrong}; allowed are {', '.join(allowed)}")
    if len(set(names)) < len(names):
        raise SettingsError(f"{setting} = {text!r}: a stage is named twice")
    return in_order(Role(name) for name in names)


def in_order(stages: Iterable[Role]) -> Stages:
    """Each stage once, in the order of a request's life."""
    hosted = set(stages)
    return tuple(stage for stage in STAGES if stage in hosted)


def name_of(stages: Sequence[Role]) -> str:
    """`prefill-decode`: how a process with these stages is called in names, logs and traces."""
    return "-".join(stage.value for stage in stages)


def _parse_word(word: str, text: str, setting: str) -> tuple[int, Stages]:
    match = _WORD.fullmatch(word)
    letters = match[2].upper() if match else ""
    if not match or not set(letters) <= set(LETTERS):
        raise SettingsError(
            f"{setting} = {text!r}: {word!r} should be a count and stages out of "
            "E (encode), P (prefill) and D (decode), such as 2E or 1PD"
        )
    if len(set(letters)) < len(letters):
        raise SettingsError(f"{setting} = {text!r}: {word!r} names a stage twice")
    count = int(match[1] or 1)
    if count < 1:
        raise SettingsError(f"{setting} = {text!r}: {word!r} should count at least 1")
    return count, in_order(LETTERS[letter] for letter in letters)
