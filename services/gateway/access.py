"""Who may ask and who may change roles: keys from files, and the check of a request's header.

In: the access settings, once, and each request's `Authorization`. Out: nothing, or a `Refused`.
Keys are kept and compared as digests: how long a comparison takes says nothing about a key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

from services.gateway.problems import Problem, Refused
from shared.errors import SettingsError
from shared.runtime.access import MAX_KEY_CHARS, AccessSettings, is_key

MAX_FILE_CHARS = 1024 * 1024

_NO_KEY = "a key is needed here: send it as 'Authorization: Bearer KEY'"
_WRONG_KEY = "the key in 'Authorization' is not one that may do this"
_NO_OPERATORS = (
    "this gateway asks clients for keys and knows none of operators: "
    "start it with --operator-key-file"
)


@dataclass(frozen=True, slots=True)
class Access:
    """Digests of keys. Without keys of clients anybody may ask; an operator may do all."""

    clients: frozenset[bytes] = frozenset()
    operators: frozenset[bytes] = frozenset()

    @classmethod
    def load(cls, settings: AccessSettings) -> Access:
        """Read the key files. Raises `SettingsError` that names the file, never a key. Blocks."""
        return cls(
            _read("--api-key-file", settings.api_key_file),
            _read("--operator-key-file", settings.operator_key_file),
        )

    async def client(self, request: Request) -> None:
        """A route's dependency: this request may ask. Raises `Refused`."""
        if self.clients:
            _require(request, self.clients | self.operators)

    async def operator(self, request: Request) -> None:
        """A route's dependency: this request may change roles. Raises `Refused`."""
        if self.operators:
            _require(request, self.operators)
        elif self.clients:
            raise Refused(Problem(403, _NO_OPERATORS, code="no_operators"))


OPEN = Access()
"""Anybody may do anything."""


def _require(request: Request, allowed: frozenset[bytes]) -> None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Refused(Problem(401, _NO_KEY, code="missing_api_key"))
    if _digest(key.strip()) not in allowed:
        raise Refused(Problem(401, _WRONG_KEY, code="invalid_api_key"))


def _read(flag: str, path: Path | None) -> frozenset[bytes]:
    """One key a line; empty lines and those that begin with # are none."""
    if path is None:
        return frozenset()
    setting = f"{flag} = {str(path)!r}"
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_FILE_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{setting}: cannot be read: {error}") from None
    if len(text) > MAX_FILE_CHARS:
        raise SettingsError(f"{setting}: should be at most {MAX_FILE_CHARS} characters")
    digests = set()
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not is_key(key):
            raise SettingsError(
                f"{setting}: line {number} is no key: should be 1 to {MAX_KEY_CHARS} visible ASCII "
                "characters without spaces"
            )
        digests.add(_digest(key))
    if not digests:
        raise SettingsError(f"{setting}: names no key: should have one a line")
    return frozenset(digests)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
