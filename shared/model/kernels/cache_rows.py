"""New keys and values into the slots of the cache.

In: an argument block with addresses. Out: nothing; each token's row of keys and of values lies in
its slot. torch needs a call for each of the two.
"""

from __future__ import annotations

from typing import Any

from numba import carray, int64, njit, uint16

from shared.model.kernels.machine_code import compiled
from shared.model.kernels.vector import offset, pointer_to, take_next

# Positions in the argument block. Strides count values; slots of the cache have no gaps.
NEXT, TOKENS, WIDTH, K, K_STRIDE, V, V_STRIDE, SLOTS, KEYS, VALUES = range(10)
NUM_ARGUMENTS = 10


@njit
def _copy(source: Any, target: Any, width: int) -> None:
    values, place = carray(source, width), carray(target, width)
    for i in range(width):
        place[i] = values[i]


@compiled
def write_bf16(arguments: Any) -> None:
    """bfloat16 rows."""
    a = carray(arguments, NUM_ARGUMENTS)
    width = a[WIDTH]
    k, v = pointer_to(a[K], uint16), pointer_to(a[V], uint16)
    keys, values = pointer_to(a[KEYS], uint16), pointer_to(a[VALUES], uint16)
    slots = carray(pointer_to(a[SLOTS], int64), a[TOKENS])
    while True:
        token = take_next(arguments)
        if token >= a[TOKENS]:
            return
        at = slots[token] * width
        _copy(offset(k, token * a[K_STRIDE]), offset(keys, at), width)
        _copy(offset(v, token * a[V_STRIDE]), offset(values, at), width)
