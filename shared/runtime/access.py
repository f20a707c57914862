"""Keys between clients and a gateway: where each side has them from.

In: settings and flags. Out: files of keys for the gateway, a header for whoever asks. What a key
allows is the gateway's to say (`services/gateway/access.py`).
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from shared.errors import SettingsError
from shared.runtime.flags import flag
from shared.runtime.settings import Group

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_KEY_CHARS = 512


class AccessSettings(Group):
    """Who may ask."""

    api_key_file: Path | None = Field(
        None,
        description="File with clients' keys, one a line: each request needs one of them, as "
        "'Authorization: Bearer KEY'; without it anybody may ask",
        json_schema_extra=flag("api-key-file", "FILE"),
    )
    operator_key_file: Path | None = Field(
        None,
        description="File with operators' keys, one a line, for /v1/roles and all else; without "
        "it nobody changes roles where clients need keys, and anybody does where they do not",
        json_schema_extra=flag("operator-key-file", "FILE"),
    )


@dataclass(frozen=True, slots=True)
class Server:
    """A gateway as a command line tool knows it."""

    url: str = DEFAULT_URL
    api_key: str = field(default="", repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """What each request carries."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


LOCAL = Server()


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """`--url` and `--api-key`; `server_of` reads them."""
    url = os.environ.get("TRIPTYCH_URL", DEFAULT_URL)
    parser.add_argument("--url", default=url, help=f"gateway [default {url}; TRIPTYCH_URL]")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("TRIPTYCH_API_KEY", ""),
        metavar="KEY",
        help="key that the gateway asks for [TRIPTYCH_API_KEY, which other users cannot list]",
    )


def server_of(given: argparse.Namespace) -> Server:
    """The gateway that was named. Raises `SettingsError`."""
    if not given.url.startswith(("http://", "https://")):
        raise SettingsError(f"--url = {given.url!r}: should begin with http:// or https://")
    if given.api_key and not is_key(given.api_key):
        raise SettingsError(
            f"--api-key: should be 1 to {MAX_KEY_CHARS} visible ASCII characters without spaces"
        )
    return Server(given.url, given.api_key)


def is_key(text: str) -> bool:
    """Whether it can travel in a header."""
    return 0 < len(text) <= MAX_KEY_CHARS and all("!" <= character <= "~" for character in text)
