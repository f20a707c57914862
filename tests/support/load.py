"""Clients that ask a running cluster while something happens to it, and what must hold afterwards.

In: a cluster and mixed requests. Out: every answer, compared with one process; and what the workers
still hold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from tests.support.cluster import Cluster, Process
from tests.support.mixed import Mixed, tokens_of

NUM_CLIENTS = 8
ANSWER_TIMEOUT_S = 120.0
PATIENCE_S = 60.0
LEVELS = (
    "triptych_leases_open",
    "triptych_kv_cache_usage_perc",
    "triptych_num_requests_running",
    "triptych_quarantined_bytes",
)
"""What is 0 in a worker that nobody asks anything of."""

Answers = list[tuple[Mixed, httpx.Response]]


class Load:
    """Asks round after round until `end`, one at least."""

    def __init__(self, cluster: Cluster, rounds: Iterable[Sequence[Mixed]]) -> None:
        self.answers: Answers = []
        self._cluster, self._rounds = cluster, rounds
        self._over = threading.Event()

    def end(self) -> None:
        """No new round."""
        self._over.set()

    def run(self) -> None:
        """Until the last answer."""
        url = f"{self._cluster.url}/v1/chat/completions"

        def ask(request: Mixed) -> None:
            response = client.post(url, json=request.body(self._cluster.model))
            self.answers.append((request, response))

        with (
            httpx.Client(timeout=ANSWER_TIMEOUT_S, trust_env=False) as client,
            ThreadPoolExecutor(NUM_CLIENTS) as pool,
        ):
            for requests in self._rounds:
                list(pool.map(ask, requests))
                if self._over.is_set():
                    return


@contextmanager
def under_load(cluster: Cluster, rounds: Iterable[Sequence[Mixed]]) -> Iterator[Load]:
    """Within the block clients ask, and the first answer has come; afterwards all have.

    Rounds should not end before the block does. Pictures that have been asked about before leave
    encoders without work.
    """
    load = Load(cluster, rounds)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(load.run)
        try:
            until(lambda: bool(load.answers) or asking.done())
            yield load
        finally:
            load.end()
            asking.result()


def ask_all(cluster: Cluster, requests: Sequence[Mixed], num_clients: int) -> list[list[int]]:
    """Every request once; the token ids of each whole answer."""
    url = f"{cluster.url}/v1/chat/completions"

    def ask(request: Mixed) -> list[int]:
        response = client.post(url, json=request.body(cluster.model))
        assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "length"
        token_ids: list[int] = choice["token_ids"]
        return token_ids

    with (
        httpx.Client(timeout=ANSWER_TIMEOUT_S, trust_env=False) as client,
        ThreadPoolExecutor(num_clients) as pool,
    ):
        return list(pool.map(ask, requests))


def check(answers: Answers, engine: LocalEngine, prompts: PromptMaker, cluster: Cluster) -> None:
    """Every answer is whole and has the tokens of one process."""
    expected: dict[Mixed, list[int]] = {}
    assert answers
    for request, response in answers:
        assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
        if request not in expected:
            expected[request] = tokens_of(request, engine, prompts)
        assert response.json()["choices"][0]["token_ids"] == expected[request]


def until(holds: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait for it."""
    give_up_at = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < give_up_at, f"{holds} did not come true in {patience_s} s"
        time.sleep(0.02)


def busiest(cluster: Cluster, service: str) -> Process:
    """The live worker of a service with the most tasks at work."""
    workers = [each for each in cluster.workers(service) if each.popen.poll() is None]
    return max(workers, key=lambda each: each.metric("triptych_num_requests_running"))


def kill_at_work(cluster: Cluster, service: str) -> Process:
    """Kill a worker in the middle of a task; returns it."""
    until(lambda: busiest(cluster, service).metric("triptych_num_requests_running"))
    victim = busiest(cluster, service)
    victim.kill()
    return victim


def left_over(cluster: Cluster) -> dict[str, float]:
    """What live workers still hold."""
    return {
        f"{process.name} {name}": value
        for process in cluster.processes.values()
        if process.metrics_url and process.popen.poll() is None
        for name in LEVELS
        if (value := process.metric(name))
    }


def assert_settled(cluster: Cluster, patience_s: float = PATIENCE_S) -> None:
    """Soon nothing is held any more."""
    give_up_at = time.monotonic() + patience_s
    while left := left_over(cluster):
        assert time.monotonic() < give_up_at, f"left over: {left}\n{cluster.logs()}"
        time.sleep(0.1)


def roles(cluster: Cluster) -> dict[str, tuple[list[str], bool]]:
    """The registered workers: their stages, and whether they take tasks."""
    workers = httpx.get(f"{cluster.url}/v1/roles", trust_env=False).json()["workers"]
    return {each["worker"]: (each["stages"], each["ready"]) for each in workers}


def switch(cluster: Cluster, worker: str, role: str) -> httpx.Response:
    """Have a worker take another role, as an operator would."""
    url = f"{cluster.url}/v1/roles/{worker}"
    return httpx.post(url, json={"role": role}, timeout=PATIENCE_S, trust_env=False)


def ready_ones(cluster: Cluster) -> set[str]:
    """The workers that are registered as ready."""
    return {name for name, (_, ready) in roles(cluster).items() if ready}


def mend(cluster: Cluster) -> None:
    """Start what was killed again, and bring everybody back to the role of its name."""
    dead = {p.name for p in cluster.processes.values() if p.popen.poll() is not None}
    for name in dead:
        cluster.restart(name)
    # A dead one stays registered for a while, and is not the new one of its name.
    until(lambda: not dead & ready_ones(cluster))
    workers = {p.name: p.name.rsplit("-", 1)[0] for p in cluster.processes.values()}
    home = {
        name: {"encoder": "encode"}.get(service, service)
        for name, service in workers.items()
        if service != "gateway"
    }
    until(lambda: ready_ones(cluster) == set(home))
    for name, (stages, _) in roles(cluster).items():
        if stages != [home[name]]:
            response = switch(cluster, name, home[name])
            assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
