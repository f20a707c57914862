"""What is known of the way to one embedding, or to one part of a divided one."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.messages.descriptor import MediaItem, MediaPart, RequestDescriptor


@dataclass
class Search:
    """One attempt's way to one embedding, or to one part of it."""

    request: RequestDescriptor
    item: MediaItem
    asked_s: float
    part: MediaPart | None = None
    lost_lease_ids: list[str] = field(default_factory=list)
    num_asked: int = 0
    last_loss: str = "nobody announced it"

    @property
    def key(self) -> str:
        """The content key of what is looked for."""
        return self.item.content_key if self.part is None else self.part.content_key

    @property
    def num_patches(self) -> int:
        """The tower's work for it."""
        return self.item.num_patches if self.part is None else self.part.num_patches
