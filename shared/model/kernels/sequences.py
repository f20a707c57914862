"""Kernel after kernel in one call: a whole step of a model without Python in between.

In: an argument block with the addresses of kernels and of their blocks. Out: nothing; every thread
of the team has run every kernel, all together waiting for each other behind each of them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, int64
from numba.core import types
from numba.extending import intrinsic

from shared.model.kernels.machine_code import compiled
from shared.model.kernels.vector import pointer_to

# Positions in the argument block. A barrier of 0 is none: the caller is the whole team.
COUNT, BARRIER, CALLS = range(3)
NUM_ARGUMENTS = 3


@intrinsic
def _call(typing_context: Any, kernel: Any, block: Any) -> Any:
    """The kernel at one address with the block at another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = ir.IntType(64).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [place]).as_pointer()
        kernel, block = arguments
        builder.call(builder.inttoptr(kernel, function), [builder.inttoptr(block, place)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _wait(typing_context: Any, barrier: Any) -> Any:
    """Until every thread of the team has come here."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), []).as_pointer()
        builder.call(builder.inttoptr(arguments[0], function), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@compiled
def run_all(arguments: Any) -> None:
    """Pairs of a kernel's address and its block's, in order."""
    a = carray(arguments, NUM_ARGUMENTS)
    calls = carray(pointer_to(a[CALLS], int64), 2 * a[COUNT])
    for i in range(a[COUNT]):
        _call(calls[2 * i], calls[2 * i + 1])
        if a[BARRIER] != 0:
            _wait(a[BARRIER])
