"""Subjects, limits and the labels of dead letters."""

from __future__ import annotations

import pytest

from shared.bus import subjects
from shared.bus.dead_letters import DELIVERIES_HEADER, REASON_HEADER, dead_letter_headers
from shared.bus.limits import BusLimits
from shared.bus.memory_hub import subject_matches
from shared.errors import SettingsError
from shared.messages.control import Role


@pytest.mark.parametrize(
    ("pattern", "subject", "matches"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
    ],
)
def test_wildcards(pattern: str, subject: str, matches: bool) -> None:
    assert subject_matches(pattern, subject) is matches


def test_model_names_become_one_token_and_stay_apart() -> None:
    first = subjects.work(Role.DECODE, "Qwen/Qwen2-VL.2B")
    second = subjects.work(Role.DECODE, "Qwen-Qwen2-VL-2B")
    assert first != second
    assert first.count(".") == second.count(".") == 2
    assert subjects.dead(second) == "dead.work.decode.Qwen-Qwen2-VL-2B"


def test_limits_must_make_sense() -> None:
    with pytest.raises(SettingsError, match="ack_wait_s is 0"):
        BusLimits(ack_wait_s=0)
    with pytest.raises(SettingsError, match="task_max_age_s"):
        BusLimits(duplicate_window_s=10, task_max_age_s=5)


def test_a_dead_letters_reason_is_one_bounded_line() -> None:
    headers = dead_letter_headers({"traceparent": "x"}, "a\r\nb " + "c" * 1000, 3)
    assert headers["traceparent"] == "x"
    assert headers[REASON_HEADER].startswith("a b ccc")
    assert len(headers[REASON_HEADER]) == 500
    assert headers[DELIVERIES_HEADER] == "3"
    assert dead_letter_headers({}, "  ", 1)[REASON_HEADER] == "unknown"
