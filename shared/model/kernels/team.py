"""Threads for compiled kernels: the team that torch computes with.

In: the address of a C function and a block of arguments. Out: nothing; the function has run once
on every thread of the team. torch's OpenMP library is asked through its C interface, so that there
is one pool of threads in a process and `torch.set_num_threads` sizes it. Without OpenMP the caller
is the whole team. Kernels divide the work among themselves with a counter in their arguments, so
a thread that the machine holds back holds back only the piece it has taken.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

OPENMP_LIBRARY = re.compile(r"/\S*lib(?:gomp|iomp5|omp)\S*\.so\S*")

Arguments = npt.NDArray[np.int64]


def run_on_team(kernel: int, arguments: Arguments, *, single: bool = False) -> None:
    """Call the C function at `kernel`, `void(int64_t *)`, on every thread. Releases the GIL.

    `single` keeps small work on the calling thread. The caller keeps alive what the addresses in
    `arguments` point to.
    """
    threads = 1 if single else torch.get_num_threads()
    parallel = _openmp() if threads > 1 else None
    address = arguments.ctypes.data
    if parallel is None:
        _FUNCTION(kernel)(address)
    else:
        parallel(kernel, address, threads, 0)


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> ctypes._NamedFuncPointer | None:
    """`GOMP_parallel(function, data, num_threads, flags)` of the library that torch has loaded."""
    for path in _loaded_libraries():
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


def _loaded_libraries() -> list[str]:
    """OpenMP libraries that this process has mapped, torch's own first; none outside Linux."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = dict.fromkeys(OPENMP_LIBRARY.findall(maps.read_text(encoding="utf-8")))
    return sorted(paths, key=lambda path: "torch" not in path)
