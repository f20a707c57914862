"""What users may write, and what they are told when it is something else."""

from __future__ import annotations

import pytest

from shared.errors import SettingsError
from shared.messages.control import Role
from shared.runtime.topology import name_of, parse_stages, parse_topology

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE


@pytest.mark.parametrize(
    ("text", "workers"),
    [
        ("2E 1P 1D", [(E,), (E,), (P,), (D,)]),
        ("1EP 2D", [(E, P), (D,), (D,)]),
        ("1EPD", [(E, P, D)]),
        ("E-P-D", [(E,), (P,), (D,)]),
        ("ED-P", [(E, D), (P,)]),
        ("E-PD", [(E,), (P, D)]),
        ("pd, 2e", [(P, D), (E,), (E,)]),
        ("2DPE+D", [(E, P, D), (E, P, D), (D,)]),
        ("1P 1D 1P", [(P,), (D,), (P,)]),
        ("64EPD", [(E, P, D)] * 64),
    ],
)
def test_topologies(text: str, workers: list[tuple[Role, ...]]) -> None:
    assert list(parse_topology(text)) == workers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no worker for prefill and decode"),
        ("2E 1P", "no worker for decode"),
        ("1E 2D", "no worker for prefill"),
        ("1X 1PD", "'1X' should be a count and stages"),
        ("2 PD", "'2' should be a count and stages"),
        ("P2 D", "'P2' should be a count and stages"),
        ("1PP 1D", "'1PP' names a stage twice"),
        ("0E 1PD", "'0E' should count at least 1"),
        ("33P 32D", "at most 64 workers"),
        ("999999PD", "at most 64 workers"),
        ("1234567PD", "'1234567PD' should be"),
        ("1.5PD", "'1.5PD' should be"),
        ("١PD", "should be"),
    ],
)
def test_mistakes_name_setting_value_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_topology(text)
    assert str(caught.value).startswith(f"--topology = {text!r}: ")
    assert message in str(caught.value)


def test_stages_of_one_worker() -> None:
    assert parse_stages("prefill,decode") == (P, D)
    assert parse_stages(" decode, encode ") == (E, D)
    assert name_of((E, P, D)) == "encode-prefill-decode"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no stage; allowed are encode, prefill, decode"),
        (" , ", "names no stage"),
        ("prefill,decoder", "'decoder' is no stage; allowed are encode, prefill, decode"),
        ("gateway", "'gateway' is no stage"),
        ("decode,decode", "a stage is named twice"),
    ],
)
def test_wrong_stages(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=r"^--stages = ") as caught:
        parse_stages(text)
    assert message in str(caught.value)
