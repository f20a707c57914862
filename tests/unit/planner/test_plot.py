"""The picture of the plans: what is drawn, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.planner.optimizer import Choice, Plan
from services.planner.plot import Curve, best_of_topologies, check_plot, draw
from shared.errors import SettingsError

PLANS = tuple(
    Plan(Choice(topology, batch, 4096), goodput, goodput)
    for topology, batch, goodput in [("2E 1PD", 64, 5.0), ("2E 1PD", 8, 4.0), ("3EPD", 64, 3.25)]
)


def test_each_topology_is_shown_once_at_its_best() -> None:
    assert best_of_topologies(PLANS, 10) == (PLANS[0], PLANS[2])
    assert best_of_topologies(PLANS, 1) == (PLANS[0],)


def test_an_svg_holds_every_name_and_number(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    curve = Curve("2E 1PD", (1.0, 2.0, 3.0), (1.0, 0.95, 0.2))
    draw(path, best_of_topologies(PLANS, 10), [curve], "TTFT within 2 s")
    text = path.read_text("utf-8")
    # matplotlib draws letters as shapes and keeps the words as comments.
    for word in ("3EPD", "2E 1PD", "3.25", "goodput (requests/s)", "TTFT within 2 s"):
        assert f"<!-- {word} -->" in text


def test_plans_without_goodput_are_drawn_without_curves(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    draw(path, [Plan(Choice("1EPD", 1, 1), 0.0, 0.0)], [], "nothing")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["plan.jpg", "plan", "none/plan.png"])
def test_a_file_that_cannot_be_drawn_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--plot = "):
        check_plot(tmp_path / name)
