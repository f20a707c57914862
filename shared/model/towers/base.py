"""What every tower does. Nothing here knows the language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from shared.model.tower_families import TowerFamily
from shared.model.towers.pixels import Pixels
from shared.model.vision.spec import VisionSpec


class TowerInput(Protocol):
    """One preprocessed medium."""

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """As the gateway has computed it."""
        ...

    @property
    def num_patches(self) -> int:
        """What the tower's work is measured in."""
        ...


class Tower(ABC):
    """One tower, its projector and their weights."""

    def __init__(self, module: nn.Module, spec: Any) -> None:
        self.module = module
        self.spec = spec

    @staticmethod
    @abstractmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        """The modules of transformers that make up the tower, from the model's whole config.

        Runs on the meta device; no part of the language model may be built.
        """

    @abstractmethod
    def encode(self, media: Sequence[Any]) -> list[torch.Tensor]:
        """Embed several media in one call.

        Returns one `[num_tokens_i, embedding_width]` per medium, in the tower's dtype: the rows
        that replace its placeholders. They may be views of one tensor.
        """

    def quicken(self) -> None:
        """Take the device's own kernels for the same results, once the weights are loaded. Blocks.

        Towers without any stay as they are.
        """
        return

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Every checkpoint name of the tower's part and the tensor it fills."""
        return {name: parameter.data for name, parameter in self.module.named_parameters()}


class VisionTower(Tower):
    """A tower for pictures."""

    spec: VisionSpec

    @abstractmethod
    def encode(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        """Pictures packed in one call."""

    def pack(self, pictures: Sequence[Pixels]) -> torch.Tensor:
        """All pictures' values in one tensor, where and as the tower computes."""
        return torch.cat([each.values for each in pictures]).to(self.device, self.dtype)
