"""How much the gateway takes on: requests at work, and bytes of their bodies and pictures."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager

from services.gateway.problems import Problem, Refused, overloaded
from services.gateway.settings import AdmissionSettings


class Slot:
    """One admitted request's share of the memory bound."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.held_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """Count bytes that live as long as the request. Raises `Refused` (503) at the bound."""
        self._admission.reserve(num_bytes)
        self.held_bytes += num_bytes


class Admission:
    """Counts; every refusal says what was asked for, the limit, and when to try again."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        self.num_in_flight = 0
        self.held_bytes = 0

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """A place for one request, given back at the end together with all bytes it held."""
        limit = self._settings.max_in_flight
        if self.num_in_flight >= limit:
            raise overloaded(
                f"{limit} requests are at work, the most that this gateway takes",
                self._settings.retry_after_s,
            )
        slot = Slot(self)
        self.num_in_flight += 1
        try:
            yield slot
        finally:
            self.num_in_flight -= 1
            self.held_bytes -= slot.held_bytes

    def reserve(self, num_bytes: int) -> None:
        """Raises `Refused` (503) if all requests together would hold too much."""
        limit = self._settings.max_held_bytes
        if self.held_bytes + num_bytes > limit:
            raise overloaded(
                f"the requests at work hold {self.held_bytes} bytes, the limit is {limit}",
                self._settings.retry_after_s,
            )
        self.held_bytes += num_bytes

    async def read_body(
        self, slot: Slot, chunks: AsyncIterable[bytes], content_length: str | None
    ) -> bytes:
        """The body within the limit, held by the slot; see `read_bounded`."""
        limit = self._settings.max_body_bytes
        return await read_bounded(chunks, content_length, limit=limit, hold=slot.hold)


async def read_bounded(
    chunks: AsyncIterable[bytes],
    content_length: str | None,
    *,
    limit: int,
    hold: Callable[[int], None] = lambda num_bytes: None,
) -> bytes:
    """A body, refused (413) by its announced size or as soon as it grows beyond `limit` bytes.

    `hold` hears of every piece before it is kept.
    """

    def check(num_bytes: int) -> None:
        if num_bytes > limit:
            message = f"the body has {num_bytes} bytes or more, the limit is {limit}"
            raise Refused(Problem(413, message, code="body_too_large"))

    if content_length is not None and content_length.isdigit():
        check(int(content_length))
    body = bytearray()
    async for chunk in chunks:
        check(len(body) + len(chunk))
        hold(len(chunk))
        body += chunk
    return bytes(body)
