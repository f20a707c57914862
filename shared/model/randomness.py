"""Uniform numbers that are a pure function of (seed, index).

In: seeds and token indices. Out: one number in [0, 1) per pair. There is no state, so a token drawn
again elsewhere, after a recovery or in another batch, is the same token.

Source: Steele, Lea, Flood 2014 (SplitMix64), used as a counter-based hash.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.float64]:
    """One uniform number per (seed, index), `[n]`; integers are taken modulo 2^64."""
    seed = np.array([value & _MASK for value in seeds], dtype=np.uint64)
    index = np.array([value & _MASK for value in indices], dtype=np.uint64)
    # Hashing the seed first keeps the streams of neighbouring seeds from being shifted copies.
    bits = _mix(_mix(seed) + index * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derived_seed(seed: int, choice: int) -> int:
    """The seed of one of several answers to one request; the first keeps the request's own."""
    if choice == 0:
        return seed
    mixed = _mix(np.array([seed & _MASK], dtype=np.uint64)) ^ np.uint64(choice)
    return int(_mix(_mix(mixed))[0])


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_A
    x = (x ^ (x >> np.uint64(27))) * _MIX_B
    return x ^ (x >> np.uint64(31))
