"""`triptych demo` as a newcomer runs it: a right answer, a waterfall, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(240)
STAGES = ("preprocess", "encode", "transfer", "prefill", "decode")


def own_processes(marker: str) -> list[psutil.Process]:
    """Live processes that carry our mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DEMO_TEST") == marker:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_demo_answers_and_leaves_nothing_behind(repository: Path, tmp_path: Path) -> None:
    marker = str(tmp_path)
    shm_before = set(os.listdir("/dev/shm"))
    temp_before = set(os.listdir(tempfile.gettempdir()))
    demo = subprocess.run(
        [sys.executable, "-m", "services.cli", "demo"],
        cwd=repository,
        env=os.environ | {"DEMO_TEST": marker},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    lines = [line.strip() for line in demo.stdout.splitlines()]
    assert "57" in lines, demo.stdout
    assert all(any(stage in line for line in lines) for stage in STAGES), demo.stdout
    assert own_processes(marker) == []
    assert {n for n in set(os.listdir("/dev/shm")) - shm_before if "ucx" in n} == set()
    left = set(os.listdir(tempfile.gettempdir())) - temp_before
    assert not [name for name in left if name.startswith("triptych")]
