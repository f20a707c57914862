"""How far one prompt is computed, for whoever waits for a part of its keys and values.

In: the stage's word on finished layers and slices, the first token, or the end of it all. Out:
waits for a number of tokens in a number of layers, and for the first token. Knows no tensors.
"""

from __future__ import annotations

from shared.errors import Outcome, TransferError
from shared.messages.descriptor import TokenId
from shared.runtime.signal import Signal


class PrefillProgress:
    """One prompt's. All calls come from one event loop."""

    def __init__(self) -> None:
        self._num_tokens = 0  # in every layer
        self._slice_tokens = 0  # up to the end of the slice that is being computed
        self._slice_layers = 0  # of these
        self._first: TokenId | None = None
        self._has_ended = False
        self._changed = Signal()

    def computed(self, num_tokens: int) -> None:
        """The first `num_tokens` tokens are computed in every layer."""
        self._num_tokens = max(self._num_tokens, num_tokens)
        self._changed.notify()

    def computing(self, num_tokens: int, num_layers: int) -> None:
        """The first `num_tokens` tokens are computed in the first `num_layers` layers."""
        self._slice_tokens, self._slice_layers = num_tokens, num_layers
        self._changed.notify()

    def complete(self, first: TokenId) -> None:
        """The first token is known."""
        self._first = first
        self._changed.notify()

    def end(self) -> None:
        """Nothing more will come. Idempotent."""
        self._has_ended = True
        self._changed.notify()

    def covers(self, num_tokens: int, num_layers: int) -> bool:
        """Whether so many tokens are computed in so many layers."""
        if num_tokens <= self._num_tokens:
            return True
        return num_tokens <= self._slice_tokens and num_layers <= self._slice_layers

    async def until(self, num_tokens: int, num_layers: int) -> None:
        """Wait for so many tokens in so many layers. Raises `TransferError` if they never come."""
        await self._changed.until(lambda: self.covers(num_tokens, num_layers) or self._has_ended)
        if not self.covers(num_tokens, num_layers):
            raise _given_up()

    async def first_token(self) -> None:
        """Wait for the first token. Raises `TransferError` if it never comes."""
        await self._changed.until(lambda: self._first is not None or self._has_ended)
        if self._first is None:
            raise _given_up()

    @property
    def first(self) -> TokenId:
        """The first token, once it is known."""
        if self._first is None:
            raise TransferError(Outcome.NOT_READY, "the prompt is still being computed")
        return self._first


def _given_up() -> TransferError:
    return TransferError(Outcome.CANCELLED, "the prompt was given up")
