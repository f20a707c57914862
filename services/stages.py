"""The only module that knows all stages: from a role to a running worker."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from shared.messages.control import Role
from shared.runtime.host import serve_worker
from shared.runtime.lifecycle import run_service
from shared.runtime.settings import settings_or_exit

STAGES = {
    Role.ENCODE: ("encoder", "EncoderSettings"),
    Role.PREFILL: ("prefill", "PrefillSettings"),
    Role.DECODE: ("decode", "DecodeSettings"),
}
"""Role -> (package under `services`, its settings class)."""


def run_stage(role: Role, argv: Sequence[str] | None) -> None:
    """Run one worker of a role until it is told to stop. Only that role's modules are imported."""
    package, settings_name = STAGES[role]
    settings_module = importlib.import_module(f"services.{package}.settings")
    settings: Any = settings_or_exit(
        getattr(settings_module, settings_name),
        sys.argv[1:] if argv is None else argv,
        f"triptych {package}",
    )
    build = importlib.import_module(f"services.{package}.build").build
    run_service(lambda stop: serve_worker(role, settings, build, stop))
