"""A host's cores are taken in turns of a slice by what is ready."""

from __future__ import annotations

from functools import partial

import pytest

from services.planner.engine import SLICE_S, Host, Timeline


def ends(num_cores: int, *jobs: tuple[float, float]) -> list[float]:
    """When each job (start, seconds of a core) has ended."""
    timeline = Timeline()
    host = Host(timeline, num_cores)
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
    assert ends(1, (0, 3), (1, 1)) == pytest.approx([4, 3], abs=1.5 * SLICE_S)


def test_two_cores_for_three() -> None:
    assert ends(2, (0, 2), (0, 2), (0, 2)) == pytest.approx([3, 3, 3], abs=1.5 * SLICE_S)


def test_what_is_short_waits_for_the_slice_of_another() -> None:
    begun_s, short_s = 0.5 * SLICE_S, 0.1 * SLICE_S
    assert ends(1, (0, 10 * SLICE_S), (begun_s, short_s)) == pytest.approx(
        [10 * SLICE_S + short_s, SLICE_S + short_s]
    )
    assert ends(2, (0, 10 * SLICE_S), (begun_s, short_s)) == pytest.approx(
        [10 * SLICE_S, begun_s + short_s]
    )


def test_what_takes_no_time_ends_at_once() -> None:
    assert ends(1, (0, 1), (0.5, 0)) == [1, 0.5]


def test_a_hop_leaves_the_core_to_others_while_it_waits() -> None:
    timeline = Timeline()
    host = Host(timeline, 1, wait_share=0.75)
    seen: list[tuple[str, float]] = []
    host.hop(SLICE_S, lambda: seen.append(("hop", timeline.now_s)))
    host.run(SLICE_S, lambda: seen.append(("work", timeline.now_s)))
    timeline.run()
    assert [name for name, _ in seen] == ["hop", "work"]
    assert [at_s for _, at_s in seen] == pytest.approx([SLICE_S, 1.25 * SLICE_S])
    assert host.busy_s == pytest.approx(1.25 * SLICE_S)
