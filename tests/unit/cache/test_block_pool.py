"""Ownership of KV blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import OutOfBlocks, SettingsError


def test_allocation_is_all_or_nothing_and_reports_numbers() -> None:
    pool = BlockPool(4, 16, name="decode kv")
    pool.allocate(3)
    with pytest.raises(OutOfBlocks, match=r"decode kv: 2 blocks requested, 1 of 4 free") as caught:
        pool.allocate(2)
    assert (caught.value.requested, caught.value.free, caught.value.total) == (2, 1, 4)
    assert pool.num_free == 1
    pool.check_invariants()


def test_a_fresh_pool_hands_out_consecutive_blocks() -> None:
    assert BlockPool(8, 16).allocate(4).block_ids == (0, 1, 2, 3)


def test_free_is_idempotent() -> None:
    pool = BlockPool(4, 16)
    handle = pool.allocate(2)
    handle.free()
    other = pool.allocate(4)
    handle.free()
    assert pool.num_free == 0
    assert not handle.is_live
    assert handle.block_ids == ()
    assert len(other) == 4


def test_a_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(4, 16)
    prefix = pool.allocate(2)
    request = pool.allocate(1, shared=prefix.block_ids)
    prefix.free()
    assert request.block_ids[:2] == (0, 1)
    assert (pool.ref_count(0), pool.num_used) == (1, 3)
    request.free()
    assert pool.num_used == 0


def test_a_failed_allocation_takes_no_reference_on_shared_blocks() -> None:
    pool = BlockPool(3, 16)
    prefix = pool.allocate(2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(2, shared=prefix.block_ids)
    assert pool.ref_count(0) == 1


def test_free_blocks_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="block 1 is free"):
        BlockPool(4, 16).share([1])


def test_growing() -> None:
    pool = BlockPool(3, 16)
    with pool.allocate(1) as handle:
        handle.grow(2)
        assert len(handle) == 3
        with pytest.raises(OutOfBlocks):
            handle.grow(1)
        assert len(handle) == 3
    assert pool.num_free == 3
    with pytest.raises(ValueError, match="freed"):
        handle.grow(1)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(SettingsError):
        BlockPool(num_blocks, block_size)


@given(num_blocks=st.integers(1, 30), request=st.integers(0, 60))
def test_a_pool_serves_exactly_what_it_has(num_blocks: int, request: int) -> None:
    pool = BlockPool(num_blocks, 16)
    if request <= num_blocks:
        assert len(set(pool.allocate(request).block_ids)) == request
    else:
        with pytest.raises(OutOfBlocks):
            pool.allocate(request)
    pool.check_invariants()


class PoolMachine(RuleBasedStateMachine):
    """Any order of allocate, share, grow and free keeps the books balanced."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 16)
        self.live: list[BlockHandle] = []

    @rule(target=handles, num_blocks=st.integers(0, 8))
    def allocate(self, num_blocks: int) -> BlockHandle | None:
        return self._keep(lambda: self.pool.allocate(num_blocks))

    @rule(target=handles, handle=handles, num_blocks=st.integers(0, 4))
    def share(self, handle: BlockHandle | None, num_blocks: int) -> BlockHandle | None:
        shared = handle.block_ids if handle else ()
        return self._keep(lambda: self.pool.allocate(num_blocks, shared=shared))

    @rule(handle=handles, num_blocks=st.integers(0, 4))
    def grow(self, handle: BlockHandle | None, num_blocks: int) -> None:
        if handle is not None and handle.is_live and num_blocks <= self.pool.num_free:
            handle.grow(num_blocks)

    @rule(handle=consumes(handles))
    def free(self, handle: BlockHandle | None) -> None:
        if handle is not None:
            handle.free()
            handle.free()

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_invariants()
        held = [block_id for handle in self.live for block_id in handle.block_ids]
        assert self.pool.num_used == len(set(held))
        for block_id in set(held):
            assert self.pool.ref_count(block_id) == held.count(block_id)

    def _keep(self, allocate: object) -> BlockHandle | None:
        try:
            handle: BlockHandle = allocate()  # type: ignore[operator]
        except OutOfBlocks:
            return None
        self.live.append(handle)
        return handle


TestPoolMachine = PoolMachine.TestCase
