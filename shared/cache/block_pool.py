"""Who owns which KV block.

In: requests for a number of blocks. Out: handles that own block ids. The pool counts references and
knows nothing about tensors, requests or time; being synchronous and pure, it is the planner's
simulator's pool as well.

Invariants (checked by `check_invariants`): every block is either free or referenced by at least one
live handle, never both; free + used = total; the sum of reference counts equals the number of block
ids held by live handles.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from shared.errors import OutOfBlocks, SettingsError


class BlockHandle:
    """Ownership of some blocks, one reference each. `free` is idempotent; a `with` block frees too.

    The block ids are the holder's to use until `free`; afterwards `block_ids` is empty.
    """

    __slots__ = ("_block_ids", "_pool")

    def __init__(self, pool: BlockPool, block_ids: tuple[int, ...]) -> None:
        self._pool = pool
        self._block_ids: tuple[int, ...] | None = block_ids

    @property
    def block_ids(self) -> tuple[int, ...]:
        """Ids in the order of the tokens they hold."""
        return self._block_ids or ()

    @property
    def is_live(self) -> bool:
        """False once freed."""
        return self._block_ids is not None

    def grow(self, num_blocks: int) -> None:
        """Append new blocks, all or nothing. A freed handle cannot grow."""
        if self._block_ids is None:
            raise ValueError("a freed block handle cannot grow")
        self._block_ids += self._pool._take(num_blocks)

    def free(self) -> None:
        """Give the references back; later calls do nothing."""
        block_ids, self._block_ids = self._block_ids, None
        if block_ids:
            self._pool._release(block_ids)

    def __len__(self) -> int:
        return len(self.block_ids)

    def __enter__(self) -> BlockHandle:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.free()


class BlockPool:
    """A fixed number of blocks of `block_size` tokens, handed out all or nothing."""

    def __init__(self, num_blocks: int, block_size: int, *, name: str = "kv") -> None:
        if num_blocks < 1 or block_size < 1:
            raise SettingsError(
                f"{name}: a pool needs at least one block of one token, "
                f"not {num_blocks} blocks of {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.name = name
        self._ref_counts = [0] * num_blocks
        # A stack, low ids on top: consecutive ids on a fresh pool, and the block freed last, which
        # is the likeliest to be in a processor cache, is used first.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - len(self._free)

    def ref_count(self, block_id: int) -> int:
        """Owners of one block; 0 for a free block."""
        return self._ref_counts[block_id]

    def allocate(self, num_blocks: int, *, shared: Sequence[int] = ()) -> BlockHandle:
        """Own `shared` (blocks already live elsewhere, a cached prefix) followed by new blocks.

        All or nothing: `OutOfBlocks` leaves the pool as it was.
        """
        self._check_live(shared)
        fresh = self._take(num_blocks)
        for block_id in shared:
            self._ref_counts[block_id] += 1
        return BlockHandle(self, (*shared, *fresh))

    def share(self, block_ids: Sequence[int]) -> BlockHandle:
        """A further owner of live blocks."""
        return self.allocate(0, shared=block_ids)

    def check_invariants(self) -> None:
        """Raise `AssertionError` when the books do not balance. For tests and debug builds."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        for block_id, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block_id} has {count} references"
            assert (count == 0) == (block_id in free), f"block {block_id}: {count} references"

    def _take(self, num_blocks: int) -> tuple[int, ...]:
        if num_blocks < 0:
            raise ValueError(f"cannot allocate {num_blocks} blocks")
        if num_blocks > len(self._free):
            raise OutOfBlocks(self.name, num_blocks, len(self._free), self.num_blocks)
        taken = tuple(self._free.pop() for _ in range(num_blocks))
        for block_id in taken:
            self._ref_counts[block_id] = 1
        return taken

    def _release(self, block_ids: Sequence[int]) -> None:
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free.append(block_id)

    def _check_live(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                raise ValueError(f"{self.name}: block {block_id} is free and cannot be shared")
