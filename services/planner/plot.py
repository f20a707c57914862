"""The plans as a picture: how much load each can take, and what becomes of the best beyond it.

In: plans and attainment curves. Out: a PNG or SVG file. matplotlib is imported only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from services.planner.goodput import ATTAINED
from services.planner.optimizer import Plan
from shared.errors import SettingsError

SUFFIXES = (".png", ".svg")
WIDTH_INCHES, HEIGHT_INCHES = 11.0, 4.6
COLORS = ("#0b6e8f", "#d1682e", "#5a8f3c", "#8a5aa8")
OTHER = "#b8c4ca"
TEXT = "#333333"


@dataclass(frozen=True, slots=True)
class Curve:
    """The share of good requests of the worst class, by rate (requests/s)."""

    name: str
    rates: tuple[float, ...]
    attainments: tuple[float, ...]


def check_plot(path: Path, setting: str = "--plot") -> None:
    """Raises `SettingsError` where nothing could be drawn into this file."""
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"{setting} = {path}: should end with .png or .svg")
    if not path.parent.is_dir():
        raise SettingsError(f"{setting} = {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:  # told before minutes of simulating, not after
        raise SettingsError(
            f"{setting} = {path}: the package matplotlib is missing: "
            "pip install 'triptych[planner]'"
        )


def best_of_topologies(plans: Sequence[Plan], count: int) -> tuple[Plan, ...]:
    """The best plan of each topology, the best topologies first."""
    best: dict[str, Plan] = {}
    for plan in plans:
        best.setdefault(plan.choice.topology, plan)
    return tuple(best.values())[:count]


def draw(path: Path, plans: Sequence[Plan], curves: Sequence[Curve], title: str) -> None:
    """Write the file: the plans' goodput on the left, the curves on the right.

    The bar of a plan that has a curve has its colour.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no window

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained", dpi=150)
    bars, lines = figure.subplots(1, 2)
    names = [plan.choice.topology for plan in plans]
    colors = {curve.name: color for curve, color in zip(curves, COLORS, strict=False)}
    drawn = bars.barh(
        names, [plan.goodput for plan in plans], color=[colors.get(n, OTHER) for n in names]
    )
    bars.bar_label(drawn, fmt="%.2f", padding=3, color=TEXT)
    bars.invert_yaxis()
    bars.margins(x=0.14)
    bars.set_xlabel("goodput (requests/s)")
    bars.set_title("what each plan can take", loc="left", color=TEXT)
    for curve in curves:
        percent = [100 * share for share in curve.attainments]
        lines.plot(curve.rates, percent, "o-", ms=3, color=colors.get(curve.name), label=curve.name)
    lines.axhline(100 * ATTAINED, color=TEXT, ls=":", lw=1)
    lines.set_ylim(-3, 103)
    lines.set_xlabel("rate (requests/s)")
    lines.set_ylabel("% of the worst class within both limits")
    lines.set_title("what becomes of the best beyond it", loc="left", color=TEXT)
    if curves:
        lines.legend(frameon=False, loc="lower left")
    for axes in (bars, lines):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", color=TEXT)
    figure.savefig(path)
