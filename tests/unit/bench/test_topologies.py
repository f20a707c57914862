"""How goodput is read off measured shares."""

from __future__ import annotations

import pytest

from bench.delayed.load import Outcome
from bench.topologies import OURS, SIDES, WORKLOADS, Run, Runs, goodputs, highest_rate, report


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1.0, 1.0, 1.0], 4.0),  # no more is claimed than was offered
        ([1.0, 1.0, 0.8], 3.0),
        ([1.0, 0.9, 0.0], 2.0),
        ([0.8, 1.0, 1.0], 0.5),  # what fails early is not made good by a lucky run
    ],
)
def test_goodput_lies_where_one_in_ten_misses(shares: list[float], expected: float) -> None:
    assert highest_rate([1.0, 2.0, 4.0], shares) == pytest.approx(expected)


def runs(ttft_s: dict[str, float]) -> Runs:
    """Every request of a side has its TTFT, whatever the load."""
    return {
        (side, load.name, rate): Run([Outcome(kind, ttft_s[side]) for kind in load.kinds], 0.25)
        for side in SIDES
        for load in WORKLOADS
        for rate in load.rates_per_s
    }


def test_a_report_says_where_separate_stages_lose() -> None:
    measured = runs(dict.fromkeys(SIDES, 1.0) | {OURS: 2.0})
    found = goodputs(measured)
    assert found[OURS, "mixed", "images"] == found["PD", "mixed", "images"] == 4.5
    assert found[OURS, "mixed", "text"] < found["PD", "mixed", "text"]  # 2 s is too long for text
    text = report(measured, found)
    assert "EPD equals against PD on mixed, images: 4.50 to 4.50" in text
    assert "EPD LOSES against PD on mixed, text: 0.15 to 4.50" in text
    assert "EPD 25 %" in text
    assert "by -100 % / -100 % / -100 % against PD" in text.splitlines()[-1]
