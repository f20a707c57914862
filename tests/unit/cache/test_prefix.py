"""The prefix cache: what its keys cover, what it finds, what it gives up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bench.prefix_trie import BlockTrie
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.cache.prefix import PrefixCache, block_keys
from shared.errors import OutOfBlocks
from shared.messages.descriptor import MediaItem
from shared.text.prompt import Prompt

SIZE = 4


@dataclass(frozen=True)
class Run:
    content_key: str
    offset: int
    num_tokens: int
    grid_thw: tuple[int, int, int] = (1, 4, 4)


CAT, DOG = "ca" * 32, "d0" * 32


def keys(tokens: list[int], *media: Run, salt: str = "model") -> tuple[bytes, ...]:
    return block_keys(tokens, media, block_size=SIZE, salt=salt)


def run(cache: PrefixCache, pool: BlockPool, tokens: list[int]) -> tuple[int, BlockHandle]:
    """Prefill a prompt as the scheduler does: tokens found in the cache, and its blocks."""
    chain = cache.keys_of(tokens, ())
    found = cache.match(chain, len(tokens))
    blocks = pool.allocate(-(-len(tokens) // SIZE) - len(found), shared=found)
    cache.commit(chain, blocks, len(tokens))
    return len(found) * SIZE, blocks


def make(num_blocks: int) -> tuple[PrefixCache, BlockPool]:
    pool = BlockPool(num_blocks, SIZE)
    return PrefixCache(pool, salt="model"), pool


class TestKeys:
    def test_only_full_blocks_have_keys_and_they_are_full_width(self) -> None:
        assert [len(keys(list(range(n)))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
        assert all(len(key) == 32 for key in keys(list(range(8))))

    def test_a_key_covers_all_tokens_before_it(self) -> None:
        first, other = keys([1, 2, 3, 4, 5, 6, 7, 8]), keys([9, 2, 3, 4, 5, 6, 7, 8])
        assert first[0] != other[0]
        assert first[1] != other[1]
        assert keys([1, 2, 3, 4, 0, 0, 0, 0])[0] == first[0]

    def test_another_model_has_other_keys(self) -> None:
        assert keys([1, 2, 3, 4]) != keys([1, 2, 3, 4], salt="model in bfloat16")

    def test_two_pictures_behind_one_text_differ_from_their_first_block_on(self) -> None:
        tokens = [1, 2, 3, 4, 5, 9, 9, 9, 9, 9, 6, 7]
        cat = keys(tokens, Run(CAT, offset=5, num_tokens=5))
        dog = keys(tokens, Run(DOG, offset=5, num_tokens=5))
        assert cat[0] == dog[0] == keys(tokens)[0]
        assert set(cat[1:]).isdisjoint(dog[1:])
        assert set(cat[1:]).isdisjoint(keys(tokens)[1:])

    @pytest.mark.parametrize("digit", [0, 31, 63])
    def test_every_digit_of_the_content_key_counts(self, digit: int) -> None:
        other = CAT[:digit] + "0" + CAT[digit + 1 :]
        tokens = [9] * 4
        assert keys(tokens, Run(CAT, 0, 4)) != keys(tokens, Run(other, 0, 4))

    def test_where_a_picture_lies_in_the_block_counts(self) -> None:
        """The same picture, one row later: other rows of its embedding lie in the same places."""
        tokens, run = [9] * 8, Run(CAT, 1, 6)
        others = (replace(run, offset=2), replace(run, num_tokens=5), replace(run, offset=0))
        assert len({keys(tokens, run)[0], *(keys(tokens, other)[0] for other in others)}) == 4

    def test_the_patch_grid_counts_because_later_positions_follow_it(self) -> None:
        wide = replace(Run(CAT, 0, 4), grid_thw=(1, 2, 8))
        assert keys([9] * 4, Run(CAT, 0, 4)) != keys([9] * 4, wide)

    def test_the_order_of_two_pictures_counts(self) -> None:
        tokens = [9] * 4
        one = keys(tokens, Run(CAT, 0, 2), Run(DOG, 2, 2))
        assert one != keys(tokens, Run(DOG, 0, 2), Run(CAT, 2, 2))

    @given(st.lists(st.integers(0, 2), max_size=16), st.lists(st.integers(0, 2), max_size=16))
    def test_keys_are_equal_exactly_where_prompts_are(self, a: list[int], b: list[int]) -> None:
        for n, (left, right) in enumerate(zip(keys(a), keys(b), strict=False), start=1):
            assert (left == right) == (a[: n * SIZE] == b[: n * SIZE])


class TestMatching:
    def test_a_prompt_starts_from_the_longest_cached_beginning(self) -> None:
        cache, pool = make(16)
        assert run(cache, pool, list(range(12)))[0] == 0
        assert run(cache, pool, [*range(8), 99, 99, 99, 99])[0] == 8
        assert run(cache, pool, [99, *range(1, 12)])[0] == 0

    def test_the_last_token_is_always_computed(self) -> None:
        cache, pool = make(16)
        run(cache, pool, list(range(8)))
        assert run(cache, pool, list(range(8)))[0] == 4
        assert run(cache, pool, list(range(9)))[0] == 8

    def test_cached_blocks_outlive_their_owner_and_count_as_free(self) -> None:
        cache, pool = make(4)
        _, blocks = run(cache, pool, list(range(16)))
        blocks.free()
        assert (pool.num_free, pool.num_used, cache.counters().cached_blocks) == (4, 0, 4)
        found, again = run(cache, pool, list(range(16)))
        assert (found, pool.num_used) == (12, 4)
        assert again.block_ids[:3] == (0, 1, 2)

    def test_an_incomplete_block_is_not_kept(self) -> None:
        cache, pool = make(4)
        run(cache, pool, list(range(6)))[1].free()
        assert cache.num_idle == 1

    def test_equal_prompts_computed_side_by_side_end_up_with_the_same_blocks(self) -> None:
        cache, pool = make(8)
        chain = cache.keys_of(list(range(8)), ())
        first, second = pool.allocate(2), pool.allocate(2)
        cache.commit(chain, first, 8)
        cache.commit(chain, second, 8)
        assert second.block_ids == first.block_ids
        assert pool.num_used == 2
        first.free()
        assert pool.ref_count(0) == 1
        pool.check_invariants()

    def test_after_damage_nothing_is_found_and_no_block_is_lost(self) -> None:
        cache, pool = make(8)
        held = run(cache, pool, list(range(8)))[1]
        run(cache, pool, [7] * 8)[1].free()
        cache.clear()
        assert cache.match(cache.keys_of(list(range(9)), ()), 9) == ()
        held.free()
        pool.allocate(8).free()
        assert (pool.num_free, cache.counters().cached_blocks) == (8, 0)
        pool.check_invariants()


class TestEviction:
    def test_the_least_recently_used_goes_first_and_leaves_go_before_what_they_build_on(
        self,
    ) -> None:
        cache, pool = make(4)
        run(cache, pool, [1] * 8)[1].free()
        run(cache, pool, [2] * 8)[1].free()
        pool.allocate(1).free()
        assert run(cache, pool, [1] * 5)[0] == 4  # its second block went, its first did not
        assert cache.counters().evicted_blocks == 1

    def test_a_hit_makes_young_again(self) -> None:
        cache, pool = make(4)
        run(cache, pool, [1] * 8)[1].free()
        run(cache, pool, [2] * 8)[1].free()
        assert cache.match(cache.keys_of([1] * 9, ()), 9) == (0, 1)
        pool.allocate(2).free()
        assert cache.num_cached_tokens(cache.keys_of([1] * 9, ()), 9) == 8
        assert cache.num_cached_tokens(cache.keys_of([2] * 9, ()), 9) == 0

    def test_blocks_in_use_are_never_evicted(self) -> None:
        cache, pool = make(4)
        _, held = run(cache, pool, [1] * 12)
        with pytest.raises(OutOfBlocks, match="2 blocks requested, 1 of 4 free"):
            pool.allocate(2)
        assert pool.allocate(1).block_ids == (3,)
        assert cache.num_cached_tokens(cache.keys_of([1] * 13, ()), 13) == 12
        held.free()

    def test_a_prompt_does_not_evict_the_beginning_it_starts_from(self) -> None:
        cache, pool = make(4)
        run(cache, pool, [1] * 16)[1].free()
        found = cache.match(cache.keys_of([1] * 16, ()), 12)
        assert pool.num_allocatable(found) == 2
        with pytest.raises(OutOfBlocks):
            pool.allocate(3, shared=found)
        assert pool.num_free == 4
        assert pool.allocate(2, shared=found).block_ids == (0, 1, 3, 2)


class CacheMachine(RuleBasedStateMachine):
    """Any order of prompts, ends, raw allocations and clearing keeps pool and cache balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.pool = make(10)
        self.live: list[BlockHandle] = []
        self.pending: list[tuple[tuple[bytes, ...], BlockHandle, int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24))
    def start(self, tokens: list[int]) -> None:
        chain = self.cache.keys_of(tokens, ())
        found = self.cache.match(chain, len(tokens))
        assert len(found) * SIZE < len(tokens)
        needed = -(-len(tokens) // SIZE) - len(found)
        try:
            blocks = self.pool.allocate(needed, shared=found)
        except OutOfBlocks:
            assert needed > self.pool.num_allocatable(found)
            return
        assert blocks.block_ids[: len(found)] == found
        self.live.append(blocks)
        self.pending.append((chain, blocks, len(tokens)))

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), share=st.floats(0, 1))
    def compute(self, data: st.DataObject, share: float) -> None:
        index = data.draw(st.integers(0, len(self.pending) - 1))
        chain, blocks, num_tokens = self.pending[index]
        if blocks.is_live:
            self.cache.commit(chain, blocks, int(num_tokens * share))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.live.pop(data.draw(st.integers(0, len(self.live) - 1))).free()

    @rule(num_blocks=st.integers(0, 10))
    def take_and_give_back(self, num_blocks: int) -> None:
        if num_blocks <= self.pool.num_free:
            self.pool.allocate(num_blocks).free()

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_invariants()
        held = [block_id for blocks in self.live for block_id in blocks.block_ids]
        assert self.pool.num_used == len(set(held))
        assert all(self.pool.ref_count(each) == held.count(each) for each in set(held))

    @invariant()
    def no_chain_is_cut_in_its_middle(self) -> None:
        """What is cached can be reached: all blocks that a cached block builds on are cached."""
        for chain, blocks, _ in self.pending:
            cached = [key in self.cache._blocks for key in chain]
            assert cached == sorted(cached, reverse=True)
            assert blocks.is_live or not blocks.block_ids

    def teardown(self) -> None:
        for blocks in self.live:
            blocks.free()
        assert (self.pool.num_used, self.pool.num_free) == (0, 10)
        self.pool.check_invariants()
        assert len(set(self.pool.allocate(10).block_ids)) == 10


TestCacheMachine = CacheMachine.TestCase


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("aabbP"), min_size=1, max_size=20), st.sampled_from((CAT, DOG))
        ),
        min_size=1,
        max_size=8,
    )
)
def test_without_eviction_the_hits_are_those_of_a_trie(
    sent: list[tuple[list[str], str]],
) -> None:
    """The trie that the bench predicts with compares contents; the cache compares keys."""
    cache, pool = make(256)
    trie = BlockTrie(SIZE)
    for letters, picture in sent:
        token_ids: list[int] = []
        media: list[MediaItem] = []
        for letter in letters:
            if letter == "P":
                media.append(
                    MediaItem(
                        kind="image",
                        sha256=picture,
                        content_key=picture,
                        grid_thw=(1, 2, 6),
                        offset=len(token_ids),
                        num_tokens=3,
                    )
                )
            token_ids += [9, 9, 9] if letter == "P" else [ord(letter)]
        chain = cache.keys_of(token_ids, media)
        found = cache.match(chain, len(token_ids))
        assert len(found) * SIZE == trie.add(Prompt(tuple(token_ids), tuple(media)))
        with pool.allocate(-(-len(token_ids) // SIZE) - len(found), shared=found) as blocks:
            cache.commit(chain, blocks, len(token_ids))
    assert cache.counters().evicted_blocks == 0
