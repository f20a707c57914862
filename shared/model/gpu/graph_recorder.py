"""CUDA graphs: a step recorded once and replayed as a single launch.

In: a step that reads and writes the same memory every time and never waits for the device. Out: a
function that replays it. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Step = Callable[[], torch.Tensor]

NUM_WARM_UPS = 2
"""Runs before the recording: kernels are compiled and libraries set themselves up in them."""


class GraphRecorder(Protocol):
    """Turns steps into quicker ones."""

    def record(self, run: Step) -> Step | None:
        """A function that does what `run` does, on the same memory.

        Its result is valid until any recorded step is replayed. None where recording it would take
        more memory than is allowed, or than there is.
        """
        ...


class CudaGraphRecorder:
    """Records on one device; all graphs share one memory pool of at most `max_bytes`."""

    def __init__(self, device: torch.device, max_bytes: int) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._pool = torch.cuda.graph_pool_handle()
        self.held_bytes = 0

    def record(self, run: Step) -> Step | None:
        """See `GraphRecorder`. Recording large steps first lets small ones use their memory."""
        try:
            return self._record(run)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None

    def _record(self, run: Step) -> Step | None:
        self._warm_up(run)
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        taken = torch.cuda.memory_reserved(self._device) - before
        if self.held_bytes + taken > self._max_bytes:
            del result, graph
            torch.cuda.empty_cache()
            return None
        self.held_bytes += taken

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    def _warm_up(self, run: Step) -> None:
        """On another stream, as CUDA asks for work that is about to be recorded."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
