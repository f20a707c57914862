"""The NATS bus against a real server that may be stopped."""

from __future__ import annotations

from tests.support.nats_server import nats_server, own_nats_server

__all__ = ["nats_server", "own_nats_server"]
