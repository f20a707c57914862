"""A host's cores are shared equally by what runs at the moment."""

from __future__ import annotations

from functools import partial

from services.planner.engine import Host, Timeline


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
    assert ends(1, (0, 3), (1, 1)) == [4, 3]


def test_two_cores_for_three() -> None:
    assert ends(2, (0, 2), (0, 2), (0, 2)) == [3, 3, 3]


def test_what_takes_no_time_ends_at_once() -> None:
    assert ends(1, (0, 1), (0.5, 0)) == [1, 0.5]
