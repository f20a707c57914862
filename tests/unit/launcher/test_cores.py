"""Which cores a worker stays on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.launcher.cores import divide, own_cores


@pytest.mark.parametrize(
    ("num_cores", "threads", "num_workers", "parts"),
    [
        (8, 2, 3, [(0, 1), (2, 3), (4, 5)]),
        (8, 2, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (2, 2, 3, [(), (), ()]),
        (2, 1, 2, [(0,), (1,)]),
        (4, 2, 0, []),
    ],
)
def test_each_worker_has_an_equal_run_of_cores_or_none(
    num_cores: int, threads: int, num_workers: int, parts: list[tuple[int, ...]]
) -> None:
    assert divide(range(num_cores), threads, num_workers) == parts


def write_topology(folder: Path, number: int, socket: int, core: int) -> None:
    topology = folder / f"cpu{number}" / "topology"
    topology.mkdir(parents=True)
    (topology / "physical_package_id").write_text(f"{socket}\n")
    (topology / "core_id").write_text(f"{core}\n")


def test_halves_of_a_core_are_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for number in range(8):
        write_topology(tmp_path, number, socket=number // 2 % 2, core=number % 2)
    assert own_cores(tmp_path) == (0, 4, 1, 5, 2, 6, 3, 7)


def test_cores_without_a_topology_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {9, 3, 5}, raising=False)
    assert own_cores(tmp_path) == (3, 5, 9)
