"""A linear map whose rows come from one or several checkpoint tensors.

In: activations. Out: activations. Projections that read the same input are one matrix here, which
saves calls and lets one kernel stream the weights; the checkpoint keeps them apart, so a layer
names the row ranges for the loader. How the product is computed is a `LinearKernel`'s affair: it is
chosen once the weights are loaded (`shared/model/kernels/choice.py`), plain torch until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from shared.model.gpu import fused
from shared.model.gpu.parts import Parts


class Rows(StrEnum):
    """How many rows come at a time: those of decode steps, of prompts, or of both."""

    FEW = "few"
    MANY = "many"
    BOTH = "both"


class LinearKernel(Protocol):
    """One way to compute a linear map; holds its weight in whatever form it reads best."""

    @property
    def name(self) -> str:
        """For logs: what computes, and from which number format."""
        ...

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`, in x's dtype.

        A row's result must not depend on the rows beside it by more than float32 rounding.
        """
        ...


ChooseKernel = Callable[[torch.Tensor], LinearKernel]
"""From a loaded weight `[out_features, in_features]` to what will compute with it."""


class PlainKernel:
    """torch's own operator on the weight as it was loaded."""

    name = "plain"

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, self.weight, bias)


class FusedLinear(nn.Module):
    """`y = x W^T + b`; `parts` maps checkpoint names to their output widths, in row order.

    `decides`: its outputs are compared with each other to choose what else is computed, so it stays
    with the weights as they were loaded.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        decides: bool = False,
    ) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.decides = decides
        out_features = sum(self.parts.values())
        self.weight = _frozen(out_features, in_features, dtype=dtype)
        self.bias = _frozen(out_features, dtype=dtype) if bias else None
        self.kernel: LinearKernel | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel is None:
            return functional.linear(x, self.weight, self.bias)
        return self.kernel.run(x, self.bias)

    def in_parts(self, x: torch.Tensor) -> torch.Tensor | Parts:
        """The same, where the caller can also read a result in parts."""
        if fused.takes_few_rows(x):
            if self.kernel is None:
                return fused.few_rows(x, self.weight, self.bias)
            if isinstance(self.kernel, PlainKernel):
                return fused.few_rows(x, self.kernel.weight, self.bias)
        return self.forward(x)

    def prepare(self, choose: ChooseKernel) -> LinearKernel:
        """Hand the loaded weight to a kernel, which may keep it in another form.

        The parameter is given up, so that its memory lives only where the kernel still uses it.
        """
        self.kernel = choose(self.weight.data)
        self.weight = _frozen(0, dtype=self.weight.dtype)
        return self.kernel

    def checkpoint_views(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint name and the view it fills, for every tensor of this map."""
        start = 0
        for name, width in self.parts.items():
            rows = slice(start, start + width)
            yield f"{prefix}{name}.weight", self.weight[rows]
            if self.bias is not None:
                yield f"{prefix}{name}.bias", self.bias[rows]
            start += width


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
