"""Every name on the bus, in one place.

| name                     | kind                | what travels                                    |
|--------------------------|---------------------|-------------------------------------------------|
| `work.encode.<model>`    | JetStream queue     | `EncodeTask`                                    |
| `work.prefill.<model>`   | JetStream queue     | `PrefillTask`                                   |
| `work.decode.<model>`    | JetStream queue     | `DecodeTask`                                    |
| `dead.<work subject>`    | JetStream stream    | tasks that were given up, with the reason       |
| `events.<gateway>.<inc>` | core                | `EventBatch`, one per worker step per gateway   |
| `control.cancel`         | core                | `CancelRequest`                                 |
| `control.alive`          | core                | `RequestsAlive`                                 |
| `control.role`           | core                | `RoleRequest`, to the worker that it names      |
| `control.role_reports`   | core                | `RoleReport`, to whoever asked for the switch   |
| `spans`                  | core                | finished trace spans, for whoever watches       |
| `workers`                | KV bucket with TTL  | `Registration` by worker name                   |
| `embeddings`             | KV bucket with TTL  | `EmbeddingClaim`, `EmbeddingRef` by content key |
| `media`                  | object store        | raw media bytes by sha256                       |
"""

from __future__ import annotations

import hashlib
import re

from shared.messages.control import Role
from shared.messages.descriptor import WorkerRef

WORKERS_BUCKET = "workers"
EMBEDDINGS_BUCKET = "embeddings"
MEDIA_BUCKET = "media"
CANCEL = "control.cancel"
ALIVE = "control.alive"
ROLE = "control.role"
ROLE_REPORTS = "control.role_reports"
SPANS = "spans"
DEAD_LETTER_PREFIX = "dead"
EMBEDDINGS_TTL_S = 600.0

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def token(name: str) -> str:
    """A name as one subject token; two different names never share a token."""
    safe = _UNSAFE.sub("-", name)
    if safe == name:
        return safe
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def work(role: Role, model: str) -> str:
    """The work queue of one stage of one model."""
    return f"work.{role.value}.{token(model)}"


def events(gateway: WorkerRef) -> str:
    """Where one life of one gateway listens for its requests' events."""
    return f"events.{gateway.name}.{gateway.incarnation}"


def dead(work_subject: str) -> str:
    """Where the given-up tasks of one work queue are kept."""
    return f"{DEAD_LETTER_PREFIX}.{work_subject}"
