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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    if _listeners.of_thread is not None:
        _listeners.of_thread(kernel, arguments)
    threads = 1 if single else torch.get_num_threads()
    team = _openmp() if threads > 1 else None
    address = arguments.ctypes.data
    if team is None:
        _FUNCTION(kernel)(address)
    else:
        team.parallel(kernel, address, threads, 0)


def barrier_address() -> int:
    """Of the C function `void()` in which every thread of the team waits for the others; 0 where
    the caller is the whole team."""
    team = _openmp() if torch.get_num_threads() > 1 else None
    return 0 if team is None else team.barrier


@contextmanager
def listen(listener: Callable[[int, Arguments], None]) -> Iterator[None]:
    """Tell `listener` of each kernel that this thread has run, before it runs, with its block."""
    before, _listeners.of_thread = _listeners.of_thread, listener
    try:
        yield
    finally:
        _listeners.of_thread = before


class _Listeners(threading.local):
    of_thread: Callable[[int, Arguments], None] | None = None


_listeners = _Listeners()

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Team:
    """`GOMP_parallel(function, data, num_threads, flags)` and the address of `GOMP_barrier()`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.parallel = library.GOMP_parallel
        self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.parallel.restype = None
        self.barrier = int(ctypes.cast(library.GOMP_barrier, ctypes.c_void_p).value or 0)


@cache
def _openmp() -> _Team | None:
    """The library that torch has loaded."""
    for path in _loaded_libraries():
        try:
            return _Team(ctypes.CDLL(path))
        except (OSError, AttributeError):
            continue
    return None


def _loaded_libraries() -> list[str]:
    """OpenMP libraries that this process has mapped, torch's own first; none outside Linux."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = dict.fromkeys(OPENMP_LIBRARY.findall(maps.read_text(encoding="utf-8")))
    return sorted(paths, key=lambda path: "torch" not in path)
