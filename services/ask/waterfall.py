"""A request's spans as bars over time.

In: spans. Out: rows whose bars have a column and a width, and their drawing. The layout is plain
arithmetic; colours are for terminals, letters for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from services.ask.span import NS_PER_MS, Kind, Span

LETTERS = {Kind.WHOLE: "-", Kind.QUEUE: ".", Kind.TRANSFER: ">", Kind.COMPUTE: "#"}
COLOURS = {
    Kind.WHOLE: "bright_black",
    Kind.QUEUE: "yellow",
    Kind.TRANSFER: "magenta",
    Kind.COMPUTE: "green",
}
BLOCK = "━"
MIN_BAR_COLUMNS = 20
MAX_BAR_COLUMNS = 60
MS_COLUMNS = 11


@dataclass(frozen=True, slots=True)
class Row:
    """One bar: `column` and `num_columns` within the drawing's width."""

    name: str
    who: str
    kind: Kind
    column: int
    num_columns: int
    start_ms: float
    duration_ms: float


def layout(spans: Sequence[Span], width: int) -> list[Row]:
    """Rows in the order in which the spans began, the longest first among equals.

    Every bar is at least one column wide and ends within `width` columns.
    """
    if not spans:
        return []
    start_ns = min(span.start_unix_ns for span in spans)
    total_ns = max(1, max(span.end_unix_ns for span in spans) - start_ns)
    ordered = sorted(spans, key=lambda span: (span.start_unix_ns, -span.end_unix_ns))
    return [_row(span, start_ns, total_ns, width) for span in ordered]


def _row(span: Span, start_ns: int, total_ns: int, width: int) -> Row:
    first = round((span.start_unix_ns - start_ns) / total_ns * width)
    last = round((span.end_unix_ns - start_ns) / total_ns * width)
    column = min(first, width - 1)
    return Row(
        name=span.name,
        who=span.who,
        kind=span.kind,
        column=column,
        num_columns=max(1, last - column),
        start_ms=(span.start_unix_ns - start_ns) / NS_PER_MS,
        duration_ms=span.duration_ms,
    )


def print_waterfall(spans: Sequence[Span], console: Console) -> None:
    """Draw it; nothing is printed where there are no spans."""
    if not spans:
        return
    names = max(len(span.name) for span in spans)
    whos = max(len(span.who) for span in spans)
    room = console.width - names - whos - MS_COLUMNS - 6
    width = max(MIN_BAR_COLUMNS, min(MAX_BAR_COLUMNS, room))
    coloured = (
        console.color_system is not None and not console.no_color and not console.options.ascii_only
    )
    for row in layout(spans, width):
        line = Text(f"{row.name:<{names}}  {row.who:<{whos}}  ")
        line.append(_bar(row, width, coloured=coloured))
        line.append(f"{row.duration_ms:{MS_COLUMNS - 3}.1f} ms")
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_legend(coloured=coloured), soft_wrap=True, highlight=False)


def _bar(row: Row, width: int, *, coloured: bool) -> Text:
    mark = BLOCK if coloured else LETTERS[row.kind]
    bar = Text(" " * row.column)
    bar.append(mark * row.num_columns, style=COLOURS[row.kind] if coloured else "")
    bar.append(" " * (width - row.column - row.num_columns))
    return bar


def _legend(*, coloured: bool) -> Text:
    legend = Text()
    for kind in (Kind.QUEUE, Kind.TRANSFER, Kind.COMPUTE):
        mark = BLOCK if coloured else LETTERS[kind]
        legend.append(f"{mark * 2} ", style=COLOURS[kind] if coloured else "")
        legend.append(f"{kind.value}   ")
    legend.rstrip()
    return legend
