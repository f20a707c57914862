"""Ports and addresses of this machine."""

import socket

import pytest

from services.launcher.ports import claim, free_port, free_ports, url_of
from shared.errors import SettingsError


def test_a_taken_port_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"--port = {port}: cannot listen on 127.0.0.1"):
            claim("127.0.0.1", port)


def test_free_ports_differ_and_are_none_that_outgoing_connections_take() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        outgoing = client.getsockname()[1]
        assert max(ports) < 32_768 <= outgoing


def test_ports_in_a_row_go_around_a_taken_one() -> None:
    first = free_ports(3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 4))
        row = free_ports(3)
        assert not row <= first + 4 < row + 3
        assert [claim("127.0.0.1", port) for port in range(row, row + 3)] == [row, row + 1, row + 2]


def test_a_free_port_is_claimed_as_it_is() -> None:
    port = free_port("127.0.0.1")
    assert claim("127.0.0.1", port) == port


@pytest.mark.parametrize("port", [0, 8000])
def test_an_address_of_no_machine_is_a_wrong_host(port: int) -> None:
    with pytest.raises(SettingsError, match="--host = '300.0.0.1.'"):
        claim("300.0.0.1.", port)


def test_url() -> None:
    assert url_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert url_of("::1", 8000) == "http://[::1]:8000"
