"""Prometheus metrics of a worker, in groups: a stage gets its own and no other's.

Names follow those that dashboards of other servers use, with the prefix `triptych_`. Every label
has a small, fixed set of values. A gateway counts for itself. Groups are made once per process:
two stages in one process share a `TaskMetrics` and differ by its `stage` label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shared.cache.prefix import PrefixCounters
from shared.transport.base import TransportCounters

PREFIX = "triptych_"

_WAIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WORK_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class TaskMetrics:
    """What every stage has. Labels: `stage`, and `kind` of a failure (`FailureKind`)."""

    queue_s: Histogram
    running: Gauge
    waiting: Gauge
    failures: Counter
    redeliveries: Counter

    @classmethod
    def create(cls, registry: CollectorRegistry) -> Self:
        make = _Maker(registry, ("stage",))
        return cls(
            queue_s=make.histogram(
                "request_queue_time_seconds", "From queueing a task to its delivery", _WAIT_S
            ),
            running=make.gauge("num_requests_running", "Tasks at work"),
            waiting=make.gauge("num_requests_waiting", "Tasks taken that wait for memory or input"),
            failures=_Maker(registry, ("stage", "kind")).counter(
                "request_failure", "Tasks that ended without a result"
            ),
            redeliveries=make.counter("tasks_redelivered", "Tasks that came more than once"),
        )


@dataclass(frozen=True)
class EncoderMetrics:
    """Media to embeddings."""

    preprocess_s: Histogram
    forward_s: Histogram
    batch_items: Histogram
    pool_usage: Gauge
    cache_hits: Counter
    encoded: Counter
    spared: Counter
    preprocess_queue: Gauge

    @classmethod
    def create(cls, registry: CollectorRegistry) -> Self:
        make = _Maker(registry)
        return cls(
            preprocess_s=make.histogram(
                "encoder_preprocess_seconds", "From raw media to patches", _WORK_S
            ),
            forward_s=make.histogram("encoder_forward_seconds", "One batch in the tower", _WORK_S),
            batch_items=make.histogram("encoder_batch_items", "Media items in a batch", _BATCH),
            pool_usage=make.gauge("embedding_pool_usage_perc", "Share of the pool in use, 0 to 1"),
            cache_hits=make.counter("embedding_cache_hits", "Tasks whose embedding was there"),
            encoded=make.counter("embeddings_encoded", "Media items that went through the tower"),
            spared=make.counter(
                "encode_tasks_spared", "Tasks whose embedding another worker has or makes"
            ),
            preprocess_queue=make.gauge(
                "encoder_preprocess_items", "Media items in the preprocessing threads or before"
            ),
        )


@dataclass(frozen=True)
class PrefillMetrics:
    """Prompt to keys, values and first token. Label: the `source` of an item's embedding: `prefix`
    (its keys and values are cached), `pool` (it was here), `joined` (another request here was
    fetching it) or `pulled`."""

    forward_s: Histogram
    batch_tokens: Histogram
    prompt_tokens: Counter
    cached_tokens: Counter
    early_tokens: Counter
    suspensions: Counter
    embedding_wait_s: Histogram
    embedding_transfer_s: Histogram
    embeddings: Counter
    embeddings_asked: Counter
    embeddings_here: Counter
    pool_usage: Gauge

    @classmethod
    def create(cls, registry: CollectorRegistry) -> Self:
        make = _Maker(registry)
        return cls(
            forward_s=make.histogram("prefill_forward_seconds", "One prefill step", _WORK_S),
            batch_tokens=make.histogram("prefill_batch_tokens", "Tokens in a step", _TOKENS),
            prompt_tokens=make.counter(
                "prompt_tokens", "Tokens of prefilled prompts, cached ones among them"
            ),
            cached_tokens=make.counter("prompt_tokens_cached", "Prompt tokens found in the cache"),
            early_tokens=make.counter(
                "prompt_tokens_early",
                "Tokens computed before the last embedding of their prompt had landed",
            ),
            suspensions=make.counter(
                "prefill_suspensions", "Steps that waited between layers for more urgent prompts"
            ),
            embedding_wait_s=make.histogram(
                "encoder_queue_seconds", "Until the embedding of an item was announced", _WAIT_S
            ),
            embedding_transfer_s=make.histogram(
                "encoder_transfer_seconds", "Pulling one embedding", _WORK_S
            ),
            embeddings=_Maker(registry, ("source",)).counter(
                "prompt_embeddings", "Media items of prompts, by where their embedding came from"
            ),
            embeddings_asked=make.counter(
                "embeddings_asked_again", "Encode tasks that prefill queued because nobody had one"
            ),
            embeddings_here=make.counter(
                "embeddings_encoded_here", "Media items that prefill had its own process encode"
            ),
            pool_usage=make.gauge(
                "prefill_embedding_pool_usage_perc", "Share of the pool in use, 0 to 1"
            ),
        )


class PrefixCacheCollector(Collector):
    """The prefix cache's own exact counts, in tokens, read when somebody asks."""

    def __init__(self, counters: Callable[[], PrefixCounters]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        now = self._counters()
        yield _total(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache", now.asked_tokens
        )
        yield _total("prefix_cache_hits", "Prompt tokens found in it", now.hit_tokens)
        yield _total("prefix_cache_evictions", "Cached blocks given up", now.evicted_blocks)
        yield _level("prefix_cache_blocks", "Cached blocks", now.cached_blocks)


@dataclass(frozen=True)
class DecodeMetrics:
    """Keys and values to tokens. Labels: `how` a sequence gave way (`swap`, `recompute`), and the
    `position` of an accepted token in its draft, from 1."""

    step_s: Histogram
    batch_sequences: Histogram
    generation_tokens: Counter
    kv_transfer_s: Histogram
    preemptions: Counter
    drafts: Counter
    draft_tokens: Counter
    accepted_tokens: Counter
    accepted_at: Counter

    @classmethod
    def create(cls, registry: CollectorRegistry) -> Self:
        make = _Maker(registry)
        return cls(
            step_s=make.histogram("decode_step_seconds", "One decode step", _WORK_S),
            batch_sequences=make.histogram("decode_batch_sequences", "Sequences in a step", _BATCH),
            generation_tokens=make.counter("generation_tokens", "Answer tokens generated"),
            kv_transfer_s=make.histogram("kv_transfer_seconds", "Pulling one sequence", _WORK_S),
            preemptions=_Maker(registry, ("how",)).counter(
                "num_preemptions", "Sequences put back for want of blocks"
            ),
            drafts=make.counter("spec_decode_num_drafts", "Drafts that the model checked"),
            draft_tokens=make.counter("spec_decode_num_draft_tokens", "Tokens in these drafts"),
            accepted_tokens=make.counter(
                "spec_decode_num_accepted_tokens", "Draft tokens that came true"
            ),
            accepted_at=_Maker(registry, ("position",)).counter(
                "spec_decode_num_accepted_tokens_per_pos", "Of these, at this place of a draft"
            ),
        )


def watch_kv_usage(
    registry: CollectorRegistry, stage: str, used_share: Callable[[], float]
) -> None:
    """`kv_cache_usage_perc` of one stage (0 to 1), read when somebody asks."""
    family = _Maker(registry, ("stage",)).gauge("kv_cache_usage_perc", "Share of blocks in use")
    family.labels(stage).set_function(used_share)


class TransportCollector(Collector):
    """The data plane's counters, read when somebody asks: the hot path pays nothing."""

    def __init__(self, counters: Callable[[], TransportCounters]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        now = self._counters()
        moved = CounterMetricFamily(
            f"{PREFIX}transfer_bytes", "Tensor bytes moved; local: in memory", labels=["direction"]
        )
        moved.add_metric(["sent"], now.bytes_sent)
        moved.add_metric(["received"], now.bytes_received)
        moved.add_metric(["local"], now.bytes_local)
        yield moved
        transfers = CounterMetricFamily(
            f"{PREFIX}transfers", "Segments moved", labels=["direction"]
        )
        transfers.add_metric(["sent"], now.transfers_sent)
        transfers.add_metric(["received"], now.transfers_received)
        yield transfers
        yield _total("transfers_failed", "Segments that did not arrive", now.transfers_failed)
        yield _total("leases_expired", "Leases that nobody extended", now.leases_expired)
        yield _level("leases_open", "Exposed tensors", now.leases_open)
        yield _level(
            "quarantined_bytes", "Landing memory of unsettled transfers", now.quarantined_bytes
        )


def _total(name: str, meaning: str, value: int) -> Metric:
    return CounterMetricFamily(f"{PREFIX}{name}", meaning, value=value)


def _level(name: str, meaning: str, value: int) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}{name}", meaning, value=value)


@dataclass(frozen=True)
class _Maker:
    """Makes metrics in one registry, with the prefix and the same labels."""

    registry: CollectorRegistry
    labels: tuple[str, ...] = ()

    def counter(self, name: str, meaning: str) -> Counter:
        """`name` without the suffix `_total`, which the exposition adds."""
        return Counter(f"{PREFIX}{name}", meaning, self.labels, registry=self.registry)

    def gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"{PREFIX}{name}", meaning, self.labels, registry=self.registry)

    def histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"{PREFIX}{name}", meaning, self.labels, registry=self.registry, buckets=buckets
        )
