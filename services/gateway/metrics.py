"""What the gateway counts. Names follow those that dashboards of other servers use.

Every label has a fixed, small set of values.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_GAP_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class GatewayMetrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ttft_s = self._histogram(
            "time_to_first_token_seconds",
            "From the request's arrival to its first token",
            _LATENCY_S,
        )
        self.itl_s = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer", _GAP_S
        )
        self.e2e_s = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its end", _LATENCY_S
        )
        self.ingest_s = self._histogram(
            "ingest_seconds", "Fetching and decoding pictures, template and tokenizer", _LATENCY_S
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request", _TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Answer tokens of a request", _TOKENS
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens taken in")
        self.generation_tokens = self._counter("generation_tokens", "Answer tokens received")
        self.success = self._counter(
            "request_success", "Requests answered to the end", ["finished_reason"]
        )
        self.failure = self._counter(
            "request_failure", "Requests that ended with an error, by HTTP status", ["status"]
        )
        self.disconnects = self._counter("client_disconnects", "Clients that went away early")
        self.embeddings = self._counter(
            "request_embeddings",
            "Pictures of requests, by whether a worker has the embedding, makes it or is asked to, "
            "or several are",
            ["outcome"],
        )
        self.resubmissions = self._counter(
            "request_resubmissions", "Attempts that were given up and made again", ["trouble"]
        )

    def watch(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(f"triptych_{name}", meaning, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"triptych_{name}", meaning, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, meaning: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"triptych_{name}", meaning, labels or [], registry=self.registry)
