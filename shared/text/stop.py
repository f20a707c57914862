"""Stop strings over token borders.

In: pieces of text. Out: the text that may be shown, and whether a stop string was met. Text that
could be the beginning of a stop string is held back; the stop string itself is never shown. What is
found does not depend on how the text was cut into pieces: the stop string that is complete first
wins, and of two that end together the longer one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shown:
    """Text for the client; after `stopped` nothing more follows."""

    text: str
    stopped: bool = False


class StopMatcher:
    """Watches one answer for any of `stops` (none of them empty)."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> Shown:
        """Take the next piece."""
        if self._stopped:
            return Shown("", stopped=True)
        pending = self._held + text
        found = self._first_match(pending)
        if found is not None:
            self._held, self._stopped = "", True
            return Shown(pending[:found], stopped=True)
        cut = len(pending) - self._num_suspicious(pending)
        self._held = pending[cut:]
        return Shown(pending[:cut])

    def flush(self) -> str:
        """The answer is over: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Where the stop string begins that is complete first."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_suspicious(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
