"""A while in which something is left undone, and whoever waits for its end.

In: seconds. Out: whether it is still on; a signal is notified when it is over.
"""

from __future__ import annotations

import asyncio

from shared.runtime.signal import Signal


class Pause:
    """Of one event loop. A new one takes the place of what is left of the one before.

    It is over when its timer says so and not by a clock: a loop may count whole milliseconds, as
    uvloop does, so that a timer is early, and who looks at a clock then is not told a second time.
    """

    def __init__(self, ended: Signal) -> None:
        self._ended = ended
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_on(self) -> bool:
        """Whether the last one goes on."""
        return self._timer is not None

    def begin(self, seconds: float) -> None:
        """Pause from now on."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._end)

    def _end(self) -> None:
        self._timer = None
        self._ended.notify()
