"""Calls of kernels recorded once and made again as one.

In: a function that computes with compiled kernels alone. Out: a tape that does the same on the same
memory. What a call costs besides its work (its output, its argument block, waking the team) is paid
once. Whatever else computes is noticed: a tape would leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.model.kernels.team import Arguments, barrier_address, listen, run_on_team

_ALIGNED = 8
"""Blocks begin on cache lines of their own: threads count in their first number."""

_HARMLESS = frozenset(
    {
        "aten::alias",
        "aten::as_strided",
        "aten::detach",
        "aten::empty",
        "aten::expand",
        "aten::permute",
        "aten::select",
        "aten::slice",
        "aten::split",
        "aten::squeeze",
        "aten::t",
        "aten::transpose",
        "aten::unbind",
        "aten::unsqueeze",
        "aten::view",
        "aten::_unsafe_view",
    }
)
"""Operators that compute nothing."""


class NotRecordable(Exception):
    """Something other than a compiled kernel computes; the message names it."""


class Tape:
    """Replays on the memory of the recording, from any thread, one at a time.

    It keeps what was made during the recording; weights and inputs are its owner's to keep.
    """

    def __init__(
        self, calls: Sequence[tuple[int, Arguments]], held: Sequence[Any], num_bytes: int
    ) -> None:
        from shared.model.kernels import sequences

        self._held = held
        self.num_bytes = num_bytes
        sizes = [-(-len(block) // _ALIGNED) * _ALIGNED for _, block in calls]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        self._blocks = np.zeros(starts[-1], np.int64)
        for start, (_, block) in zip(starts, calls, strict=False):
            self._blocks[start : start + len(block)] = block
        self._fresh = self._blocks.copy()
        first = self._blocks.ctypes.data
        kernels = [kernel for kernel, _ in calls]
        self._calls = np.column_stack((np.array(kernels, np.int64), first + 8 * starts[:-1]))
        self._entry = sequences.run_all.address

    def play(self) -> None:
        """Make all calls."""
        # Kernels count in their blocks, which begin anew each time.
        self._blocks[:] = self._fresh
        arguments = np.array(
            (len(self._calls), barrier_address(), self._calls.ctypes.data), np.int64
        )
        run_on_team(self._entry, arguments)


def record(compute: Callable[[], torch.Tensor]) -> tuple[Tape, torch.Tensor]:
    """Run `compute`, and a tape of it with the memory of its result.

    Every tensor that `compute` reads must stay where it is. Raises `NotRecordable` where it
    computes with anything but kernels.
    """
    calls: list[tuple[int, Arguments]] = []
    watch = _Watch()
    # Before a kernel counts in its block.
    with listen(lambda kernel, block: calls.append((kernel, block.copy()))), watch:
        result = compute()
    return Tape(calls, watch.made, watch.num_bytes), result


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__ is untyped
    """Keeps what is made, and refuses what computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.made: list[Any] = []
        self.num_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.name().partition(".")[0]
        if name not in _HARMLESS:
            raise NotRecordable(name)
        made = func(*args, **(kwargs or {}))
        self.made.append(made)
        if name == "aten::empty":
            self.num_bytes += made.nbytes
        return made
