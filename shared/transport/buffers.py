"""Memory as flat bytes, whatever object holds it.

In: objects with the buffer protocol, `__array_interface__` or `__cuda_array_interface__`. Out:
views of the same memory, never a copy. Knows no tensor library.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shared.messages.refs import TensorRef
from shared.transport.base import Buffer

ByteArray = npt.NDArray[np.uint8]


def is_on_device(buffer: Buffer) -> bool:
    """Whether the memory is a GPU's."""
    return hasattr(buffer, "__cuda_array_interface__")


def host_bytes(buffer: Buffer) -> ByteArray:
    """View host memory as bytes. Raises `ValueError` if scattered, `TypeError` if it is none."""
    if not hasattr(buffer, "__array_interface__"):
        return np.frombuffer(buffer, dtype=np.uint8)
    array = np.asarray(buffer)
    if not array.flags.c_contiguous:
        raise ValueError(f"memory of shape {array.shape}, strides {array.strides} is scattered")
    return array.reshape(-1).view(np.uint8)


def landing_bytes(buffer: Buffer) -> ByteArray:
    """View host memory that is to be written. Raises `ValueError` if it is read-only."""
    view = host_bytes(buffer)
    if not view.flags.writeable:
        raise ValueError(f"{view.nbytes} bytes of landing memory are read-only")
    return view


def num_bytes_of(buffer: Buffer) -> int:
    """Bytes of a buffer on host or device."""
    if not is_on_device(buffer):
        return int(host_bytes(buffer).nbytes)
    interface = buffer.__cuda_array_interface__
    num_items = math.prod(interface["shape"])
    return int(num_items * np.dtype(interface["typestr"]).itemsize)


def checked_landing(ref: TensorRef, segment: int, into: Buffer) -> Buffer:
    """Memory to receive a segment into. Raises `ValueError` unless writeable and of its size."""
    if not 0 <= segment < len(ref.segment_bytes):
        raise ValueError(f"segment {segment} of {len(ref.segment_bytes)}")
    landing = into if is_on_device(into) else landing_bytes(into)
    if num_bytes_of(landing) != ref.segment_bytes[segment]:
        raise ValueError(
            f"segment {segment} has {ref.segment_bytes[segment]} bytes, "
            f"there is room for {num_bytes_of(landing)}"
        )
    return landing
