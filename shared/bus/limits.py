"""Every bound of the bus in one frozen value; both adapters obey it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from shared.errors import SettingsError

MIB = 1024 * 1024


class Storage(StrEnum):
    """Where streams live. `FILE` survives a restart of the server, `MEMORY` does not."""

    MEMORY = "memory"
    FILE = "file"


@dataclass(frozen=True)
class BusLimits:
    """Bounds and timers of one bus connection.

    A task that was taken `max_deliver` times without being ended is dead-lettered by whoever meets
    it next. `duplicate_window_s` is how long a message id is remembered, also after the task ended.
    `task_max_age_s` removes tasks that nobody will ever take.
    """

    storage: Storage = Storage.MEMORY
    queue_max_msgs: int = 10_000
    queue_max_bytes: int = 256 * MIB
    ack_wait_s: float = 10.0
    max_deliver: int = 4
    duplicate_window_s: float = 60.0
    task_max_age_s: float = 3600.0
    dead_max_msgs: int = 1_000
    dead_max_bytes: int = 64 * MIB
    dead_max_age_s: float = 24 * 3600.0
    kv_max_bytes: int = 64 * MIB
    subscription_max_msgs: int = 65_536
    subscription_max_bytes: int = 64 * MIB
    reconnect_buffer_bytes: int = 16 * MIB
    object_chunk_bytes: int = MIB // 2
    connect_timeout_s: float = 10.0
    request_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Storage) and value <= 0:
                raise SettingsError(f"bus limit {name} is {value}, it must be above 0")
        if self.duplicate_window_s > self.task_max_age_s:
            raise SettingsError(
                f"bus limit duplicate_window_s is {self.duplicate_window_s}, "
                f"it must not exceed task_max_age_s ({self.task_max_age_s})"
            )
