"""One picture, or one part of it, on its way through the tower."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from shared.model.towers.base import TowerInput


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
