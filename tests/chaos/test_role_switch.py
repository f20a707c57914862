"""Roles change over real NATS and UCX while requests run: no answer is lost or changed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import httpx
import pytest

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from tests.support.cluster import Cluster
from tests.support.load import assert_settled, check, roles, switch, under_load, until
from tests.support.mixed import mixed_requests

pytestmark = pytest.mark.timeout(240)

NUM_REQUESTS = 16


def test_workers_change_their_roles_and_come_back_under_load(
    cluster: Cluster, engine: LocalEngine, prompts: PromptMaker
) -> None:
    """One between the stages of the language model, one between the tower and that."""
    pids = {p.name: p.popen.pid for p in cluster.processes.values()}
    with under_load(cluster, repeat(list(mixed_requests(NUM_REQUESTS, seed=41)))) as load:
        for worker, role in (
            ("decode-1", "prefill"),
            ("encoder-1", "decode"),
            ("decode-1", "decode"),
            ("encoder-1", "encode"),
        ):
            response = switch(cluster, worker, role)
            assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
            assert roles(cluster)[worker] == ([role], True)
            assert httpx.get(f"{cluster.url}/ready", trust_env=False).status_code == 200
    check(load.answers, engine, prompts, cluster)
    assert {p.name: p.popen.pid for p in cluster.processes.values()} == pids
    assert all(p.popen.poll() is None for p in cluster.processes.values())
    assert_settled(cluster)


def test_a_worker_killed_in_the_middle_of_a_switch_loses_no_request(
    cluster: Cluster, engine: LocalEngine, prompts: PromptMaker
) -> None:
    requests = list(mixed_requests(NUM_REQUESTS, seed=43))
    with under_load(cluster, repeat(requests)) as load, ThreadPoolExecutor(1) as pool:
        switching = pool.submit(switch, cluster, "decode-1", "encode")
        until(lambda: not roles(cluster)["decode-1"][1])
        cluster.processes["decode-1"].kill()
        refused = switching.result()
    check(load.answers, engine, prompts, cluster)
    assert refused.status_code == 504, refused.text
    assert refused.json()["error"]["code"] == "no_answer"
    assert_settled(cluster)
