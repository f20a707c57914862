"""What the scheduler decides about, and what it gives: prompts, and slices of them in batches.

Plain values; they know neither tensors nor requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shared.cache.block_pool import BlockHandle


class SchedulableJob(Protocol):
    """What the scheduler needs to know of a prompt.

    `blocks`, `num_computed_tokens` (whose keys and values are in the blocks) and
    `num_cached_tokens` (those that were found in the cache) are the scheduler's to set. The
    embeddings of the first `num_ready_tokens` tokens have landed: all, or those before the first
    one that is still missing; the number only grows. The first `num_bare_tokens` tokens can only
    come from the cache: their embeddings are not there and will not come. `block_keys` are those of
    the prompt's full blocks, empty where nothing is cached. The tokens `start .. stop` of one of
    `whole_spans` must be computed in one step.
    """

    blocks: BlockHandle | None
    num_computed_tokens: int
    num_cached_tokens: int

    @property
    def num_tokens(self) -> int: ...

    @property
    def max_context_tokens(self) -> int: ...

    @property
    def num_ready_tokens(self) -> int: ...

    @property
    def num_bare_tokens(self) -> int: ...

    @property
    def block_keys(self) -> Sequence[bytes]: ...

    @property
    def whole_spans(self) -> Sequence[tuple[int, int]]: ...

    @property
    def priority(self) -> int: ...

    @property
    def deadline_s(self) -> float: ...


J = TypeVar("J", bound=SchedulableJob)


def is_complete(job: SchedulableJob) -> bool:
    """Whether all embeddings of the prompt have landed."""
    return job.num_ready_tokens >= job.num_tokens


@dataclass(frozen=True, slots=True)
class Slice(Generic[J]):
    """Tokens `start .. stop` of a prompt."""

    job: J
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt's first token comes out of it."""
        return self.stop == self.job.num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class PrefillBatch(Generic[J]):
    """Slices of one step.

    Where it `is_early`, they are beginnings of prompts whose later embeddings are still missing:
    the prompts give their blocks back when it ends. The scheduler has dropped the prompts in
    `uncovered`: what they counted on was evicted from the cache. They may be added again with all
    their embeddings.
    """

    slices: tuple[Slice[J], ...]
    uncovered: tuple[J, ...] = ()
    is_early: bool = False

    def __iter__(self) -> Iterator[Slice[J]]:
        return iter(self.slices)

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return sum(each.stop - each.start for each in self.slices)
