"""Metrics by name, and the endpoint that serves them."""

from __future__ import annotations

import json

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from services.launcher.ports import free_port
from shared.telemetry import metrics
from shared.telemetry.http import Health, TelemetryEndpoint
from shared.transport.base import TransportCounters


def test_groups_share_a_registry_and_carry_the_prefix() -> None:
    registry = CollectorRegistry()
    tasks = metrics.TaskMetrics.create(registry)
    metrics.EncoderMetrics.create(registry).batch_items.observe(3)
    metrics.PrefillMetrics.create(registry).prompt_tokens.inc(7)
    metrics.DecodeMetrics.create(registry).generation_tokens.inc(2)
    metrics.watch_kv_usage(registry, "decode", lambda: 0.25)
    tasks.running.labels("decode").set(4)
    tasks.failures.labels("decode", "timeout").inc()
    text = generate_latest(registry).decode()
    assert 'triptych_num_requests_running{stage="decode"} 4.0' in text
    assert 'triptych_request_failure_total{kind="timeout",stage="decode"} 1.0' in text
    assert "triptych_prompt_tokens_total 7.0" in text
    assert "triptych_generation_tokens_total 2.0" in text
    assert 'triptych_kv_cache_usage_perc{stage="decode"} 0.25' in text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert all(name.startswith(metrics.PREFIX) for name in names)


def test_transport_counters_are_read_when_asked() -> None:
    registry = CollectorRegistry()
    counters = TransportCounters(
        bytes_sent=10,
        bytes_received=20,
        bytes_local=30,
        transfers_sent=1,
        transfers_received=2,
        transfers_failed=3,
        leases_open=4,
        leases_expired=5,
        quarantined_bytes=6,
    )
    registry.register(metrics.TransportCollector(lambda: counters))
    text = generate_latest(registry).decode()
    for line in (
        'triptych_transfer_bytes_total{direction="sent"} 10.0',
        'triptych_transfer_bytes_total{direction="received"} 20.0',
        'triptych_transfer_bytes_total{direction="local"} 30.0',
        "triptych_transfers_failed_total 3.0",
        "triptych_leases_open 4.0",
        "triptych_leases_expired_total 5.0",
        "triptych_quarantined_bytes 6.0",
    ):
        assert line in text


async def test_the_endpoint_serves_metrics_and_health() -> None:
    registry = CollectorRegistry()
    metrics.PrefillMetrics.create(registry).prompt_tokens.inc()
    health = Health(ready=False, details={"loading": "weights"})
    port = free_port()
    async with (
        TelemetryEndpoint(registry, lambda: health, host="127.0.0.1", port=port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        text = (await client.get("/metrics")).text
        assert "triptych_prompt_tokens_total 1.0" in text
        answer = await client.get("/health")
        assert answer.status_code == 503
        assert answer.json() == {"ready": False, "loading": "weights"}
        health = Health(ready=True)
        answer = await client.get("/health")
        assert (answer.status_code, json.loads(answer.text)) == (200, {"ready": True})
        assert (await client.get("/elsewhere")).status_code == 404
        assert (await client.post("/metrics")).status_code == 405
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{port}/health")


async def test_port_zero_serves_nothing() -> None:
    endpoint = TelemetryEndpoint(CollectorRegistry(), lambda: Health(True), host="", port=0)
    async with endpoint:
        pass
