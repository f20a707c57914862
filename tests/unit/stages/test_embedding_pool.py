"""The bounded pool of embeddings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cache.embedding_pool import EmbeddingPool


def filled(pool: EmbeddingPool[str], key: str, num_bytes: int) -> None:
    assert pool.try_reserve(key, num_bytes)
    pool.fill(key, key)


def test_evicts_the_least_recently_used_unpinned_entry() -> None:
    evicted: list[str] = []
    pool: EmbeddingPool[str] = EmbeddingPool(30, on_evict=evicted.append)
    for key in "abc":
        filled(pool, key, 10)
    pool.get("a")
    filled(pool, "d", 10)
    assert evicted == ["b"]
    assert "a" in pool


def test_a_reservation_is_all_or_nothing() -> None:
    evicted: list[str] = []
    pool: EmbeddingPool[str] = EmbeddingPool(30, on_evict=evicted.append)
    filled(pool, "a", 10)
    filled(pool, "b", 10)
    pool.pin("a")
    assert not pool.try_reserve("c", 25)
    assert evicted == []
    pool.unpin("a")
    assert pool.try_reserve("c", 25)
    assert sorted(evicted) == ["a", "b"]


def test_a_reserved_entry_has_no_value_and_is_never_evicted() -> None:
    pool: EmbeddingPool[str] = EmbeddingPool(30)
    assert pool.try_reserve("a", 20)
    assert pool.get("a") is None
    assert not pool.try_reserve("b", 20)
    pool.discard("a")
    pool.discard("a")
    assert pool.try_reserve("b", 20)


def test_mistakes_are_refused() -> None:
    pool: EmbeddingPool[str] = EmbeddingPool(30)
    filled(pool, "a", 10)
    with pytest.raises(ValueError, match="already"):
        pool.try_reserve("a", 1)
    with pytest.raises(ValueError, match="never fit"):
        pool.try_reserve("b", 31)
    with pytest.raises(ValueError, match="not pinned"):
        pool.unpin("a")
    pool.pin("a")
    with pytest.raises(ValueError, match="pinned 1 times"):
        pool.discard("a")
    with pytest.raises(KeyError):
        pool.pin("b")


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 12), st.booleans())))
def test_bytes_never_exceed_the_budget_and_pins_are_kept(
    moves: list[tuple[str, int, bool]],
) -> None:
    pool: EmbeddingPool[str] = EmbeddingPool(24)
    pinned: set[str] = set()
    for key, num_bytes, pin in moves:
        if key not in pool and pool.try_reserve(key, num_bytes):
            pool.fill(key, key)
        if key in pool and pin and key not in pinned:
            pool.pin(key)
            pinned.add(key)
        elif key in pinned and not pin:
            pool.unpin(key)
            pinned.remove(key)
        assert pool.used_bytes <= 24
        assert all(pool.get(k) is not None for k in pinned)
