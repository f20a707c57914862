"""TCP ports of this machine."""

from __future__ import annotations

import socket

from shared.errors import SettingsError


def free_port(host: str) -> int:
    """A port that nothing listens on now; somebody else may still take it before we do."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def claim(host: str, port: int) -> int:
    """The port to listen on: any free one for 0, else `port` if it is free.

    Raises `SettingsError` where it is taken; better now than as a crash of a child.
    """
    if port == 0:
        return free_port(host)
    with socket.socket() as probe:
        # As servers do: a port that only waits out old connections counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingsError(f"--port = {port}: cannot listen on {host}: {error}") from None
    return port
