"""The gateway runs without torch, and does not import what would pull it in."""

import subprocess
import sys

PROGRAM = """
import sys
for name in ("torch", "transformers", "ucxx", "safetensors"):
    sys.modules[name] = None  # an import of it fails
import services.gateway.__main__
from services.gateway.model import ServedModel
from shared.runtime.settings import DEMO_MODEL
ServedModel.load("demo", DEMO_MODEL)
"""


def test_without_torch(repository):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=repository, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
