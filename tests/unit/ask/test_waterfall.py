"""The waterfall's arithmetic and its drawing without colours."""

import io

from rich.console import Console

from services.ask.span import Kind, Span
from services.ask.waterfall import Row, layout, print_waterfall

MS = 1_000_000
T0 = 1_700_000_000_000_000_000


def span(name: str, start_ms: float, end_ms: float, who: str = "w") -> Span:
    return Span(name, who, T0 + round(start_ms * MS), T0 + round(end_ms * MS))


def test_bars_are_placed_in_proportion() -> None:
    rows = layout(
        [span("request", 0, 100), span("prefill", 50, 100), span("queue.prefill", 25, 50)], width=20
    )
    assert rows == [
        Row("request", "w", Kind.WHOLE, 0, 20, 0.0, 100.0),
        Row("queue.prefill", "w", Kind.QUEUE, 5, 5, 25.0, 25.0),
        Row("prefill", "w", Kind.COMPUTE, 10, 10, 50.0, 50.0),
    ]


def test_a_short_span_keeps_one_column_inside_the_drawing() -> None:
    rows = layout([span("request", 0, 100), span("transfer.kv", 99.9, 100)], width=10)
    assert (rows[1].column, rows[1].num_columns) == (9, 1)
    assert rows[1].kind is Kind.TRANSFER


def test_among_spans_that_begin_together_the_longest_comes_first() -> None:
    names = [row.name for row in layout([span("b", 0, 1), span("a", 0, 5)], width=10)]
    assert names == ["a", "b"]


def test_no_spans_and_spans_without_length() -> None:
    assert layout([], width=10) == []
    assert layout([span("x", 0, 0)], width=10) == [Row("x", "w", Kind.COMPUTE, 0, 1, 0.0, 0.0)]


def test_drawing_without_a_terminal() -> None:
    out = io.StringIO()
    print_waterfall(
        [
            span("request", 0, 100, "gateway-0"),
            span("queue.encode", 0, 20, "encoder-0"),
            span("encode", 20, 60, "encoder-0"),
            span("transfer.kv", 60, 80, "decode-0"),
            span("decode", 80, 100, "decode-0"),
        ],
        Console(file=out, width=56),
    )
    assert out.getvalue().splitlines() == [
        "request       gateway-0  --------------------   100.0 ms",
        "queue.encode  encoder-0  ....                    20.0 ms",
        "encode        encoder-0      ########            40.0 ms",
        "transfer.kv   decode-0               >>>>        20.0 ms",
        "decode        decode-0                   ####    20.0 ms",
        ".. queue   >> transfer   ## compute",
    ]


def test_a_terminal_without_colours_gets_letters() -> None:
    out = io.StringIO()
    console = Console(file=out, width=56, force_terminal=True, no_color=True)
    print_waterfall([span("request", 0, 100), span("queue.encode", 0, 20)], console)
    assert ".. queue   >> transfer   ## compute" in out.getvalue()


def test_a_record_of_the_gateway_becomes_a_span() -> None:
    record = {
        "trace_id": "t",
        "span_id": "s",
        "parent_id": None,
        "name": "queue.decode",
        "service": "decode",
        "instance": "decode-1",
        "start_unix_ns": 5,
        "end_unix_ns": 2_000_005,
        "attributes": {},
    }
    assert Span.from_record(record) == Span("queue.decode", "decode-1", 5, 2_000_005)
    assert Span.from_record(record).duration_ms == 2.0
