"""Simulated time, shared queues and devices: what the simulated stages are made of.

Events at the same time happen in the order in which they were scheduled, so a simulation is
deterministic. Knows no stage.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

Action = Callable[[], None]
Slowness = tuple[float, float]
"""From so many seconds on, everything takes so many times as long."""
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
    """The cores of a machine, shared equally by all that is ready at a time.

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
        self._running: list[tuple[float, int, Action]] = []  # a heap, by `_done_s` at the end
        self._order = itertools.count()
        self._done_s = 0.0  # seconds of a core that each has had that ran all the time
        self._seen_s = 0.0
        self._version = 0
        self._slowness = 1.0
        self.busy_s = 0.0
        """Seconds of all cores, where they are shared."""

    def run(self, seconds: float, done: Action) -> None:
        """Run `done` after so many seconds of a core; what takes none waits for nobody."""
        if not self._num_cores or not seconds:
            self._timeline.after(seconds, done)
            return
        self._advance()
        heapq.heappush(self._running, (self._done_s + seconds, next(self._order), done))
        self._plan()

    def slow(self, slowness: float) -> None:
        """From now on the cores take so many times as long."""
        self._advance()
        self._slowness = slowness
        self._plan()

    def hop(self, seconds: float, done: Action) -> None:
        """Run `done` after a hop that takes so long while nothing else runs."""
        if not self._num_cores:
            self._timeline.after(seconds, done)
            return
        waits_s = seconds * self._wait_share
        self.run(seconds - waits_s, lambda: self._timeline.after(waits_s, done))

    @property
    def _speed(self) -> float:
        """Of each that runs, next to one that has a core while the others are idle."""
        num_busy = min(len(self._running), self._num_cores)
        crowd = (num_busy - 1) / max(1, self._num_cores - 1)
        speed = (1.0 - crowd * (1.0 - self._full_speed)) / self._slowness
        return speed * num_busy / len(self._running)

    def _advance(self) -> None:
        """Up to now."""
        passed_s, self._seen_s = self._timeline.now_s - self._seen_s, self._timeline.now_s
        if self._running:
            self._done_s += passed_s * self._speed
            self.busy_s += passed_s * min(len(self._running), self._num_cores)

    def _plan(self) -> None:
        """The next end, unless something else begins before."""
        self._version += 1
        if self._running:
            left_s = max(0.0, self._running[0][0] - self._done_s) / self._speed
            self._timeline.after(left_s, partial(self._end, self._version))

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        self._done_s, _, done = heapq.heappop(self._running)
        self._plan()
        done()


class Slots:
    """Turns on shared cores: so many steps at a time, first come, first served."""

    def __init__(self, num_slots: int) -> None:
        self._num_free = num_slots
        self._waiting: deque[Action] = deque()

    def take(self, begin: Action) -> None:
        """Run `begin` when a slot is free; give it back by `end`."""
        if self._num_free:
            self._num_free -= 1
            begin()
        else:
            self._waiting.append(begin)

    def end(self) -> None:
        """The slot goes to who has waited longest."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._num_free += 1


class Device:
    """Computes one step after the other, first come, first served: the stages of a process share
    it. It is a device of its own, or takes its share of a host's cores, where it has `slots` when
    it is its turn."""

    def __init__(self, host: Host, slots: Slots | None = None) -> None:
        self._host = host
        self._slots = slots
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
            if self._slots is None:
                self._run(seconds, done)
            else:
                self._slots.take(lambda: self._run(seconds, done))

    def _run(self, seconds: float, done: Action) -> None:
        self._host.run(seconds, lambda: self._end(done))

    def _end(self, done: Action) -> None:
        if self._slots is not None:
            self._slots.end()
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
