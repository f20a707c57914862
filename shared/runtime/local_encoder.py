"""The encoder of a process as its prefill stage sees it: asked directly, without the queue."""

from __future__ import annotations

from typing import Protocol

from shared.messages.work import EncodeTask


class LocalEncoder(Protocol):
    """What a stage that encodes offers to others in its process."""

    @property
    def is_open(self) -> bool:
        """Whether it takes work at all: not before it runs, and not once it drains."""
        ...

    @property
    def num_held_patches(self) -> int:
        """Work that it has taken and not finished."""
        ...

    async def encode_now(self, task: EncodeTask) -> None:
        """Make the embedding and announce it, or return because another worker has it or makes it.

        Raises `RequestFailed`.
        """
        ...
