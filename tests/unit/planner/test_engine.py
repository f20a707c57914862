"""A host's cores are shared equally by what is ready."""

from __future__ import annotations

from functools import partial

import pytest

from services.planner.engine import Device, Host, Slots, Timeline


def ends(num_cores: int, *jobs: tuple[float, float], full_speed: float = 1.0) -> list[float]:
    """When each job (start, seconds of a core) has ended."""
    timeline = Timeline()
    host = Host(timeline, num_cores, full_speed)
    found = [0.0] * len(jobs)

    def begin(number: int, seconds: float) -> None:
        def end() -> None:
            found[number] = round(timeline.now_s, 6)

        host.run(seconds, end)

    for number, (start_s, seconds) in enumerate(jobs):
        timeline.after(start_s, partial(begin, number, seconds))
    timeline.run()
    return found


def test_a_core_for_each_delays_nobody() -> None:
    assert ends(0, (0, 1), (0, 2), (0.5, 1)) == [1, 2, 1.5]
    assert ends(3, (0, 1), (0, 2), (0.5, 1)) == [1, 2, 1.5]


def test_one_core_is_halved_while_two_run() -> None:
    # Alone until 1, shared until 3, when the second has its 1 s; the first then has 1 s left.
    assert ends(1, (0, 3), (1, 1)) == pytest.approx([4, 3])


def test_two_cores_for_three() -> None:
    assert ends(2, (0, 2), (0, 2), (0, 2)) == pytest.approx([3, 3, 3])
    assert ends(2, (0, 2), (0, 2), (1, 2)) == pytest.approx([2.5, 2.5, 3.5])


def test_cores_are_slower_while_all_are_busy() -> None:
    assert ends(2, (0, 2), (1, 1), full_speed=0.5) == pytest.approx([3, 3])
    assert ends(1, (0, 1), (0, 1), full_speed=0.5) == pytest.approx([2, 2]), "no others to hinder"


def test_cores_are_as_slow_as_they_are_told_to_be() -> None:
    timeline = Timeline()
    host, found = Host(timeline, 1), []
    timeline.after(1.0, lambda: host.slow(2.0))
    timeline.after(3.0, lambda: host.slow(1.0))
    host.run(3.0, lambda: found.append(timeline.now_s))
    timeline.run()
    assert found == pytest.approx([4.0])


def test_steps_of_several_devices_take_turns() -> None:
    timeline = Timeline()
    host, slots = Host(timeline, 2), Slots(2)
    found: list[tuple[str, float]] = []
    for name, seconds in (("encode", 3.0), ("prefill", 1.0), ("decode", 1.0)):
        device = Device(host, slots)
        device.compute(seconds, lambda name=name: found.append((name, timeline.now_s)))
    timeline.run()
    assert found == [("prefill", 1.0), ("decode", 2.0), ("encode", 3.0)]


def test_what_takes_no_time_ends_at_once() -> None:
    assert ends(1, (0, 1), (0.5, 0)) == [1, 0.5]


def test_a_hop_leaves_the_core_to_others_while_it_waits() -> None:
    timeline = Timeline()
    host = Host(timeline, 1, wait_share=0.75)
    seen: list[tuple[str, float]] = []
    host.hop(0.004, lambda: seen.append(("hop", timeline.now_s)))
    host.run(0.005, lambda: seen.append(("work", timeline.now_s)))
    timeline.run()
    assert [name for name, _ in seen] == ["hop", "work"]
    assert [at_s for _, at_s in seen] == pytest.approx([0.005, 0.006])
    assert host.busy_s == pytest.approx(0.006)
