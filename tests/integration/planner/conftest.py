"""Links are measured over a real server."""

from __future__ import annotations

from tests.support.nats_server import nats_server

__all__ = ["nats_server"]
