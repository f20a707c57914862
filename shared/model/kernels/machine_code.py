"""Machine code of the kernels: compiled on first use, kept on disk for later processes.

In: a function that numba can compile. Out: a C function's address. numba itself asks only whether
the file with the outermost function has changed, while a kernel is made of several files; so the
folder that it keeps code in carries a digest of them all, and other sources never meet old code.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import cfunc
from numba.core import types
from numba.misc import appdirs

SOURCES = Path(__file__).parent


def compiled(function: Callable[[Any], None]) -> Any:
    """Compile `void(int64_t *)` now, or take what an earlier process left on disk.

    A process that may write neither beside the sources nor in the user's cache compiles anew.
    """
    signature = types.void(types.CPointer(types.int64))
    folder = code_folder()
    if folder is not None:
        try:
            with _cached_in(folder):
                return cfunc(signature, cache=True)(function)
        except (OSError, RuntimeError):  # full or withdrawn since; numba's own complaint
            pass
    return cfunc(signature)(function)


@cache
def code_folder() -> Path | None:
    """The first writable place for these sources, this numba and this LLVM; None without one."""
    name = f"triptych-kernels-{sources_digest()}"
    for place in _places():
        folder = place / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


def sources_digest() -> str:
    """Changes with every file that a kernel may be made of, and with the compiler."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(SOURCES.glob("*.py")):
        digest.update(f"\0{path.name}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _places() -> list[Path]:
    """Where numba would look: what the user names, beside the sources, the user's cache."""
    named = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else []
    user_cache = Path(appdirs.user_cache_dir("numba", appauthor=False))
    return [*named, SOURCES / "__pycache__", user_cache]


@contextmanager
def _cached_in(folder: Path) -> Iterator[None]:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
