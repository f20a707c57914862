"""Media by http(s) URL: denied unless an operator has listed the host.

In: a URL from a request. Out: bytes, at most so many and in at most so many seconds. Every name is
resolved once, every address it has must be public, and the connection goes to the address that was
checked, so a name that changes its address in between gains nothing. Redirects are followed by
hand and each goes through the same checks. Proxies from the environment are not used: behind one,
the address could not be checked.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from shared.errors import FailureKind, RequestFailed
from shared.media.address import is_public_address

Resolve = Callable[[str, int], Awaitable[list[str]]]
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What may be fetched.

    `allowed_hosts`: `example.org` is that host, `.example.org` any host below it; `host:port`
    allows another port than the scheme's own. Empty: nothing may be fetched.
    """

    allowed_hosts: tuple[str, ...] = ()
    max_bytes: int = 16 * 1024 * 1024
    timeout_s: float = 10.0
    max_redirects: int = 3

    def allows(self, host: str, port: int, scheme: str) -> bool:
        """Whether the allow-list names this host, on this port."""
        candidates = {f"{host}:{port}"}
        if port == _DEFAULT_PORTS[scheme]:
            candidates.add(host)
        return any(
            candidate == entry or (entry.startswith(".") and candidate.endswith(entry))
            for entry in map(str.lower, self.allowed_hosts)
            for candidate in candidates
        )


async def resolve_with_system(host: str, port: int) -> list[str]:
    """Every address that the system knows for a host."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _refused(f"{host} cannot be resolved") from error
    return sorted({str(entry[4][0]) for entry in found})


class MediaFetcher:
    """Fetches under one policy. `transport` and `resolve` are replaced in tests."""

    def __init__(
        self,
        policy: FetchPolicy,
        *,
        resolve: Resolve = resolve_with_system,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._policy = policy
        self._resolve = resolve
        self._client = httpx.AsyncClient(
            transport=transport, trust_env=False, follow_redirects=False, timeout=policy.timeout_s
        )

    async def close(self) -> None:
        """Drop idle connections; idempotent."""
        await self._client.aclose()

    async def fetch(self, url: str) -> bytes:
        """Raises `RequestFailed` (bad request) for a URL that is not allowed or not answered."""
        try:
            async with asyncio.timeout(self._policy.timeout_s):
                return await self._follow(url)
        except TimeoutError as error:
            raise _refused(f"no answer within {self._policy.timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise _refused(f"the host did not answer properly ({type(error).__name__})") from error

    async def _follow(self, url: str) -> bytes:
        for _ in range(self._policy.max_redirects + 1):
            checked = self._check_url(url)
            pinned = await self._pin(checked)
            async with self._client.stream(
                "GET",
                checked.copy_with(host=pinned),
                headers={"host": checked.netloc.decode(), "accept": "image/*, video/*, audio/*"},
                extensions={"sni_hostname": checked.host},
            ) as response:
                if not response.has_redirect_location:
                    return await self._read(response)
                url = str(checked.join(response.headers["location"]))
        raise _refused(f"more than {self._policy.max_redirects} redirects")

    def _check_url(self, url: str) -> httpx.URL:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise _refused("it is not a valid URL") from error
        if parsed.scheme not in _DEFAULT_PORTS:
            raise _refused("only data:, http: and https: URLs are known")
        if parsed.userinfo:
            raise _refused("it must not carry a user name or a password")
        host = parsed.raw_host.decode("ascii").lower().rstrip(".")
        port = parsed.port or _DEFAULT_PORTS[parsed.scheme]
        if not host or not self._policy.allows(host, port, parsed.scheme):
            raise _refused(
                f"remote media from {host or 'nowhere'} are not allowed; send a data: URL"
            )
        return parsed.copy_with(host=host)

    async def _pin(self, url: httpx.URL) -> str:
        """One address of the host, after all of them passed."""
        port = url.port or _DEFAULT_PORTS[url.scheme]
        addresses = await self._resolve(url.host, port)
        if not addresses or not all(map(is_public_address, addresses)):
            raise _refused("its host is not on the public internet")
        return addresses[0]

    async def _read(self, response: httpx.Response) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise _refused(f"the host answered with status {response.status_code}")
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > self._policy.max_bytes:
                raise _refused(f"it is larger than the limit of {self._policy.max_bytes} bytes")
        return bytes(body)


def _refused(reason: str) -> RequestFailed:
    return RequestFailed(FailureKind.BAD_REQUEST, f"media URL refused: {reason}")
