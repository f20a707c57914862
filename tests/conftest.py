"""What every test shares: markers by folder, one torch thread, a quiet environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Set before torch is imported anywhere: with several processes per test, one thread each is both
# faster and steadier than each claiming every core. Children inherit it.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """A developer's own settings must not leak into a test."""
    for name in [name for name in os.environ if name.startswith("TRIPTYCH_")]:
        del os.environ[name]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the name of its folder: tests/unit/... is `unit`, and so on."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        item.add_marker(folder)


@pytest.fixture
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return TESTS.parent
