"""Time as a value that can be passed in: decisions take `now`, only edges read a clock."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns seconds. Monotonic for durations on one machine, wall for what crosses machines."""

monotonic: Clock = time.monotonic
wall: Clock = time.time
