"""Which attention a device gets.

In: a device. Out: an attention backend. Importing this module needs no triton.
"""

from __future__ import annotations

import torch

from shared.model.attention import AttentionBackend, SdpaAttention
from shared.model.gpu.fused import has_triton


def backend_for(device: torch.device | str, num_heads: int) -> AttentionBackend:
    """Our kernels on CUDA, where triton comes with torch; PyTorch's attention everywhere else.

    `num_heads` is the model's number of query heads.
    """
    if torch.device(device).type != "cuda" or not has_triton():
        return SdpaAttention()
    from shared.model.gpu.attention import TritonAttention

    return TritonAttention(num_heads)
