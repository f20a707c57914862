"""The folder for queued work and media: the user's own, or a temporary one that ends with us.

A launcher that was killed outright could not remove its folder; the next one does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.errors import SettingsError

PREFIX = "triptych-up-"


@contextlib.contextmanager
def owned_data_dir(chosen: Path | None) -> Iterator[Path]:
    """The folder to use inside the block; a temporary one is removed at its end."""
    if chosen is not None:
        _make(chosen)
        yield chosen
        return
    parent = Path(tempfile.gettempdir())
    remove_orphans(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--data-dir = {str(folder)!r}: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(f"--data-dir = {str(folder)!r}: not writable")


def remove_orphans(parent: Path) -> None:
    """Remove the folders whose launcher no longer runs."""
    for folder in parent.glob(f"{PREFIX}*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
