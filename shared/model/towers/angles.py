"""Angles of rotation as our kernels take them, worked out once in a call of a tower.

In: cosines and sines of patches as transformers hands them to every layer. Out: cosines and signed
sines.
"""

from __future__ import annotations

import torch

CosSin = tuple[torch.Tensor, torch.Tensor]


class SharedAngles:
    """For all layers of one tower, and for one call at a time."""

    def __init__(self) -> None:
        self._source: CosSin | None = None
        self._angles: CosSin | None = None

    def of(self, source: CosSin) -> CosSin:
        """Cosines and signed sines `[num_patches, 1, head_dim]` float32, from cosines and sines
        `[num_patches, head_dim]`."""
        if source is not self._source or self._angles is None:
            cos, sin = (each.float() for each in source)
            half = sin.shape[-1] // 2
            signed = torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)
            self._source, self._angles = source, (cos[:, None].contiguous(), signed[:, None])
        return self._angles
