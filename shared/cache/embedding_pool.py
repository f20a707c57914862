"""A bounded pool of values by content key, counted in bytes: pinned while leased, LRU otherwise.

In: reservations, values, pins. Out: the values, and the keys that were evicted to make room. Pure:
it knows neither tensors nor leases nor time. What it guarantees: bytes in use never exceed the
budget; a reserved or pinned entry is never evicted; a reservation is all or nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from shared.errors import SettingsError

V = TypeVar("V")


@dataclass
class _Entry(Generic[V]):
    num_bytes: int
    value: V | None = None
    pins: int = 0


class EmbeddingPool(Generic[V]):
    """Entries move from reserved (being computed) to filled; only filled and unpinned ones may
    go."""

    def __init__(
        self, max_bytes: int, *, on_evict: Callable[[str], None] = lambda key: None
    ) -> None:
        if max_bytes < 1:
            raise SettingsError(f"embedding pool: {max_bytes} bytes, at least 1 is needed")
        self.max_bytes = max_bytes
        self._on_evict = on_evict
        self._entries: OrderedDict[str, _Entry[V]] = OrderedDict()  # least recently used first
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all entries, reserved ones among them."""
        return self._used_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes that cannot be evicted now."""
        return sum(e.num_bytes for e in self._entries.values() if e.pins or e.value is None)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> V | None:
        """The value of a filled entry, marked as used; None if there is none."""
        entry = self._entries.get(key)
        if entry is None or entry.value is None:
            return None
        self._entries.move_to_end(key)
        return entry.value

    def try_reserve(self, key: str, num_bytes: int) -> bool:
        """Claim room for a value that is about to be made. False if pinned entries leave too
        little.

        Raises `ValueError` if the key is present or the value could never fit.
        """
        if key in self._entries:
            raise ValueError(f"{key} is in the pool already")
        if num_bytes > self.max_bytes:
            raise ValueError(f"{num_bytes} bytes never fit into a pool of {self.max_bytes}")
        if num_bytes > self.max_bytes - self.pinned_bytes:
            return False
        self._evict_until(self.max_bytes - num_bytes)
        self._entries[key] = _Entry(num_bytes)
        self._used_bytes += num_bytes
        return True

    def fill(self, key: str, value: V) -> None:
        """The reserved value is there."""
        self._entries[key].value = value

    def discard(self, key: str) -> None:
        """Drop an entry that is not pinned (a reservation whose computation failed). Idempotent."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.pins:
            raise ValueError(f"{key} is pinned {entry.pins} times")
        self._drop(key)

    def pin(self, key: str) -> V:
        """Keep a filled entry until `unpin`; pins are counted. Raises `KeyError` if there is
        none."""
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        self._entries[key].pins += 1
        return value

    def unpin(self, key: str) -> None:
        """Undo one `pin`."""
        entry = self._entries[key]
        if entry.pins < 1:
            raise ValueError(f"{key} is not pinned")
        entry.pins -= 1

    def _evict_until(self, target_bytes: int) -> None:
        for key, entry in list(self._entries.items()):
            if self._used_bytes <= target_bytes:
                return
            if entry.value is not None and not entry.pins:
                self._drop(key)
                self._on_evict(key)

    def _drop(self, key: str) -> None:
        self._used_bytes -= self._entries.pop(key).num_bytes
