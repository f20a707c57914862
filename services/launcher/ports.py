"""TCP ports of this machine."""

from __future__ import annotations

import socket

from shared.errors import SettingsError


def free_port(host: str) -> int:
    """A port that nothing listens on now; somebody else may still take it before we do."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def claim(host: str, port: int) -> int:
    """The port to listen on: any free one for 0, else `port` if it is free.

    Raises `SettingsError` where it is taken; better now than as a crash of a child.
    """
    try:
        if port == 0:
            return free_port(host)
        with socket.socket(_family(host)) as probe:
            # As servers do: a port that only waits out old connections counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except socket.gaierror as error:
        raise SettingsError(f"--host = {host!r}: {error.strerror}") from None
    except OSError as error:
        raise SettingsError(
            f"--port = {port}: cannot listen on {host}: {error.strerror}; choose another --port"
        ) from None
    return port


def url_of(host: str, port: int) -> str:
    """Where a client on this machine finds what listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
