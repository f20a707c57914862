"""The demo model in one process."""

from __future__ import annotations

from tests.support.demo_engine import engine, folder, prompts

__all__ = ["engine", "folder", "prompts"]
