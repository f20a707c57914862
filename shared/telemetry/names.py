"""Every span's name and every attribute's key, in one place.

A request's spans, in the order of its life: queue time, transfer time and compute time are
separate, so that their sum explains the request's latency.
"""

from __future__ import annotations

REQUEST = "request"
INGEST = "ingest"
DISPATCH = "dispatch"
MEDIA_STORE = "media.store"
MEDIA_FETCH = "media.fetch"
QUEUE_ENCODE = "queue.encode"
PREPROCESS = "preprocess"
ENCODE = "encode"
TRANSFER_EMBEDDING = "transfer.embedding"
QUEUE_PREFILL = "queue.prefill"
WAIT_EMBEDDING = "wait.embedding"
PREFILL_EARLY = "prefill.early"
PREFILL = "prefill"
TRANSFER_KV = "transfer.kv"
QUEUE_DECODE = "queue.decode"
DECODE = "decode"
DETOKENIZE = "detokenize"
RECOVERY = "recovery"

ALL_SPANS = frozenset(
    {
        REQUEST, INGEST, DISPATCH, MEDIA_STORE, MEDIA_FETCH, QUEUE_ENCODE, PREPROCESS,
        ENCODE, TRANSFER_EMBEDDING, QUEUE_PREFILL, WAIT_EMBEDDING, PREFILL_EARLY, PREFILL,
        TRANSFER_KV, QUEUE_DECODE, DECODE, DETOKENIZE, RECOVERY,
    }
)  # fmt: skip

REQUEST_ID = "request_id"
ATTEMPT = "attempt"
STAGE = "stage"
NUM_BYTES = "num_bytes"
NUM_TOKENS = "num_tokens"
NUM_PATCHES = "num_patches"
BATCH_SIZE = "batch_size"
CACHE_HIT = "cache_hit"
FINISH_REASON = "finish_reason"
NUM_DELIVERED = "num_delivered"


def queue_span(stage: str) -> str:
    """The span of the time that a task waited for `stage`."""
    return f"queue.{stage}"
