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
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import cfunc
from numba.core import types
from numba.misc import appdirs

SOURCES = Path(__file__).parent


class Kernel:
    """A C function `void(int64_t *)`, compiled when its address is first asked for.

    Whoever loads a model asks for what it will call, and no more: compiling takes seconds.
    """

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = function

    @cached_property
    def address(self) -> int:
        """Of the function's entry. Asked for at every call, so it is looked up once."""
        return int(self._code.address)

    def compile(self) -> None:
        """Have the machine code now and not when the address is first asked for."""
        _ = self.address

    @property
    def cache_hits(self) -> int:
        """Not 0 if an earlier process had left the code on disk."""
        return int(self._code.cache_hits)

    @cached_property
    def _code(self) -> Any:
        """A process that may write neither beside the sources nor in the user's cache compiles."""
        signature = types.void(types.CPointer(types.int64))
        folder = code_folder()
        if folder is not None:
            try:
                with _cached_in(folder):
                    return cfunc(signature, cache=True)(self._function)
            except (OSError, RuntimeError):  # full or withdrawn since; numba's own complaint
                pass
        return cfunc(signature)(self._function)


def compiled(function: Callable[[Any], None]) -> Kernel:
    """Make a kernel of a function that numba can compile."""
    return Kernel(function)


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
