"""One picture, or one part of it, on its way through the encoder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from shared.messages.descriptor import MediaPart
from shared.model.towers.base import TowerInput


class Preprocess(Protocol):
    """From a file to what the tower takes. Runs in a thread."""

    def __call__(self, data: bytes, part: MediaPart | None = None) -> TowerInput:
        """All of it, or one part. Raises `RequestFailed`."""
        ...


@dataclass(eq=False)
class EncodeJob:
    """Its pixels, and who waits for its rows. `began` is called when the tower takes it."""

    pixels: TowerInput
    began: Callable[[], None]
    done: asyncio.Future[torch.Tensor] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    started_s: float = 0.0
    ended_s: float = 0.0

    @property
    def num_patches(self) -> int:
        """Rows that the tower sees."""
        return self.pixels.num_patches
