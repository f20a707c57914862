"""The tests of tests/gpu on the CPU: the same bodies under triton's interpreter.

Triton decides when it is imported whether it interprets, hence a process for each file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = (
    "test_attention",
    "test_elementwise",
    "test_few_rows",
    "test_model",
    "test_streams",
    "test_towers",
    "test_window_attention",
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(name: str, repository: Path) -> None:
    file = f"tests/gpu/{name}.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) >= 2


def test_no_file_is_left_out(repository: Path) -> None:
    files = {path.stem for path in (repository / "tests/gpu").glob("test_*.py")}
    assert files == set(FILES)
