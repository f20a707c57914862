"""The launcher's folder: temporary by default, swept after a launcher that was killed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from services.launcher.data_dir import PREFIX, owned_data_dir
from shared.errors import SettingsError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_temporary_folder_ends_with_the_block(temporary: Path) -> None:
    with owned_data_dir(None) as folder:
        (folder / "jetstream").mkdir()
        assert folder.parent == temporary
    assert list(temporary.iterdir()) == []


def test_a_chosen_folder_stays(tmp_path: Path) -> None:
    with owned_data_dir(tmp_path / "a" / "b") as folder:
        (folder / "x").touch()
    assert (tmp_path / "a" / "b" / "x").exists()


def test_folders_of_dead_launchers_are_removed_and_others_are_not(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    orphan = temporary / f"{PREFIX}{dead.pid}-abc"
    living = temporary / f"{PREFIX}{os.getpid()}-abc"
    other = temporary / "somebody-elses"
    for folder in (orphan, living, other):
        folder.mkdir()
    with owned_data_dir(None):
        assert not orphan.exists()
        assert living.exists()
        assert other.exists()


def test_a_chosen_folder_that_cannot_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SettingsError, match="--data-dir = .*: File exists"), owned_data_dir(file):
        pass
