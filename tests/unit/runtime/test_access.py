"""Where a command line tool has the gateway's address and key from."""

from __future__ import annotations

import argparse

import pytest

from shared.errors import SettingsError
from shared.runtime.access import Server, add_server_flags, server_of


def server(*argv: str) -> Server:
    parser = argparse.ArgumentParser()
    add_server_flags(parser)
    return server_of(parser.parse_args(argv))


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_URL", "http://there:1")
    monkeypatch.setenv("TRIPTYCH_API_KEY", "theirs")
    assert server() == Server("http://there:1", "theirs")
    assert server("--url", "https://here", "--api-key", "mine") == Server("https://here", "mine")


def test_a_key_is_sent_and_not_shown() -> None:
    given = server("--api-key", "mine")
    assert given.headers == {"authorization": "Bearer mine"}
    assert "mine" not in repr(given)
    assert server().headers == {}


@pytest.mark.parametrize("key", ["two words", "sch\u00f6n", "x" * 513])
def test_what_is_no_key_is_told_without_showing_it(key: str) -> None:
    with pytest.raises(SettingsError, match="--api-key: should be 1 to 512 visible") as caught:
        server("--api-key", key)
    assert key not in str(caught.value)


def test_an_address_has_a_scheme() -> None:
    with pytest.raises(SettingsError, match="'localhost:8000': should begin with http"):
        server("--url", "localhost:8000")
