"""Model folders that are built when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def built_once(
    build: Callable[[str, Path], Path], made: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Family name -> its folder, which `build` fills the first time."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = build(name, made.mktemp(name))
        return folders[name]

    return folder_of
