"""TCP ports of this machine."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator

from shared.errors import SettingsError

LOCALHOST = "127.0.0.1"
_PORTS = range(18_000, 32_768)
"""Below what Linux, macOS and Windows give to outgoing connections: any connection of this machine
could otherwise take a port in the time between our choice and its owner's start."""


def _walk() -> Iterator[int]:
    """Every port again and again from a random one on, so that none is chosen twice in a row."""
    start = random.randrange(len(_PORTS))
    while True:
        yield _PORTS[start % len(_PORTS)]
        start += 1


_NEXT = _walk()


def free_port(host: str = LOCALHOST) -> int:
    """A port that nothing listens on; see `free_ports`."""
    return free_ports(1, host)


def free_ports(count: int, host: str = LOCALHOST) -> int:
    """The first of `count` ports in a row that nothing listens on.

    Another program that asks for one of them by number may still come before us. Raises `OSError`
    where the host is none of this machine, or no port is free.
    """
    row: list[int] = []
    for _ in range(len(_PORTS)):
        port = next(_NEXT)
        try:
            with socket.socket(_family(host)) as probe:
                probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            row = []
            continue
        row = [*row, port] if row and port == row[-1] + 1 else [port]
        if len(row) == count:
            return row[0]
    raise OSError(errno.EADDRINUSE, f"no {count} free ports in a row")


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
