"""`triptych demo`: start everything on the demo model, ask one question, stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from rich.console import Console

from services.launcher.board import Board
from services.launcher.settings import LauncherSettings
from services.launcher.stack import running
from shared.errors import SettingsError, TriptychError
from shared.runtime.flags import flag
from shared.runtime.lifecycle import Stop, run_service
from shared.runtime.settings import settings_or_exit

PICTURE = Path(__file__).parents[2] / "examples/pictures/plate-57.png"


class DemoSettings(LauncherSettings):
    """Starts everything, asks one question about one picture, shows where the time went, stops."""

    EXAMPLES: ClassVar[str] = """\
examples:
  triptych demo
  triptych demo --picture cat.jpg --question "What is this?" --model DIR"""

    # Any free port: the demo must work beside a server that already runs.
    port: int = Field(
        0, ge=0, le=65535, description="Port that the gateway listens on; 0: any free one"
    )
    ready_timeout_s: float = Field(
        180.0, gt=0, description="Seconds until the start counts as failed"
    )
    picture: Path = Field(
        PICTURE,
        description="Picture to ask about",
        json_schema_extra=flag("picture", "FILE"),
    )
    question: str = Field("What number is on the plate?", description="What to ask")


class DemoFailed(TriptychError):
    """The question got no answer; `ask` has said why."""


def main(argv: Sequence[str]) -> None:
    settings = settings_or_exit(DemoSettings, argv, "triptych demo")
    run_service(lambda stop: demonstrate(settings, stop))


async def demonstrate(settings: DemoSettings, stop: Stop) -> None:
    """One question from start to end; raises unless it was answered."""
    if not settings.picture.is_file():
        raise SettingsError(f"--picture = {str(settings.picture)!r}: there is no such file")
    board = Board(Console(), settings.telemetry.log_level)
    async with running(settings, board) as stack:
        if not await stack.until_ready(stop, settings.ready_timeout_s):
            raise DemoFailed(f"stopped by {stop.reason} before everything was ready")
        board.close()
        board.line(f"ready {stack.url}", "bold green")
        board.line(f"> {settings.question}")
        exit_code = await stack.run_beside(stop, *ask_command(settings, stack.url))
    if exit_code != 0:
        raise DemoFailed("the demo's question was not answered")


def ask_command(settings: DemoSettings, url: str) -> tuple[str, ...]:
    """The `triptych ask` that a user would type."""
    return (
        *(sys.executable, "-m", "services.cli", "ask"),
        *(str(settings.picture), settings.question, "--url", url),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
