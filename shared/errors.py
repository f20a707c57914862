"""The tree of Triptych's errors.

Adapters (NATS, UCX, safetensors, HTTP) translate what they meet into one of these exactly once;
above an adapter nothing else is caught. Each error carries the numbers a reader needs to act.
"""

from __future__ import annotations

from enum import StrEnum


class TriptychError(Exception):
    """Base of every error that Triptych raises on purpose."""


class SettingsError(TriptychError):
    """A setting is missing, malformed or out of range; the message names it, its value and its
    limit."""


class UnsupportedModel(TriptychError):
    """The model folder asks for something that this version cannot do exactly."""


class ModelLoadError(TriptychError):
    """Weights are missing, mis-shaped or unreadable."""


class OutOfBlocks(TriptychError):
    """A pool cannot serve an allocation now."""

    def __init__(self, pool: str, requested: int, free: int, total: int) -> None:
        super().__init__(f"{pool}: {requested} blocks requested, {free} of {total} free")
        self.pool = pool
        self.requested = requested
        self.free = free
        self.total = total


class ProtocolError(TriptychError):
    """A message could not be understood: wrong schema, wrong version or too large."""


class BusError(TriptychError):
    """The message bus could not be reached or refused an operation."""


class QueueFull(BusError):
    """A bounded work queue refused a new task; the client should try again later."""


class ObjectMissing(BusError):
    """A stored object (media bytes, for example) is not there or has expired."""


class Outcome(StrEnum):
    """How a transfer ended when it did not succeed. Only NOT_READY is worth a retry as it
    stands."""

    NOT_READY = "not_ready"
    MISSING = "missing"
    INCOMPATIBLE = "incompatible"
    VERSION = "version"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class TransferError(TriptychError):
    """A tensor did not arrive."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(f"transfer {outcome.value}: {detail}")
        self.outcome = outcome
        self.detail = detail


class FailureKind(StrEnum):
    """Why a request ended without an answer; travels to the gateway, which maps it to HTTP."""

    BAD_REQUEST = "bad_request"
    TIMEOUT = "timeout"
    MEDIA_MISSING = "media_missing"
    WORKER_LOST = "worker_lost"
    OVERLOADED = "overloaded"
    PREEMPTED = "preempted"
    INTERNAL = "internal"


class RequestFailed(TriptychError):
    """One request cannot go on; `retryable` says whether running it again elsewhere may help."""

    def __init__(self, kind: FailureKind, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retryable = retryable
