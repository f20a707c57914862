"""Simulated time, shared queues and devices: what the simulated stages are made of.

Events at the same time happen in the order in which they were scheduled, so a simulation is
deterministic. Knows no stage.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

SLICE_S = 0.004
"""What Linux lets a thread compute while others wait: a tick of its usual 250 a second."""

Action = Callable[[], None]
T = TypeVar("T")


class Timeline:
    """Runs actions in the order of their time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Action]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, action: Action) -> None:
        """Run `action` so many seconds from now."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), action))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now_s, _, action = heapq.heappop(self._events)
            action()


class Host:
    """The cores of a machine. What is ready stands in one line; whoever gets a core keeps it for a
    slice while others wait, then goes to the end of the line.

    With `num_cores` 0 there is one for each that runs: a device for every worker, a machine for
    every process. `full_speed` is how fast each core is while all are busy, next to one that is
    busy alone: cores share caches, memory and sometimes more. `wait_share` is the part of a hop
    in which no core works for it: the way of a wake-up or a packet.
    """

    def __init__(
        self,
        timeline: Timeline,
        num_cores: int = 0,
        full_speed: float = 1.0,
        wait_share: float = 0.0,
    ) -> None:
        self._timeline = timeline
        self._num_cores = num_cores
        self._full_speed = full_speed
        self._wait_share = wait_share
        self._line: deque[tuple[float, Action]] = deque()  # seconds of a core to oneself
        self._num_running = 0
        self.busy_s = 0.0
        """Seconds of all cores, where they are shared."""

    def run(self, seconds: float, done: Action) -> None:
        """Run `done` after so many seconds of a core; what takes none waits for nobody."""
        if not self._num_cores or not seconds:
            self._timeline.after(seconds, done)
            return
        self._line.append((seconds, done))
        self._fill()

    def hop(self, seconds: float, done: Action) -> None:
        """Run `done` after a hop that takes so long while nothing else runs."""
        if not self._num_cores:
            self._timeline.after(seconds, done)
            return
        waits_s = seconds * self._wait_share
        self.run(seconds - waits_s, lambda: self._timeline.after(waits_s, done))

    def _fill(self) -> None:
        while self._line and self._num_running < self._num_cores:
            self._num_running += 1
            self._slice(*self._line.popleft())

    def _slice(self, left_s: float, done: Action) -> None:
        crowd = (self._num_running - 1) / max(1, self._num_cores - 1)
        speed = 1.0 - crowd * (1.0 - self._full_speed)
        worked_s = min(left_s, SLICE_S * speed)
        self.busy_s += worked_s / speed
        self._timeline.after(worked_s / speed, lambda: self._sliced(left_s - worked_s, done))

    def _sliced(self, left_s: float, done: Action) -> None:
        is_done = left_s <= 0
        if not is_done and not self._line:
            self._slice(left_s, done)
            return
        self._num_running -= 1
        if not is_done:
            self._line.append((left_s, done))
        self._fill()
        if is_done:
            done()  # what it starts goes behind those that wait


class Device:
    """Computes one step after the other, first come, first served: the stages of a process share
    it. It is a device of its own, or takes its share of a host's cores."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._waiting: deque[tuple[float, Action]] = deque()
        self._is_busy = False
        self.busy_s = 0.0

    def compute(self, seconds: float, done: Action) -> None:
        """Run `done` when the step is computed."""
        self._waiting.append((seconds, done))
        if not self._is_busy:
            self._next()

    def _next(self) -> None:
        self._is_busy = bool(self._waiting)
        if self._waiting:
            seconds, done = self._waiting.popleft()
            self.busy_s += seconds
            self._host.run(seconds, lambda: self._end(done))

    def _end(self, done: Action) -> None:
        # The next step was waiting before this one's results ask for another.
        self._next()
        done()


class TaskQueue(Generic[T]):
    """A shared queue: the worker that has waited longest gets the next task.

    A hop takes the host's time: passing a message on is work for all who take part.
    """

    def __init__(self, host: Host, hop_s: float) -> None:
        self._host = host
        self._hop_s = hop_s
        self._tasks: deque[T] = deque()
        self._takers: deque[Callable[[T], None]] = deque()

    def put(self, task: T) -> None:
        """The task can be taken one hop from now."""
        self._host.hop(self._hop_s, lambda: self._arrive(task))

    def take(self, taker: Callable[[T], None]) -> None:
        """Call `taker` with one task: one that waits is fetched, else the next one that comes."""
        if self._tasks:
            task = self._tasks.popleft()
            self._host.hop(self._hop_s, lambda: taker(task))
        else:
            self._takers.append(taker)

    def _arrive(self, task: T) -> None:
        if self._takers:
            self._takers.popleft()(task)
        else:
            self._tasks.append(task)
