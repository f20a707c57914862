"""Machine code kept on disk belongs to the sources it was made from, all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.model.kernels.choice import has_compiled_kernels

pytestmark = pytest.mark.skipif(not has_compiled_kernels(), reason="needs numba")

KERNEL = """
from numba import carray
from amount import amount
from machine_code import compiled

@compiled
def tiny(arguments):
    carray(arguments, 1)[0] = amount()
"""
HELPER = """
from numba import njit

@njit
def amount():
    return {}
"""
USE = """
import ctypes
import numpy as np
from tiny import tiny

result = np.zeros(1, np.int64)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(tiny.address)(result.ctypes.data)
print(result[0], "found" if tiny.cache_hits else "compiled")
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A kernel in two files beside a copy of what compiles it."""
    from shared.model.kernels import machine_code

    folder = tmp_path / "sources"
    folder.mkdir()
    shutil.copy(machine_code.__file__, folder)
    (folder / "tiny.py").write_text(KERNEL)
    (folder / "amount.py").write_text(HELPER.format(1))
    return folder


def run(sources: Path, **environment: str) -> str:
    """What the kernel computes in a new process, and where its code came from."""
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=sources,
        env={**os.environ, "PYTHONPATH": str(sources), "NUMBA_CACHE_DIR": "", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_code_is_found_again_until_a_file_that_it_is_made_of_changes(sources: Path) -> None:
    assert run(sources) == "1 compiled"
    assert run(sources) == "1 found"
    (sources / "amount.py").write_text(HELPER.format(2))  # not the kernel's own file
    assert run(sources) == "2 compiled"
    assert run(sources) == "2 found"


def test_the_folder_that_the_user_names_comes_first(sources: Path, tmp_path: Path) -> None:
    named = tmp_path / "named"
    assert run(sources, NUMBA_CACHE_DIR=str(named)) == "1 compiled"
    assert [path.name[:16] for path in named.iterdir()] == ["triptych-kernels"]
    assert run(sources, NUMBA_CACHE_DIR=str(named)) == "1 found"


def test_without_a_writable_place_it_compiles_anew(sources: Path) -> None:
    # A file where the folder would be: holds for every user, root too.
    (sources / "blocked").write_text("")
    (sources / "__pycache__").write_text("")
    blocked = str(sources / "blocked")
    environment = {"NUMBA_CACHE_DIR": blocked, "XDG_CACHE_HOME": blocked}
    assert run(sources, **environment) == "1 compiled"
    assert run(sources, **environment) == "1 compiled"
