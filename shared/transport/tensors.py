"""Tensors as plain bytes for the transport, without a copy."""

from __future__ import annotations

import torch

from shared.transport.base import Buffer


def byte_view(tensor: torch.Tensor) -> Buffer:
    """The memory of a contiguous tensor as a flat buffer of bytes.

    On the CPU a numpy array (numpy has no bfloat16, hence the detour over bytes); on a GPU the
    tensor itself as bytes, which carries `__cuda_array_interface__`.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} must be contiguous to be sent")
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return flat.numpy() if flat.device.type == "cpu" else flat


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, once a GPU has done what it was asked to do with it so far. Blocks.

    Whoever offers memory to a transport must know that it is written: a transport knows no streams.
    """
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor
