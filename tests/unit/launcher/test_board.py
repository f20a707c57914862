"""What the launcher prints, without and with a terminal."""

import io

import pytest
from rich.console import Console

from services.launcher.board import Board
from services.launcher.log_line import LogLine


def board(*, terminal: bool) -> tuple[Board, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, no_color=True)
    return Board(console, show_level="warning"), out


def tell(shown: Board) -> None:
    shown.started("decode-0", 42)
    loading = {"bytes_done": 1, "bytes_total": 4}
    shown.said("decode-0", LogLine("info", "weights_loading", loading))
    shown.said("decode-0", LogLine("info", "chatter"))
    shown.said("decode-0", LogLine("error", "pool [empty]", {"free": 0}))
    shown.said("decode-0", LogLine("info", "ready"))
    shown.ended("decode-0", "was killed by SIGKILL", 0.5)
    shown.stopped("decode-0")


def test_in_a_pipe_each_change_is_a_plain_line() -> None:
    shown, out = board(terminal=False)
    shown.open()
    tell(shown)
    shown.close()
    assert out.getvalue().splitlines() == [
        "decode-0: started (pid 42)",
        "decode-0: error: pool [empty] free=0",
        "decode-0: ready",
        "decode-0: was killed by SIGKILL; starting it again in 0.5 s",
        "decode-0: stopped",
    ]


def test_on_a_terminal_troubles_stay_above_the_table() -> None:
    shown, out = board(terminal=True)
    shown.open()
    tell(shown)
    shown.close()
    text = out.getvalue()
    assert "pool [empty] free=0" in text
    assert "chatter" not in text
    assert "started (pid 42)" not in text


def test_after_the_table_a_process_that_came_back_is_news() -> None:
    shown, out = board(terminal=True)
    shown.started("decode-0", 42)
    shown.said("decode-0", LogLine("info", "ready"))
    assert "decode-0: ready" in out.getvalue()
    assert "started" not in out.getvalue()


def test_the_state_follows_the_news() -> None:
    shown, _ = board(terminal=False)
    shown.started("decode-0", 42)
    assert shown.rows["decode-0"].state == "starting"
    loading = {"bytes_done": 1, "bytes_total": 4}
    shown.said("decode-0", LogLine("info", "weights_loading", loading))
    assert (shown.rows["decode-0"].state, shown.rows["decode-0"].weights_fraction) == (
        "loading",
        0.25,
    )
    shown.all_ready()
    assert shown.rows["decode-0"].state == "ready"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_worker_hosts_is_shown(terminal: bool) -> None:
    shown, out = board(terminal=terminal)
    shown.open()
    shown.hosts("worker-0", "prefill decode")
    shown.started("worker-0", 42)
    shown.close()
    assert "prefill decode" in out.getvalue()
