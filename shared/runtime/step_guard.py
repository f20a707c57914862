"""What a failed step means for the requests in it, and for the worker.

In: the error of a step that failed, or the news that one succeeded. Out: the failure that each
request of the step ends its attempt with, or `StageBroken` once steps keep failing: a worker whose
device is gone must not drain the queue by failing everything it takes.
"""

from __future__ import annotations

import logging

from shared.errors import FailureKind, RequestFailed, TriptychError

MAX_FAILED_STEPS = 3

logger = logging.getLogger(__name__)


class StageBroken(TriptychError):
    """Several steps in a row failed; the process ends and is started anew by whoever watches it."""


class StepGuard:
    """Counts the failed steps of one stage."""

    def __init__(self, stage: str, max_failed_steps: int = MAX_FAILED_STEPS) -> None:
        self._stage = stage
        self._max_failed_steps = max_failed_steps
        self._num_failed = 0

    def succeeded(self) -> None:
        """A step went through: earlier failures were passing."""
        self._num_failed = 0

    def failed(self, error: Exception) -> RequestFailed:
        """A step failed. Its requests may succeed elsewhere: the gateway's attempts bound that."""
        logger.error("a step of %s failed", self._stage, exc_info=error)
        self._num_failed += 1
        return RequestFailed(
            FailureKind.WORKER_LOST,
            f"a step of {self._stage} failed: {type(error).__name__}",
            retryable=True,
        )

    def check(self) -> None:
        """Raise `StageBroken` after too many failures in a row. Call it once the requests know."""
        if self._num_failed >= self._max_failed_steps:
            raise StageBroken(f"{self._num_failed} steps of {self._stage} in a row failed")


def not_a_number(stage: str) -> RequestFailed:
    """The model's output for one request was not finite: the weights or its KV are damaged."""
    return RequestFailed(
        FailureKind.INTERNAL, f"the model's output in {stage} was not a finite number"
    )
