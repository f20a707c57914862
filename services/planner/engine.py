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


class Device:
    """Computes one step after the other, first come, first served: the stages of a process share
    it."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
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
            self._timeline.after(seconds, lambda: self._end(done))

    def _end(self, done: Action) -> None:
        # The next step was waiting before this one's results ask for another.
        self._next()
        done()


class TaskQueue(Generic[T]):
    """A shared queue: the worker that has waited longest gets the next task."""

    def __init__(self, timeline: Timeline, hop_s: float) -> None:
        self._timeline = timeline
        self._hop_s = hop_s
        self._tasks: deque[T] = deque()
        self._takers: deque[Callable[[T], None]] = deque()

    def put(self, task: T) -> None:
        """The task can be taken one hop from now."""
        self._timeline.after(self._hop_s, lambda: self._arrive(task))

    def take(self, taker: Callable[[T], None]) -> None:
        """Call `taker` with one task, now or when there is one."""
        if self._tasks:
            taker(self._tasks.popleft())
        else:
            self._takers.append(taker)

    def _arrive(self, task: T) -> None:
        if self._takers:
            self._takers.popleft()(task)
        else:
            self._tasks.append(task)
