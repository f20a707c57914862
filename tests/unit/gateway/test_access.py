"""Key files: what they may hold, and what is told about one that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.gateway.access import OPEN, Access
from shared.errors import SettingsError
from shared.runtime.access import AccessSettings


def load(path: Path) -> Access:
    return Access.load(AccessSettings(api_key_file=path))


def test_without_files_anybody_may_ask() -> None:
    assert Access.load(AccessSettings()) == OPEN


def test_keys_are_lines_and_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the web page\nalpha\n\n  beta  \nalpha\n")
    access = load(file)
    assert len(access.clients) == 2
    assert b"alpha" not in access.clients
    assert not access.operators


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# none\n\n", "names no key: should have one a line"),
        (b"good\ntwo words\n", "line 2 is no key: should be 1 to 512 visible ASCII"),
        (b"\xff\xfe", "cannot be read"),
        (b"a" * (1024 * 1024 + 1), "should be at most 1048576 characters"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load(file)
    assert f"--api-key-file = {str(file)!r}: " in str(caught.value)
    assert message in str(caught.value)
    assert "two words" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--operator-key-file = .*cannot be read"):
        Access.load(AccessSettings(operator_key_file=tmp_path / "none"))
