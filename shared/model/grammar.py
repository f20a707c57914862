"""Grammars at work: which tokens may come next.

In: a `GrammarSpec` and the answer so far. Out: a `GrammarState` that fills bitmasks over the
vocabulary and follows the answer. Compiling takes up to seconds and happens on a thread of its
own, never in a step; what was compiled is kept for the next request with the same grammar. A
model's vocabulary is prepared for grammars when the first one comes. Knows neither logits nor
torch.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import llguidance
import llguidance.numpy
import numpy as np
import numpy.typing as npt

from shared.errors import FailureKind, RequestFailed, UnsupportedModel
from shared.messages.descriptor import GrammarSpec, RequestDescriptor
from shared.modelspec import ModelSpec
from shared.text.grammar import LIMITS, source

MAX_COMPILED = 128

MaskArray = npt.NDArray[np.int32]
"""Bitmasks `[rows, ceil(vocab / 32)]`; bit i of word w stands for token 32 w + i."""


class GrammarState:
    """One sequence's place in its grammar. Used by one thread at a time."""

    def __init__(self, matcher: llguidance.LLMatcher, stop_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids

    def append(self, token_id: int) -> str | None:
        """The answer grew by this token. Returns why the grammar cannot go on, else None."""
        if token_id in self._stop_ids and self._is_complete():
            return None
        is_taken = self._matcher.try_consume_tokens([token_id]) == 1
        if self._matcher.is_error():
            return f"the grammar cannot be followed any further: {self._matcher.get_error()}"
        return None if is_taken else "the grammar allows no token of this model's vocabulary here"

    def _is_complete(self) -> bool:
        return self._matcher.is_accepting() and not self._matcher.is_error()

    def fill(self, masks: MaskArray, row: int, drafts: Sequence[int] = ()) -> None:
        """Set row `row` to the tokens that may follow the answer and these guessed tokens.

        Behind a guess that the grammar does not allow everything may follow: such a guess is never
        chosen, so no row behind it counts.
        """
        num_taken, is_allowed = 0, True
        for token_id in drafts:
            if token_id in self._stop_ids and self._is_complete():
                continue  # as `append` does: an answer that goes on behind it goes on from here
            if self._matcher.try_consume_tokens([token_id]) != 1:
                is_allowed = False
                break
            num_taken += 1
        if is_allowed:
            llguidance.numpy.fill_next_token_bitmask(self._matcher, masks, row)
        else:
            masks[row] = -1
        if num_taken:
            self._matcher.rollback(num_taken)


class Grammars:
    """Compiles a model's grammars and keeps the newest `MAX_COMPILED`."""

    def __init__(self, model_dir: Path, spec: ModelSpec) -> None:
        self._path = model_dir / "tokenizer.json"
        self._vocab_size = spec.text.vocab_size
        self._stop_ids = list(spec.eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSpec, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    async def open_for(self, request: RequestDescriptor, *newer_ids: int) -> GrammarState | None:
        """The state of a request's grammar after its answer so far, or None if it has none.

        Raises `RequestFailed` (bad request) for a grammar that cannot be used with this model.
        """
        if request.sampling.grammar is None:
            return None
        return await asyncio.to_thread(self.open, request, *newer_ids)

    def open(self, request: RequestDescriptor, *newer_ids: int) -> GrammarState | None:
        """As `open_for`, for a caller that may block."""
        spec = request.sampling.grammar
        if spec is None:
            return None
        matcher = self._start_of(spec)
        answer_ids = [*request.emitted_token_ids, *newer_ids]
        if matcher.try_consume_tokens(answer_ids) != len(answer_ids):
            raise _unusable(matcher, "the answer so far does not follow the grammar")
        self._check_start(matcher)
        return GrammarState(matcher, self._stop_ids)

    def _start_of(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        with self._lock:
            matcher = self._compiled.get(spec)
            if matcher is None:
                matcher = llguidance.LLMatcher(self._vocabulary(), source(spec), limits=LIMITS)
                if matcher.is_error():
                    raise _unusable(matcher, "the grammar does not compile")
                self._compiled[spec] = matcher
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(spec)
            return matcher.deep_copy()

    def _vocabulary(self) -> llguidance.LLTokenizer:
        if self._tokenizer is None:
            try:
                self._tokenizer = llguidance.LLTokenizer(
                    self._path.read_text(encoding="utf-8"),
                    n_vocab=self._vocab_size,
                    eos_token=self._stop_ids,
                )
            except (OSError, ValueError) as error:
                raise UnsupportedModel(
                    f"{self._path}: not usable with grammars: {error}"
                ) from error
        return self._tokenizer

    def _check_start(self, matcher: llguidance.LLMatcher) -> None:
        """The first mask is the costliest: a grammar that is too much fails here, not in a step."""
        masks = np.zeros((1, -(-self._vocab_size // 32)), dtype=np.int32)
        llguidance.numpy.fill_next_token_bitmask(matcher, masks)
        if matcher.is_error() or not masks.any():
            raise _unusable(matcher, "the grammar allows no token of this model's vocabulary")


def _unusable(matcher: llguidance.LLMatcher, reason: str) -> RequestFailed:
    detail = matcher.get_error()
    return RequestFailed(FailureKind.BAD_REQUEST, f"{reason}: {detail}" if detail else reason)
