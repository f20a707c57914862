"""Who owns which KV block.

In: requests for a number of blocks. Out: handles that own block ids. The pool counts references and
knows nothing about tensors, requests or time; being synchronous and pure, it is the planner's
simulator's pool as well.

Invariants (checked by `check_invariants`): every block is either free, kept by the attached cache
without an owner, or referenced by at least one live handle, never two of these; a kept block counts
as free, for it is given up as soon as somebody needs it; free + used = total; the sum of reference
counts equals the number of block ids held by live handles.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from shared.errors import OutOfBlocks, SettingsError


class BlockKeeper(Protocol):
    """Keeps blocks that lost their last owner, because their content may be wanted again."""

    @property
    def num_idle(self) -> int:
        """Kept blocks without an owner."""
        ...

    def keep(self, block_id: int) -> bool:
        """A block lost its last owner; False if it may as well be free."""
        ...

    def is_idle(self, block_id: int) -> bool:
        """Whether the block is kept without an owner."""
        ...

    def wake(self, block_id: int) -> None:
        """An idle block has an owner again."""
        ...

    def evict(self) -> int:
        """Give up one kept block and say which."""
        ...


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

    def replace(self, position: int, block_id: int) -> None:
        """Own `block_id` (live or kept), which has the same content, at `position` instead."""
        if self._block_ids is None:
            raise ValueError("a freed block handle owns nothing to replace")
        self._pool._check_shareable((block_id,))
        old = self._block_ids[position]
        self._pool._retain((block_id,))
        self._block_ids = (*self._block_ids[:position], block_id, *self._block_ids[position + 1 :])
        self._pool._release((old,))

    def share(self) -> BlockHandle:
        """A further owner of the same blocks."""
        return self._pool.share(self.block_ids)

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
        self._keeper: BlockKeeper | None = None

    def attach(self, keeper: BlockKeeper) -> None:
        """Let `keeper` decide what happens to blocks without an owner; one keeper per pool."""
        if self._keeper is not None:
            raise ValueError(f"{self.name}: the pool has a keeper already")
        self._keeper = keeper

    @property
    def keeper(self) -> BlockKeeper | None:
        """Who keeps blocks without an owner, if anybody."""
        return self._keeper

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, kept ones among them."""
        return len(self._free) + self._num_idle

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - self.num_free

    @property
    def _num_idle(self) -> int:
        return self._keeper.num_idle if self._keeper is not None else 0

    def ref_count(self, block_id: int) -> int:
        """Owners of one block; 0 for a free or a kept one."""
        return self._ref_counts[block_id]

    def allocate(self, num_blocks: int, *, shared: Sequence[int] = ()) -> BlockHandle:
        """Own `shared` (live or kept blocks: a cached prefix) followed by new blocks.

        All or nothing: `OutOfBlocks` leaves the pool as it was.
        """
        self._check_shareable(shared)
        num_available = self.num_allocatable(shared)
        if num_blocks > num_available:
            raise OutOfBlocks(self.name, num_blocks, num_available, self.num_blocks)
        self._retain(shared)
        return BlockHandle(self, (*shared, *self._take(num_blocks)))

    def num_allocatable(self, shared: Sequence[int] = ()) -> int:
        """New blocks that `allocate` could give beside `shared`: kept ones among these are no
        longer to be had."""
        return self.num_free - sum(not self._ref_counts[block_id] for block_id in set(shared))

    def share(self, block_ids: Sequence[int]) -> BlockHandle:
        """A further owner of live or kept blocks."""
        return self.allocate(0, shared=block_ids)

    def check_invariants(self) -> None:
        """Raise `AssertionError` when the books do not balance. For tests and debug builds."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        for block_id, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block_id} has {count} references"
            assert not (count and block_id in free), f"block {block_id}: {count} references"
        num_owned = sum(count > 0 for count in self._ref_counts)
        assert num_owned + len(free) + self._num_idle == self.num_blocks, "blocks are lost"

    def _take(self, num_blocks: int) -> tuple[int, ...]:
        if num_blocks < 0:
            raise ValueError(f"cannot allocate {num_blocks} blocks")
        if num_blocks > self.num_free:
            raise OutOfBlocks(self.name, num_blocks, self.num_free, self.num_blocks)
        taken = tuple(self._take_one() for _ in range(num_blocks))
        for block_id in taken:
            self._ref_counts[block_id] = 1
        return taken

    def _take_one(self) -> int:
        if self._free or self._keeper is None:
            return self._free.pop()
        return self._keeper.evict()

    def _retain(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0 and self._keeper is not None:
                self._keeper.wake(block_id)
            self._ref_counts[block_id] += 1

    def _release(self, block_ids: Sequence[int]) -> None:
        """Last block first: a keeper sees a sequence's later blocks before those they build on."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                continue
            if self._keeper is None or not self._keeper.keep(block_id):
                self._free.append(block_id)

    def _check_shareable(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            is_idle = self._keeper is not None and self._keeper.is_idle(block_id)
            if self._ref_counts[block_id] == 0 and not is_idle:
                raise ValueError(f"{self.name}: block {block_id} is free and cannot be shared")
