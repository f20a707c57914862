"""Which full KV blocks hold which beginning of a prompt, so that it is computed once.

In: the tokens and media of prompts, and the blocks that were filled for them. Out: the blocks of
the longest beginning that is still there. Pure: no torch, no clock, no bus. Blocks belong to
prompts through the pool's reference counts; a block without an owner stays until the pool needs its
room, least recently used first.

A block's key covers everything that its content depends on: the cache's salt (model, dtype,
layout), the keys of all blocks before it, its tokens, and the media whose rows lie in it by full
content hash, so two pictures behind the same placeholders never meet.

What always holds: whoever owns a cached block owns all blocks before it, as `commit` puts cached
blocks in place of equal ones. A sequence gives its last block back first, so of two idle blocks the
one that builds on the other is always the older one: evicting the oldest never cuts a chain in its
middle. Evicted or not, answers are the same; only the work differs.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.cache.block_pool import BlockHandle, BlockPool


class MediaRun(Protocol):
    """A media item of a prompt: rows `offset .. offset + num_tokens` are its placeholders.

    `content_key` is the full hash (hex) of everything that its embedding depends on.
    """

    @property
    def content_key(self) -> str: ...

    @property
    def grid_thw(self) -> tuple[int, int, int]: ...

    @property
    def offset(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


def block_keys(
    token_ids: Sequence[int], media: Sequence[MediaRun], *, block_size: int, salt: str
) -> tuple[bytes, ...]:
    """SHA-256 keys of the prompt's full blocks; each covers all blocks before it.

    Every field has a fixed width or its length in front, so different contents never hash the same
    bytes. The patch grid is part of it because the rotary positions of all later rows follow it.
    """
    parent = hashlib.sha256(salt.encode()).digest()
    keys = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        stop = start + block_size
        runs = [run for run in media if run.offset < stop and run.offset + run.num_tokens > start]
        digest = hashlib.sha256(parent)
        digest.update(struct.pack(f"<{block_size}I", *token_ids[start:stop]))
        digest.update(struct.pack("<I", len(runs)))
        for run in runs:
            digest.update(bytes.fromhex(run.content_key))
            # Where its rows begin, counted from the block's first row: negative if before it.
            digest.update(struct.pack("<qI3I", run.offset - start, run.num_tokens, *run.grid_thw))
        parent = digest.digest()
        keys.append(parent)
    return tuple(keys)


@dataclass(frozen=True, slots=True)
class PrefixCounters:
    """Since the start: prompt tokens looked up, those found, and blocks evicted; blocks cached
    now."""

    asked_tokens: int
    hit_tokens: int
    evicted_blocks: int
    cached_blocks: int


class PrefixCache:
    """The cached blocks of one pool, by key. It is the pool's keeper."""

    def __init__(self, pool: BlockPool, *, salt: str) -> None:
        self._pool = pool
        self._salt = salt
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._asked_tokens = self._hit_tokens = self._evicted_blocks = 0
        pool.attach(self)

    def keys_of(self, token_ids: Sequence[int], media: Sequence[MediaRun]) -> tuple[bytes, ...]:
        """The keys of a prompt's full blocks in this cache."""
        return block_keys(token_ids, media, block_size=self._pool.block_size, salt=self._salt)

    def match(self, keys: Sequence[bytes], num_tokens: int) -> tuple[int, ...]:
        """The blocks of the longest cached beginning of a prompt of `num_tokens` tokens.

        Never all of it: the last token is computed for its logits. The blocks are marked as used,
        not owned: allocate with them at once, or match again.
        """
        found = []
        for key in keys[: (num_tokens - 1) // self._pool.block_size]:
            block_id = self._blocks.get(key)
            if block_id is None:
                break
            found.append(block_id)
        for block_id in reversed(found):
            if block_id in self._idle:
                self._idle.move_to_end(block_id)
        return tuple(found)

    def num_cached_tokens(self, keys: Sequence[bytes], num_tokens: int) -> int:
        """Tokens of a prompt that need not be computed, as things are now."""
        return len(self.match(keys, num_tokens)) * self._pool.block_size

    def count(self, *, asked_tokens: int, hit_tokens: int) -> None:
        """One prompt was started from what `match` found."""
        self._asked_tokens += asked_tokens
        self._hit_tokens += hit_tokens

    def commit(self, keys: Sequence[bytes], blocks: BlockHandle, num_tokens: int) -> None:
        """The first `num_tokens` tokens of a prompt are computed: others may share its full blocks.

        Where an equal block is cached already (another prompt was faster), the handle gets that one
        and gives its own back, so call this only between steps.
        """
        num_full = min(num_tokens // self._pool.block_size, len(keys))
        for position, key in enumerate(keys[:num_full]):
            own, cached = blocks.block_ids[position], self._blocks.get(key)
            if cached is None:
                self._blocks[key] = own
                self._keys[own] = key
            elif cached != own:
                blocks.replace(position, cached)

    def clear(self) -> None:
        """Forget all contents, as after damage. Blocks in use stay with their owners."""
        self._blocks.clear()
        self._keys.clear()

    def counters(self) -> PrefixCounters:
        """The figures so far."""
        return PrefixCounters(
            self._asked_tokens, self._hit_tokens, self._evicted_blocks, len(self._blocks)
        )

    @property
    def num_idle(self) -> int:
        """Cached blocks without an owner."""
        return len(self._idle)

    def is_idle(self, block_id: int) -> bool:
        """Whether the block is cached without an owner."""
        return block_id in self._idle

    def keep(self, block_id: int) -> bool:
        """A block lost its last owner: stays if it is cached."""
        if block_id not in self._keys:
            return False
        self._idle[block_id] = None
        return True

    def wake(self, block_id: int) -> None:
        """An idle block has an owner again."""
        del self._idle[block_id]

    def evict(self) -> int:
        """Forget the block that nobody has used for longest."""
        block_id, _ = self._idle.popitem(last=False)
        key = self._keys.pop(block_id, None)
        if key is not None:  # else `clear` forgot it
            del self._blocks[key]
            self._evicted_blocks += 1
        return block_id
