"""Memory that a thread uses again, so that the system need not clear new pages each time.

In: a name and a size. Out: float32 values, uninitialised, valid until the thread asks for the same
name again. A thread keeps the largest that it ever asked for.
"""

from __future__ import annotations

import threading

import torch


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.of_name: dict[str, torch.Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, *shape: int) -> torch.Tensor:
    """A float32 tensor of this shape."""
    size = torch.Size(shape).numel()
    buffer = _buffers.of_name.get(name)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # usable inside and outside of it
            buffer = _buffers.of_name[name] = torch.empty(size, dtype=torch.float32)
    return buffer[:size].view(shape)
