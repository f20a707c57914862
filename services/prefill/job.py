"""One prompt on its way through the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from services.prefill.executor import FirstToken, PreparedPrompt, PromptInput
from services.prefill.progress import PrefillProgress
from shared.cache.block_pool import BlockHandle
from shared.messages.descriptor import RequestDescriptor


@dataclass(frozen=True, slots=True)
class EarlySpan:
    """A step with a slice of a prompt whose later pictures were missing."""

    started_s: float
    ended_s: float
    num_tokens: int


@dataclass(eq=False)
class PrefillJob:
    """A prompt, the embeddings of its pictures but the first `num_skipped`, and its progress.

    `missing` are the numbers, within the request, of the pictures whose rows of `embeddings` are
    still to come. The scheduler sets `blocks` and the numbers of tokens and owns the blocks until
    the last slice is computed; then they belong to the task that awaits `done`. `done` gives None
    when the prompt could not start: its first pictures were to come from the cache, which no longer
    has them. `began` is called with every slice that is computed once nothing is missing; `early`
    are the spans before that.
    `begun` is set once it has blocks and will be computed to its end without another wait; its
    first `num_begun_tokens` tokens are computed by then. `progress` tells from then on how far it
    is, for decoders if it `travels_early`.
    """

    request: RequestDescriptor
    prompt: PreparedPrompt
    block_keys: tuple[bytes, ...] = ()
    num_skipped: int = 0
    embeddings: torch.Tensor | None = None
    missing: set[int] = field(default_factory=set)
    blocks: BlockHandle | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_begun_tokens: int = 0
    began: Callable[[], None] = lambda: None
    started_s: float = 0.0
    ended_s: float = 0.0
    early: list[EarlySpan] = field(default_factory=list)
    travels_early: bool = False
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    progress: PrefillProgress = field(default_factory=PrefillProgress)
    done: asyncio.Future[FirstToken | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.request.num_tokens

    @property
    def max_context_tokens(self) -> int:
        """Tokens of prompt and answer, if that gets as long as it may."""
        return self.request.max_context_tokens

    @property
    def num_ready_tokens(self) -> int:
        """Tokens before the first row of a picture that is missing; all of them if none is."""
        return self.request.media[min(self.missing)].offset if self.missing else self.num_tokens

    @property
    def num_bare_tokens(self) -> int:
        """Tokens that can only come from the cache: up to the last row of the skipped pictures."""
        if not self.num_skipped:
            return 0
        return self.request.media[self.num_skipped - 1].stop

    @property
    def whole_spans(self) -> tuple[tuple[int, int], ...]:
        """Tokens that see each other whole."""
        return self.prompt.bidirectional_spans

    @property
    def priority(self) -> int:
        """The request's: lower is more urgent."""
        return self.request.priority

    @property
    def deadline_s(self) -> float:
        """The request's, by the wall clock."""
        return self.request.deadline_unix_s

    def begin(self, num_computed_tokens: int, now_s: float) -> None:
        """A slice is computed, and nothing is missing any more."""
        self.began()
        self.progress.computed(num_computed_tokens)
        if not self.begun.is_set():
            self.started_s, self.num_begun_tokens = now_s, num_computed_tokens
            self.begun.set()

    def input(self, start: int, stop: int) -> PromptInput:
        """Tokens `start .. stop` as the executor takes them."""
        block_ids = self.blocks.block_ids if self.blocks else ()
        return PromptInput(self.prompt, self.embeddings, block_ids, start, stop)

    def resolve(self, first: FirstToken | None) -> None:
        """Tell the task, unless it was cancelled meanwhile."""
        if not self.done.done():
            self.done.set_result(first)

    def fail(self, error: Exception) -> None:
        """Tell the task, unless it was cancelled meanwhile."""
        if not self.done.done():
            self.done.set_exception(error)


def num_covered_pictures(request: RequestDescriptor, num_cached_tokens: int) -> int:
    """How many of a request's first pictures lie wholly in its first `num_cached_tokens` tokens."""
    return sum(item.stop <= num_cached_tokens for item in request.media)
