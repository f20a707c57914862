"""How goodput is read off measured shares."""

from __future__ import annotations

import pytest

from bench.topologies import highest_rate


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
