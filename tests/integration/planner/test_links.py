"""Hops and transfers between two processes, measured over real NATS and real UCX."""

from __future__ import annotations

import multiprocessing

import pytest

pytest.importorskip("ucxx")

from services.planner.profiling.links import NUM_LINKS_STEPS, measure_links
from shared.errors import TriptychError
from tests.support.nats_server import NatsServer


async def test_every_hop_takes_time_and_the_other_process_ends(nats_server: NatsServer) -> None:
    steps = 0

    def on_step() -> None:
        nonlocal steps
        steps += 1

    links = await measure_links(nats_server.url, 10, on_step)
    assert steps == NUM_LINKS_STEPS
    # A queued task is stored and fetched, so it takes longer than a message that is passed on.
    assert 0 < links.token_hop_s < links.queue_hop_s < 5
    assert 0 < links.step_s < 5
    assert 0 < links.store_s < 5
    assert 0 <= links.pull_s < 5
    assert links.bytes_per_s > 1e6
    assert links.gateway_s == 0.0
    assert not multiprocessing.active_children()


async def test_a_bus_that_is_away_is_told(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.planner.profiling.links.ANSWER_TIMEOUT_S", 0.0)
    with pytest.raises(TriptychError, match="the process to measure against is silent"):
        await measure_links(nats_server.url, 10, lambda: None)
    assert not multiprocessing.active_children()
