"""Unit tests stay quick because nothing in them imports torch, not even on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROBE = """
import sys, pytest
code = pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "tests/unit"])
print("HEAVY", sorted({"torch", "transformers", "ucxx"} & set(sys.modules)))
raise SystemExit(code)
"""


def test_collecting_them_imports_no_torch(repository: Path) -> None:
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=repository, capture_output=True, text=True, check=False
    )
    assert probe.returncode == 0, probe.stdout[-2000:]
    assert probe.stdout.strip().endswith("HEAVY []")
