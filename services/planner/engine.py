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
    """The cores of a machine, on which everything that runs gets an equal share.

    With `num_cores` 0 there is one for each that runs: a device for every worker, a machine for
    every process. `full_speed` is how fast each core is while all are busy, next to one that is
    busy alone: cores share caches, memory and sometimes more.
    """

    def __init__(self, timeline: Timeline, num_cores: int = 0, full_speed: float = 1.0) -> None:
        self._timeline = timeline
        self._num_cores = num_cores
        self._full_speed = full_speed
        self._left_s: dict[int, tuple[float, Action]] = {}  # of a core to oneself
        self._numbers = itertools.count()
        self._counted_s = 0.0
        self._epoch = 0
        self.busy_s = 0.0
        """Seconds of all cores, where they are shared."""

    def run(self, seconds: float, done: Action) -> None:
        """Run `done` after so many seconds of a core."""
        if not self._num_cores:
            self._timeline.after(seconds, done)
            return
        self._count()
        self._left_s[next(self._numbers)] = (seconds, done)
        self._wait_for_first()

    def _share(self) -> float:
        """The speed at which each of those that run gets on; 1 is a core to oneself."""
        num_running, num_cores = len(self._left_s), self._num_cores
        if num_running <= 1:
            return 1.0
        crowd = (min(num_running, num_cores) - 1) / max(1, num_cores - 1)
        speed = 1.0 - crowd * (1.0 - self._full_speed)
        return speed * min(1.0, num_cores / num_running)

    def _count(self) -> None:
        """Take what was computed since the last change off what is left."""
        passed_s = self._timeline.now_s - self._counted_s
        worked_s = passed_s * self._share()
        self.busy_s += passed_s * min(len(self._left_s), self._num_cores)
        self._counted_s = self._timeline.now_s
        self._left_s = {
            number: (left_s - worked_s, done) for number, (left_s, done) in self._left_s.items()
        }

    def _wait_for_first(self) -> None:
        """Every change gives new shares, so what was awaited before no longer holds."""
        self._epoch += 1
        if self._left_s:
            epoch = self._epoch
            least_s = min(left_s for left_s, _ in self._left_s.values())
            delay_s = max(0.0, least_s) / self._share()
            self._timeline.after(delay_s, lambda: self._first_ended(epoch))

    def _first_ended(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self._count()
        number = min(self._left_s, key=lambda number: self._left_s[number][0])
        _, done = self._left_s.pop(number)
        self._wait_for_first()
        done()


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
        self._host.run(self._hop_s, lambda: self._arrive(task))

    def take(self, taker: Callable[[T], None]) -> None:
        """Call `taker` with one task: one that waits is fetched, else the next one that comes."""
        if self._tasks:
            task = self._tasks.popleft()
            self._host.run(self._hop_s, lambda: taker(task))
        else:
            self._takers.append(taker)

    def _arrive(self, task: T) -> None:
        if self._takers:
            self._takers.popleft()(task)
        else:
            self._tasks.append(task)
