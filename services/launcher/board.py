"""What the terminal shows: a live table while everything starts, plain lines otherwise.

In: the supervisor's news (it is a `Watcher`). Out: text. On a terminal the table is redrawn when
something changed, never from a thread of its own; in a pipe each change is one line.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.launcher.log_line import LogLine

COLOURS = {
    "starting": "yellow",
    "loading": "cyan",
    "ready": "green",
    "restarting": "red",
    "stopping": "yellow",
    "stopped": "dim",
}
BAR_WIDTH = 24


@dataclass(slots=True)
class Row:
    """What is known of one process."""

    state: str = "starting"
    pid: int | None = None
    stages: str = ""
    weights_fraction: float | None = None
    detail: str = ""


class Board:
    """Shows the processes; `show_level` is the least log level that reaches the terminal."""

    def __init__(self, console: Console, show_level: str) -> None:
        self.rows: dict[str, Row] = {}
        self._console = console
        self._show_level = show_level
        self._live: Live | None = None

    def open(self) -> None:
        """Begin the live table, where there is a terminal to draw it on."""
        if self._console.is_terminal and self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()

    def close(self) -> None:
        """Leave the table as it is; from here on lines are plain. Idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def hosts(self, name: str, stages: str) -> None:
        """Which stages a worker hosts; empty for other processes."""
        self.rows.setdefault(name, Row()).stages = stages

    def started(self, name: str, pid: int) -> None:
        row = self.rows.setdefault(name, Row())
        row.state, row.pid, row.weights_fraction = "starting", pid, None
        hosting = f", hosts {row.stages}" if " " in row.stages else ""
        self._changed(f"{name}: started (pid {pid}){hosting}")

    def said(self, name: str, line: LogLine) -> None:
        row = self.rows.setdefault(name, Row())
        if line.weights_fraction is not None:
            row.state, row.weights_fraction = "loading", line.weights_fraction
            self._changed(None)
        if line.new_stages:
            row.stages = " ".join(line.new_stages)
            self._changed(f"{name}: hosts {row.stages}")
        if line.says_ready:
            row.state, row.weights_fraction, row.detail = "ready", None, ""
            self._said_ready(name)
        if line.at_least(self._show_level):
            style = (
                "red" if line.at_least("error") else "yellow" if line.at_least("warning") else ""
            )
            self.line(f"{name}: {line.level}: {line}", style)

    def _said_ready(self, name: str) -> None:
        """On a terminal whose table is closed, a process that came back is news as well."""
        if self._live is None:
            self.line(f"{name}: ready", "green")
        else:
            self._changed(None)

    def ended(self, name: str, how: str, restart_in_s: float) -> None:
        row = self.rows.setdefault(name, Row())
        row.state, row.pid, row.detail = "restarting", None, how
        self.line(f"{name}: {how}; starting it again in {restart_in_s:g} s", "red")
        self._changed(None)

    def stopping(self, name: str) -> None:
        self.rows.setdefault(name, Row()).state = "stopping"

    def stopped(self, name: str) -> None:
        self.rows.setdefault(name, Row()).state = "stopped"
        self._changed(f"{name}: stopped")

    def all_ready(self) -> None:
        for row in self.rows.values():
            row.state, row.weights_fraction, row.detail = "ready", None, ""
        self._changed(None)

    def line(self, text: str, style: str = "") -> None:
        """One line of its own, above the table where there is one."""
        self._console.print(escape(text), style=style or None, soft_wrap=True, highlight=False)

    def _changed(self, plain: str | None) -> None:
        """Redraw the table; without a terminal print `plain` instead."""
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
        elif plain is not None and not self._console.is_terminal:
            self.line(plain)

    def table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name, row in self.rows.items():
            table.add_row(
                Text(name, style="bold"),
                Text(row.stages, style="dim"),
                Text(row.state, style=COLOURS.get(row.state, "")),
                _progress(row),
            )
        return table


def _progress(row: Row) -> RenderableType:
    """A bar while weights load, else the last trouble."""
    if row.weights_fraction is None:
        return Text(row.detail, style="red")
    return ProgressBar(total=1.0, completed=row.weights_fraction, width=BAR_WIDTH)
