"""`triptych up`: start everything, serve until told to stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from services.launcher.board import Board
from services.launcher.settings import LauncherSettings
from services.launcher.stack import running
from shared.runtime.lifecycle import Stop, run_service
from shared.runtime.settings import settings_or_exit


def main(argv: Sequence[str]) -> None:
    settings = settings_or_exit(LauncherSettings, argv, "triptych up")
    run_service(lambda stop: serve(settings, stop))


async def serve(settings: LauncherSettings, stop: Stop) -> None:
    """Run until the stop; raises where the start or a process fails for good."""
    board = Board(Console(), settings.telemetry.log_level)
    async with running(settings, board) as stack:
        if not await stack.until_ready(stop, settings.ready_timeout_s):
            return
        board.close()
        board.line(f"ready {stack.url}", "bold green")
        await stack.until_stopped(stop)
        board.line(f"{stop.reason}: stopping; running requests have {settings.drain_s:g} s to end")
    board.line("stopped")


if __name__ == "__main__":
    main(sys.argv[1:])
