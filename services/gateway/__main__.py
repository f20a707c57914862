"""`python -m services.gateway`: the gateway as a process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.gateway.process import serve_gateway
from services.gateway.settings import GatewaySettings
from shared.runtime.lifecycle import run_service
from shared.runtime.settings import settings_or_exit


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to stop."""
    arguments = sys.argv[1:] if argv is None else argv
    settings = settings_or_exit(GatewaySettings, arguments, "triptych gateway")
    run_service(lambda stop: serve_gateway(settings, stop))


if __name__ == "__main__":
    main()
